"""What a chaos run's processes do: ranks that are told by a pipe, and look at their bits after each poll."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from namespaces import Host
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import weightbus
from weightbus.control import messages as m

TRAINERS, REPLICAS, REPLICA_SIZE = 2, 2, 2
# On a machine that others use, too, all deadlines of a run are so many times longer.
SLOW = float(os.environ.get("WEIGHTBUS_CHAOS_SLOW", "1"))
JOIN_S, READY_S, TRANSFER_S, DEAD_AFTER_S = 12.0 * SLOW, 3.0 * SLOW, 4.0 * SLOW, 2.0 * SLOW
COUNT, ROWS, COLUMNS = 12, 128, 256
HOOKED = COUNT // 2  # of so many tensors a server rank has its columns only, behind a weight_loader
PACE_S = 0.002  # in each call of a hook, so that an update takes long enough to be hit
BUCKET_BYTES = 64 << 10


def value(index: int, version: int, salt: int = 0) -> Tensor:
    """Of tensor ``index``; each element differs between versions. Exact in fp32."""
    grid = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    return ((grid * 31 + index * 101 + version * 7919 + salt) % 16777213).float()


def usage(process: int | str = "self") -> dict[str, int]:
    """Of a process: resident KiB, threads, descriptors."""
    with open(f"/proc/{process}/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    descriptors = len(os.listdir(f"/proc/{process}/fd")) - (process == "self")  # but the one that lists them
    return {"rss_kib": int(lines["VmRSS"].split()[0]), "threads": int(lines["Threads"]), "fds": descriptors}


class Planted(RuntimeError):
    """What a hook raises."""


@dataclass
class Hooks:
    """An engine's or a trainer's callbacks. plan: at which of them something happens next, and what."""

    plan: dict[str, Any] = field(default_factory=dict)
    spent_s: float = 0.0
    fired: Callable[[str], None] = lambda place: None

    def follow(self, link: Any) -> None:
        """Each message that this rank sends or hears is a place, too: ``sent done``, ``heard go``."""
        send, receive = link.send, link.receive

        def sending(message: Any) -> None:
            send(message)
            self.at(f"sent {tag_of(message)}")

        def receiving(*arguments: Any, **options: Any) -> Any:
            message = receive(*arguments, **options)
            if message is not None:
                self.at(f"heard {tag_of(message)}")
            return message

        link.send, link.receive = sending, receiving

    def at(self, place: str) -> None:
        if self.plan.get("at") != place:
            return
        if self.plan.setdefault("after", 0) > 0:
            self.plan["after"] -= 1
            return
        plan, self.plan = self.plan, {}
        self.fired(place)
        if plan["do"] == "raise":
            raise Planted(f"planted in {place}")
        if isinstance(plan["do"], int):
            os.kill(os.getpid(), plan["do"])
            return
        begun = time.monotonic()
        time.sleep(plan["for"])
        self.spent_s += time.monotonic() - begun


def tag_of(message: Any) -> str:
    """``sources`` and ``wants`` are gathered; all else goes by its name."""
    return f"{message.of}" if isinstance(message, m.Gathered) else type(message).__name__.lower()


@dataclass
class Interrupts:
    """SIGINT is KeyboardInterrupt within weightbus's calls only, not in the test's own lines."""

    inside: bool = False

    def __post_init__(self) -> None:
        signal.signal(signal.SIGINT, self._interrupt)
        signal.signal(signal.SIGTERM, self._terminate)

    def _interrupt(self, *_: object) -> None:
        if self.inside:
            self.inside = False
            raise KeyboardInterrupt

    def _terminate(self, *_: object) -> None:
        raise SystemExit(0)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False


def _fork(seconds: float) -> None:
    """A child, as a data loader's worker, that keeps all descriptors for a while."""
    if os.fork() == 0:
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(seconds)
        os._exit(0)


def _listen(pipe: Connection, hooks: Hooks, timeout_s: float) -> tuple[str, Any] | None:
    """The next command that is not done here; SystemExit with the driver's end of the pipe."""
    try:
        if not pipe.poll(timeout_s):
            return None
        what, argument = pipe.recv()
    except (EOFError, OSError):
        raise SystemExit(0) from None
    if what == "plan":
        hooks.plan = argument
    elif what == "fork":
        _fork(argument)
    elif what == "close":
        raise SystemExit(0)
    else:
        return what, argument
    pipe.send(("told", {"of": what}))
    return None


