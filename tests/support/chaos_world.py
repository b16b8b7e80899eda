"""The processes of a chaos run, as its driver sees them: started, told, hurt, put right and ended."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import chaos_ranks as ranks
from namespaces import Host, two_hosts
from processes import _context, free_port

UP_S = 40.0 * ranks.SLOW  # for a process to be a member


@dataclass(eq=False)
class Rank:
    """One process: a trainer rank, a server rank, or one of another job."""

    name: str
    process: Any
    pipe: Connection
    replica: int | None = None
    up: bool = False
    gone: bool = False  # its end of the pipe is closed
    stopped: bool = False
    answers: list[dict[str, Any]] = field(default_factory=list)
    fired: list[str] = field(default_factory=list)  # places at which what was planned has happened
    # What a server rank said last: state, version, error; all of it with its time.
    seen: dict[str, Any] = field(default_factory=dict)
    heard: float = 0.0
    usage: list[dict[str, int]] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    @property
    def alive(self) -> bool:
        return not self.gone and self.process.is_alive()

    def tell(self, what: str, argument: Any) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send((what, argument))

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
        self.stopped = number == signal.SIGSTOP or (self.stopped and number != signal.SIGCONT)

    def end(self, timeout_s: float = 0.0) -> None:
        """Gone, and reaped; killed if it has not ended in time."""
        self.signal(signal.SIGCONT)
        self.tell("close", None)
        self.process.join(timeout_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(10)
        self.pipe.close()
        self.gone = True


class Stalls:
    """How late this process was woken up: what the machine withholds is not held against anybody."""

    def __init__(self) -> None:
        self._late: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(0.05):
            now = time.monotonic()
            if now - before > 0.25:
                self._late.append((now, now - before - 0.05))
            before = now

    def since(self, begun: float) -> float:
        return sum(late for when, late in self._late if when > begun)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class World:
    """Two trainer ranks, two replicas of two ranks, the hub that the trainer starts, and what comes beside.

    links: replica 1 lies on a host of its own (a network namespace), so that the link to it can be cut.
    """

    def __init__(self, rng: random.Random, *, links: bool) -> None:
        self.rng = rng
        self._stack = contextlib.ExitStack()
        self.hosts = self._stack.enter_context(two_hosts()) if links else (None, None)
        self.folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="weightbus-chaos-"))
        self.port = free_port()
        self.address = f"tcp://{self.hosts[0].address if self.hosts[0] else '127.0.0.1'}:{self.port}"
        self.trainers: list[Rank] = []
        self.servers: list[Rank] = []
        self.others: list[Rank] = []
        self.starts = 0
        self.events: list[tuple[float, str, str, dict[str, Any]]] = []
        self.on_seen: Callable[[Rank, dict[str, Any]], None] = lambda rank, seen: None

    # -- processes ---------------------------------------------------------------------------------

    def start(
        self, name: str, run: Callable[..., None], host: Host | None, *arguments: Any, **more: Any
    ) -> Rank:
        ours, theirs = _context.Pipe()
        process = _context.Process(target=run, args=(theirs, host, self.address, *arguments), daemon=True)
        process.start()
        theirs.close()
        return Rank(name=name, process=process, pipe=ours, **more)

    def start_trainers(self) -> None:
        """A start of the trainer job: both ranks, with a store of their own."""
        self.starts += 1
        store = os.path.join(self.folder, f"start-{self.starts}")
        self.trainers = [
            self.start(f"trainer rank {rank}", ranks.trainer, self.hosts[0], rank, store)
            for rank in range(ranks.TRAINERS)
        ]

    def start_server(self, replica: int, rank: int) -> Rank:
        name = f"replica {replica} server rank {rank}"
        host = self.hosts[1] if replica else self.hosts[0]
        return self.start(name, ranks.server, host, replica, rank, replica=replica)

    def start_servers(self) -> None:
        self.servers = [
            self.start_server(replica, rank)
            for replica in range(ranks.REPLICAS)
            for rank in range(ranks.REPLICA_SIZE)
        ]

    @property
    def members(self) -> list[Rank]:
        return [*self.trainers, *self.servers]

    def mend(self) -> str:
        """Start again what has ended, the trainer as a whole; "" once all are up, else who is not."""
        for rank in self.members:
            rank.signal(signal.SIGCONT)
        if any(not rank.alive for rank in self.trainers):
            for rank in self.trainers:
                rank.end()
            self.start_trainers()
        for index, rank in enumerate(self.servers):
            if not rank.alive:
                rank.end()
                place = index % ranks.REPLICA_SIZE
                self.servers[index] = self.start_server(index // ranks.REPLICA_SIZE, place)
        return self.until(lambda: all(rank.up for rank in self.members if rank.alive), UP_S, "to be up")

    def until(self, done: Callable[[], bool], timeout_s: float, what: str) -> str:
        """Hear the processes until ``done``; "" or what it waited for in vain."""
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                late = [rank.name for rank in self.members if not rank.up]
                return f"waited {timeout_s:.0f} s for {late or 'ranks'} {what}"
            self.hear(0.05)
        return ""

    def hear(self, timeout_s: float) -> None:
        """What processes say within ``timeout_s``."""
        open_ = {rank.pipe: rank for rank in [*self.members, *self.others] if not rank.gone}
        for pipe in wait(list(open_), timeout_s):
            rank = open_[pipe]  # type: ignore[index]
            try:
                what, said = rank.pipe.recv()
            except (EOFError, OSError):
                rank.gone = True
                continue
            rank.heard = time.monotonic()
            self.events.append((rank.heard, rank.name, what, said))
            if "usage" in said:
                rank.usage.append(said["usage"])
            if what == "up":
                rank.up = True
            elif what == "fired":
                rank.fired.append(said["at"])
            elif what == "answer":
                rank.answers.append(said)
            elif what == "seen":
                rank.seen = said
                self.on_seen(rank, said)

    # -- the hub -----------------------------------------------------------------------------------

    def hub_pids(self) -> list[int]:
        """Hubs of this run's address, whoever has started them."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
                    if b"--ephemeral" in words and self.address.encode() in words:
                        found.append(int(name))
        return found

    def signal_hub(self, number: int) -> None:
        for pid in self.hub_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # -- links -------------------------------------------------------------------------------------

    def link(self, up: bool) -> None:
        host = self.hosts[1]
        assert host is not None, "a run without links draws no fault of them"
        (host.appear if up else host.vanish)()

    def close(self) -> None:
        for rank in [*self.servers, *self.trainers, *self.others]:
            with contextlib.suppress(Exception):
                rank.end()
        self.signal_hub(signal.SIGKILL)
        self._stack.close()


@contextlib.contextmanager
def world(rng: random.Random, *, links: bool) -> Iterator[World]:
    made = World(rng, links=links)
    try:
        made.start_trainers()
        made.start_servers()
        yield made
    finally:
        made.close()
