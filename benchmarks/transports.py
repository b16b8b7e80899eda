"""Checkouts beside each other, in turns: what a small update takes, many ranks, and how soon a death is known.

    git worktree add --detach ../before COMMIT
    python benchmarks/transports.py --tree before=../before --tree this=. --json benchmarks/results/FILE.json

Each checkout has a job and a hub of its own. All live at the same time and are used in turns, block by block,
another one first in each: planned updates, back to back or with a pause before each, in which all go to
sleep. On which cores threads come to lie moves a job's times for as long as it lives: all jobs are started
anew several times, and a pair is one start. Compared are medians, and the tenth part, which load disturbs
least. Ranks: simulated ones (simulated.py of that checkout), which go by the hub's Unix socket where it
offers one. Deaths: a server rank is killed; until the hub's status has it no more, looked at each 12 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ITSELF = str(Path(__file__).resolve())


# -- in a process that imports one of the trees ----------------------------------------------------


def command(*arguments: object) -> list[str]:
    begin = f"import sys, runpy; sys.argv[0] = {ITSELF!r}; runpy.run_path({ITSELF!r}, run_name='__main__')"
    return [sys.executable, "-c", begin, *map(str, arguments)]


def device_of(kind: str, index: int) -> Any:
    import torch

    return torch.device("cuda", index % torch.cuda.device_count()) if kind == "cuda" else torch.device("cpu")


def free_address() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def server(address: str, replica: int, nbytes: int, device: str) -> None:
    import torch

    import weightbus

    torch.set_num_threads(1)
    target = [("weight", torch.zeros(nbytes // 4, device=device_of(device, replica + 1)))]
    with weightbus.Subscriber(target, address=address, rank=0, replica_size=1, replica=replica) as subscriber:
        subscriber.serve()


def job(servers: int, nbytes: int, device: str) -> None:
    """A trainer rank, its servers and hub; does what each line of stdin says, answers by a line."""
    import torch

    import weightbus

    torch.set_num_threads(1)
    address, version = free_address(), 0
    source = [("weight", torch.ones(nbytes // 4, device=device_of(device, 0)))]
    ranks = [
        subprocess.Popen(  # noqa: S603 - this file
            command("server", "--address", address, "--number", i, "--nbytes", nbytes, "--device", device)
        )
        for i in range(servers)
    ]
    try:
        with weightbus.Publisher(
            source, address=address, rank=0, size=1, min_replicas=servers, progress=lambda done, total: None
        ) as publisher:
            for line in sys.stdin:
                do = json.loads(line)
                if "kill" in do:
                    answer: Any = death(address, ranks[do["kill"]], weightbus)
                else:
                    seconds = []
                    for _ in range(do["updates"]):
                        time.sleep(do["pause_s"])
                        version += 1
                        seconds.append(publisher.update(version, verify=do["verify"]).seconds)
                    answer = seconds
                print(json.dumps(answer), flush=True)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(20)


def death(address: str, rank: Any, weightbus: Any) -> float:
    with weightbus.Client(address) as client:
        here = len(client.status(0).peers)
        begun = time.perf_counter()
        os.kill(rank.pid, signal.SIGKILL)
        while len(client.status(0).peers) == here:
            time.sleep(0.012)
        return time.perf_counter() - begun


def crowd_class() -> Any:
    """The tree's simulated ranks, which go by the Unix socket if there is one."""
    import simulated
    import zmq

    m, wire = simulated.m, simulated.wire
    local: Any = None
    with contextlib.suppress(ImportError):
        local = importlib.import_module("weightbus.local")

    class Rank(simulated.Rank):
        name = ""
        way: Any = None

        def send(self, message: Any) -> None:
            message.stamp(self.header)
            for frames in wire.encode_to_hub(message, self.peer):
                if self.way is not None:
                    self.way.send(frames)
                else:
                    self.socket.send_multipart(frames)

        def hear(self, message: Any) -> None:
            if isinstance(message, m.Welcome):
                self.name = getattr(message, "local", "")
            super().hear(message)
            if isinstance(message, m.Alive) and message.known and self.name and self.way is None:
                self.way = local.connect(self.name, max_frames=1 << 20, max_bytes=1 << 30)
                self.send(m.Beat(peer=self.peer))

    class Crowd(simulated.Crowd):
        def join(self, *arguments: Any) -> Any:
            kind, simulated.Rank = simulated.Rank, Rank
            try:
                return super().join(*arguments)
            finally:
                simulated.Rank = kind

        def run(self, until: Any, timeout_s: float) -> bool:
            deadline = time.monotonic() + timeout_s
            ways = self.__dict__.setdefault("ways", {})
            while not until():
                now = time.monotonic()
                if now > deadline:
                    return False
                if now > self._next_beat:
                    self._next_beat = now + 2.0
                    for rank in self.ranks.values():
                        if rank.is_member:
                            rank.send(m.Beat(peer=rank.peer))
                for found, _ in self._poller.poll(20):
                    rank = ways[found] if isinstance(found, int) else self.ranks[found]
                    if isinstance(found, int):
                        for frames in rank.way.receive():
                            rank.hear(wire.decode_from_hub(frames))
                        rank.way.flush()
                        continue
                    while True:
                        try:
                            frames = found.recv_multipart(zmq.NOBLOCK)
                        except zmq.Again:
                            break
                        rank.hear(wire.decode_from_hub(frames))
                        if rank.way is not None and rank.way.fileno() not in ways:
                            ways[rank.way.fileno()] = rank
                            self._poller.register(rank.way.fileno(), zmq.POLLIN)
            return True

    return Crowd