def _as_rank(pipe: Connection, host: Host | None, run: Callable[[Interrupts], None]) -> None:
    """A rank's process from its first line to its last."""
    faulthandler.register(signal.SIGUSR1)  # where it stands, for whoever looks into a hang
    try:
        if host is not None:
            host.enter()
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # of the job's own group
        run(Interrupts())
    except SystemExit:
        pass
    except BaseException as error:
        with contextlib.suppress(OSError):
            pipe.send(("fell", {"error": f"{type(error).__name__}: {error}"}))
    os._exit(0)


# -- trainer ranks ---------------------------------------------------------------------------------


def trainer(pipe: Connection, host: Host | None, address: str, rank: int, store: str) -> None:
    def run(interrupts: Interrupts) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=TRAINERS
        )
        mesh = init_device_mesh("cpu", (TRAINERS,))
        os.environ.pop("GLOO_SOCKET_IFNAME")
        rows = ROWS // TRAINERS
        locals_ = [torch.zeros(rows, COLUMNS) for _ in range(COUNT)]
        source = [
            (f"w{i:02}", DTensor.from_local(x, mesh, [Shard(0)], run_check=False))
            for i, x in enumerate(locals_)
        ]
        hooks = Hooks(fired=lambda place: pipe.send(("fired", {"at": place})))
        with weightbus.Publisher(
            source, address=address, insecure=host is not None, route="broadcast", bucket_bytes=BUCKET_BYTES,
            join_timeout_s=JOIN_S, ready_timeout_s=READY_S, transfer_timeout_s=TRANSFER_S,
            dead_after_s=DEAD_AFTER_S, progress=lambda done, total: hooks.at("progress"),
        ) as publisher:  # fmt: skip
            hooks.follow(publisher._session.link)
            pipe.send(("up", {}))
            while True:
                command = _listen(pipe, hooks, 1.0)
                if command is None:
                    continue
                version = command[1]["version"]
                for index, tensor in enumerate(locals_):
                    tensor.copy_(value(index, version)[rank * rows : (rank + 1) * rows])
                pipe.send(("answer", _call(publisher, interrupts, hooks, *command)))

    _as_rank(pipe, host, run)


def _call(
    publisher: weightbus.Publisher, interrupts: Interrupts, hooks: Hooks, what: str, argument: dict[str, Any]
) -> dict[str, Any]:
    """What a call gave, and when; times are of the clock that all processes of a host share."""
    seen: dict[str, Any] = {"began": time.monotonic(), "kind": "ok", "text": ""}
    hooks.spent_s = 0.0
    try:
        with interrupts.allowed():
            if what == "save":
                with _small_files(argument.get("limit")):
                    publisher.save(argument["path"], version=argument["version"], timeout_s=10.0)
            else:
                if argument.get("replan"):  # so that it has all phases
                    publisher._session.context.plans.clear()
                report = publisher.update(argument["version"])
                seen |= {"replicas": list(report.replicas), "left_out": dict(report.left_out)}
    except weightbus.WeightbusError as error:
        seen |= {"kind": type(error).__name__, "text": str(error)}
    except Planted as error:
        seen |= {"kind": "planted", "text": str(error)}
    except KeyboardInterrupt:
        seen |= {"kind": "interrupted"}
    return seen | {"ended": time.monotonic(), "hooks_s": hooks.spent_s, "usage": usage()}


@contextlib.contextmanager
def _small_files(limit: int | None) -> Iterator[None]:
    """A full disk: this process can write no file beyond ``limit`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# -- server ranks ----------------------------------------------------------------------------------


class Shards(nn.Module):
    """Half of the tensors whole, half by columns behind a hook."""

    def __init__(self, rank: int, hooks: Hooks) -> None:
        super().__init__()
        columns = COLUMNS // REPLICA_SIZE
        self.cut = slice(rank * columns, (rank + 1) * columns)

        def load(parameter: Tensor, loaded: Tensor) -> None:
            if not loaded.is_meta:
                time.sleep(PACE_S)
                hooks.at("hook")
            parameter.data.copy_(loaded[:, self.cut])

        for index in range(COUNT):
            hooked = index < HOOKED
            parameter = nn.Parameter(torch.zeros(ROWS, columns if hooked else COLUMNS), requires_grad=False)
            if hooked:
                parameter.weight_loader = load  # type: ignore[attr-defined]
            self.register_parameter(f"w{index:02}", parameter)

    def wrong(self, version: int) -> list[str]:
        """Names of tensors that are not what this version's are."""
        found = []
        for index in range(COUNT):
            live = self.get_parameter(f"w{index:02}").data
            right = value(index, version)
            if not torch.equal(live, right[:, self.cut] if index < HOOKED else right):
                found.append(f"w{index:02}")
        return found


