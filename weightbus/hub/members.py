"""A member of a job as the hub knows it, and one start of the trainer."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from weightbus.control import messages as m

# So many ranks are named where others are missing; of the rest there is a number.
LISTED = 8

# What a rank brings from an earlier hub as incarnation is believed below this: there is room above.
MAX_HELD_INCARNATION = 1 << 60


@dataclass(slots=True, kw_only=True, eq=False)
class Start:
    """One start of the trainer job. token: what its ranks share; empty where they know of nothing.

    places: of each rank's place, the process that has taken it. A start is one set of processes: whoever else
    asks for the place is of another.
    """

    incarnation: int
    token: str
    places: dict[int, tuple[str, int, float]] = field(default_factory=dict)

    def fits(self, hello: m.Hello, *, here: bool) -> bool:
        """Whether the rank that says hello is of this start. here: some rank of it is."""
        held = hello.held.incarnation if hello.held else 0
        process = _process(hello)
        if held not in (0, self.incarnation) or self.places.get(hello.rank, process) != process:
            return False
        if self.token and hello.start:
            return self.token == hello.start
        # Nothing but the places tells them apart: where all have gone, who comes is of another, unless known.
        return here or hello.rank in self.places or held == self.incarnation


def _process(hello: m.Hello) -> tuple[str, int, float]:
    return hello.host, hello.pid, hello.started


@dataclass(slots=True, kw_only=True)
class Peer:
    """One process. It may be a trainer rank, a server rank, or both."""

    id: str
    process: str
    host: str
    pid: int
    heard: float
    started: float = 0.0
    start: Start | None = None
    roles: dict[str, m.Hello] = field(default_factory=dict)
    held: m.Held | None = None
    state: m.State = ""
    version: int | None = None
    stale: int = 0
    looks: int = 0

    @property
    def trainer(self) -> m.Hello | None:
        return self.roles.get("trainer")

    @property
    def server(self) -> m.Hello | None:
        return self.roles.get("server")

    def member(self) -> m.Member:
        server = self.server
        return m.Member(
            peer=self.id,
            trainer=self.trainer.rank if self.trainer else None,
            server=m.ServerId(replica=server.replica, rank=server.rank) if server else None,
            host=self.host,
            pid=self.pid,
            started=self.started,
        )

    def __str__(self) -> str:
        return process_text(self.member())


def process_text(member: m.Member) -> str:
    """A rank, and which process it is."""
    began = f", started {time.strftime('%F %T', time.localtime(member.started))}" if member.started else ""
    return f"{member} (pid {member.pid} on {member.host}{began})"


def some(numbers: Iterable[int]) -> str:
    """A list of numbers for people to read, cut where it is long."""
    listed = sorted(numbers)
    return f"{listed[:LISTED]}" + (f" and {len(listed) - LISTED} more" if len(listed) > LISTED else "")