def crowd(address: str, first: int, last: int, size: int) -> None:
    ranks = crowd_class()(address)
    for rank in range(first, last):
        joined = ranks.join("server", rank % size, size, rank // size)
        ranks.run(lambda r=joined: r.is_member, 30)
    parent = os.getppid()
    ranks.run(lambda: os.getppid() != parent, 3600.0)


def many(count: int) -> None:
    """A hub with so many simulated ranks; answers each line ``{"rounds": n}`` by the rounds' seconds."""
    import simulated

    import weightbus

    address = free_address()
    python = [sys.executable, "-m", "weightbus.hub", "--address", address]
    hub = subprocess.Popen(python, stderr=subprocess.DEVNULL)  # noqa: S603 - ours
    crowds = []
    own = crowd_class()(address)
    try:
        time.sleep(1.0)
        for first in range(0, count, 128):
            last = min(count, first + 128)
            crowds.append(
                subprocess.Popen(  # noqa: S603 - this file
                    command("crowd", "--address", address, "--number", first, "--last", last), env=os.environ
                )
            )
        with weightbus.Client(address) as client:
            until = time.monotonic() + 120
            while len(client.status(0).peers) < count:
                if time.monotonic() > until:
                    raise SystemExit("the simulated ranks did not join")
                time.sleep(0.3)
            rank = own.join("trainer", 0, 1)
            own.run(lambda: rank.is_member, 30)
            own.run(lambda: False, 0.5)
            while True:
                own.run(lambda: select.select([sys.stdin], [], [], 0)[0], 3600)  # it beats meanwhile
                if not (line := sys.stdin.readline()):
                    break
                seconds = []
                for _ in range(json.loads(line)["rounds"]):
                    version = len(rank.outcomes) + 1
                    begun = time.perf_counter()
                    rank.send(simulated.enter(rank, version))
                    if not own.run(lambda v=version: len(rank.outcomes) >= v, 60):
                        raise SystemExit("no outcome")
                    seconds.append(time.perf_counter() - begun)
                    outcome = rank.outcomes[-1]
                    if (outcome.verdict, outcome.servers) != ("verified", count):
                        raise SystemExit(f"got {outcome.servers} {outcome.verdict}")
                print(json.dumps(seconds), flush=True)
    finally:
        for process in (*crowds, hub):
            process.kill()
            process.wait(20)


# -- all of it -------------------------------------------------------------------------------------


class Live:
    """A process of one tree that answers lines."""

    def __init__(self, tree: Path, *arguments: object) -> None:
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(tree), str(tree / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(  # noqa: S603 - this file
            command(*arguments), cwd=tree, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **do: Any) -> Any:
        assert self.process.stdin is not None  # noqa: S101 - for mypy
        assert self.process.stdout is not None  # noqa: S101 - for mypy
        self.process.stdin.write(json.dumps(do) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], 300)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            raise SystemExit(f"no answer of {self.process.args[3:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None  # noqa: S101 - for mypy
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def interval(values: list[float]) -> list[float]:
    """95 % of the medians of resampled pairs."""
    draw = random.Random(0)  # noqa: S311 - to resample
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return [medians[50], medians[1949]]


def least(seconds: list[float]) -> float:
    """The tenth part of a block, which a loaded machine disturbs least."""
    return sorted(seconds)[len(seconds) // 10]


def row_of(what: dict[str, Any], pairs: list[dict[str, float]], base: str) -> dict[str, Any]:
    row = what | {"pairs": len(pairs)}
    for name in pairs[0]:
        values = [pair[name] for pair in pairs]
        row[f"{name}_p50_ms"] = round(statistics.median(values) * 1e3, 4)
        if name != base:
            above = [(pair[name] - pair[base]) * 1e3 for pair in pairs]
            row[f"{name}_above_{base}_p50_ms"] = round(statistics.median(above), 4)
            row[f"{name}_above_{base}_95_ms"] = [round(x, 4) for x in interval(above)]
            row[f"{name}_slower_pairs"] = sum(x > 0 for x in above)
    print(json.dumps(row), flush=True)
    return row


def turns(names: list[str], number: int) -> list[str]:
    at = number % len(names)
    return [*names[at:], *names[:at]] if number // len(names) % 2 == 0 else [*names[at:], *names[:at]][::-1]


@contextlib.contextmanager
def all_live(trees: dict[str, Path], *arguments: object) -> Iterator[dict[str, Live]]:
    with contextlib.ExitStack() as stack:
        live = {name: Live(tree, *arguments) for name, tree in trees.items()}
        for one in live.values():
            stack.callback(one.close)
        yield live


def in_turns(live: dict[str, Live], number: int, **do: Any) -> dict[str, Any]:
    """The answers of one pair; a block of updates follows two others, so that none follows a rest."""
    found = {}
    for name in turns(list(live), number):
        if "updates" in do:
            live[name].ask(**do | {"updates": 2, "pause_s": 0.0})
        found[name] = live[name].ask(**do)
        time.sleep(0.15)  # what spins has stopped
    return {name: found[name] for name in live}


def run(args: argparse.Namespace) -> None:
    trees = {name: Path(path).resolve() for name, path in (tree.split("=", 1) for tree in args.tree)}
    base = next(iter(trees))
    rows: list[dict[str, Any]] = []

    def compare(what: dict[str, Any], blocks: list[dict[str, list[float]]]) -> None:
        for of, pick in (("tenth part", least), ("median", statistics.median)):
            pairs = [{name: pick(block[name]) for name in trees} for block in blocks]
            rows.append(row_of(what | {"of": of}, pairs, base))

    for servers in args.servers:
        found: dict[tuple[bool, float], list[dict[str, list[float]]]] = {}
        deaths = []
        job = ("job", "--number", servers, "--nbytes", args.nbytes, "--device", args.device)
        for number in range(args.starts):
            with all_live(dict(sorted(trees.items(), reverse=number % 2 > 0)), *job) as live:
                for verify, pause_s in itertools.product((False, True), (0.0, args.pause)):
                    if not (count := args.paused_updates if pause_s else args.updates):
                        continue
                    in_turns(live, 0, updates=10, verify=verify, pause_s=0.0)
                    do = {"updates": count, "verify": verify, "pause_s": pause_s}
                    blocks = [in_turns(live, block, **do) for block in range(args.blocks)]
                    joined = {name: [s for block in blocks for s in block[name]] for name in trees}
                    found.setdefault((verify, pause_s), []).append(joined)
                deaths.append(in_turns(live, number, kill=0))
        for (verify, pause_s), starts in found.items():
            what = {"what": "update", "ranks": f"1+{servers}", "verify": verify, "pause_s": pause_s}
            compare(what, starts)
        rows.append(row_of({"what": "death known", "ranks": f"1+{servers}"}, deaths, base))
    if args.ranks:
        with all_live(trees, "many", "--number", args.ranks) as live:
            in_turns(live, 0, rounds=1)
            compare(
                {"what": "simulated ranks", "ranks": args.ranks},
                [in_turns(live, number, rounds=5) for number in range(args.blocks)],
            )
    import record
    import zmq

    commits = {name: record.commit_of(tree) for name, tree in trees.items()}
    more = {"nbytes": args.nbytes, "device": args.device, "commits": commits, "load": os.getloadavg()}
    record.write(args.json, "transports", rows, zmq=zmq.zmq_version(), **more)


def main() -> int:
    parser = argparse.ArgumentParser(description="checkouts beside each other")
    parser.add_argument("do", nargs="?", default="run", choices=["run", "job", "server", "many", "crowd"])
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=PATH", help="the first: the base")
    parser.add_argument("--starts", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--pause", type=float, default=0.12)
    parser.add_argument("--paused-updates", type=int, default=8)
    parser.add_argument("--servers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--nbytes", type=int, default=1 << 20)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--address")
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--last", type=int, default=0)
    args = parser.parse_args()
    if args.do == "run":
        run(args)
    elif args.do == "job":
        job(args.number, args.nbytes, args.device)
    elif args.do == "server":
        server(args.address, args.number, args.nbytes, args.device)
    elif args.do == "many":
        many(args.number)
    else:
        crowd(args.address, args.number, args.last, 8)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