def server(pipe: Connection, host: Host | None, address: str, replica: int, rank: int) -> None:
    def run(interrupts: Interrupts) -> None:
        os.environ.pop("GLOO_SOCKET_IFNAME")
        hooks = Hooks(fired=lambda place: pipe.send(("fired", {"at": place})))
        model = Shards(rank, hooks)
        closings: list[str] = []  # callbacks since the last that was told, in order

        def called(name: str, place: str = "") -> Callable[[Any], None]:
            def call(_: object) -> None:
                closings.append(name)
                hooks.at(place)

            return call

        with weightbus.Subscriber(
            model, address=address, insecure=host is not None, replica=replica, rank=rank,
            replica_size=REPLICA_SIZE, on_update=called("update", "on_update"),
            on_commit=called("commit", "on_commit"), on_torn=called("torn"), on_refused=called("refused"),
        ) as subscriber:  # fmt: skip
            hooks.follow(subscriber._session.link)
            pipe.send(("up", {}))
            told: Any = None
            while True:
                while _listen(pipe, hooks, 0.0):
                    pass
                hooks.spent_s, begun, raised = 0.0, time.monotonic(), ""
                try:
                    with interrupts.allowed():
                        subscriber.poll(0.05)
                except (Planted, KeyboardInterrupt, weightbus.WeightbusError) as error:
                    raised = f"{type(error).__name__}: {error}"
                took = time.monotonic() - begun - hooks.spent_s
                state, version = subscriber.state, subscriber.version
                ready = state == "ready" and version is not None
                wrong = model.wrong(version) if ready and version is not None else []
                seen = (state, version, str(subscriber.error or ""), wrong)
                if seen != told or raised or took > 1.0 or closings:
                    told = seen
                    fields = ("state", "version", "error", "wrong")
                    more = {"raised": raised, "took": took, "calls": list(closings), "usage": usage()}
                    closings.clear()
                    pipe.send(("seen", dict(zip(fields, seen, strict=True)) | more))

    _as_rank(pipe, host, run)


# -- other jobs ------------------------------------------------------------------------------------


def intruder(pipe: Connection, host: Host | None, address: str) -> None:
    """A trainer that asks for a place of the first job, with other values: ``ok`` must never come of it."""

    def run(interrupts: Interrupts) -> None:
        source = [(f"w{i:02}", value(i, 0, salt=5)) for i in range(COUNT)]
        try:
            with weightbus.Publisher(
                source, address=address, insecure=host is not None, rank=1, size=TRAINERS, join_timeout_s=2.0
            ) as publisher:
                publisher.update(1 << 30)
        except weightbus.WeightbusError as error:
            pipe.send(("answer", {"kind": type(error).__name__, "text": str(error)}))
        else:
            pipe.send(("answer", {"kind": "ok", "text": ""}))

    _as_rank(pipe, host, run)


def other_job(pipe: Connection, host: Host | None, address: str, role: str, updates: int) -> None:
    """A job with a name of its own at the same hub: a trainer or a server of one rank."""

    def run(interrupts: Interrupts) -> None:
        options: dict[str, Any] = {"address": address, "insecure": host is not None, "job": "other"}
        tensor = torch.zeros(64, 64)
        if role == "trainer":
            with weightbus.Publisher([("x", tensor)], rank=0, size=1, join_timeout_s=20.0, **options) as end:
                for version in range(1, updates + 1):
                    tensor.fill_(version)
                    end.update(version)
            pipe.send(("answer", {"kind": "ok", "text": ""}))
            return
        with weightbus.Subscriber([("x", tensor)], rank=0, replica_size=1, **options) as server:
            while not server.left:
                server.poll(0.1)
            right = torch.equal(tensor, torch.full_like(tensor, updates))
            kind = "ok" if right and server.state == "ready" else f"{server.state} {tensor[0, 0].item()}"
            pipe.send(("answer", {"kind": kind, "text": str(server.error or "")}))

    _as_rank(pipe, host, run)
