"""The jobs that one hub serves: each has a coordinator and a rendezvous of its own, and knows of no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from weightbus.control import messages as m
from weightbus.control.rendezvous import Rendezvous
from weightbus.errors import ProtocolError
from weightbus.hub.coordinator import Coordinator
from weightbus.hub.members import Peer

# So many jobs at one hub. One that all have left is kept, with its last version, until its room is needed.
MAX_JOBS = 64

# What takes one kind of message: its connection, the message and the time; what to answer at once, if anything.
Handler = Callable[[bytes, Any, float], m.Message | None]


@dataclass(slots=True, kw_only=True)
class ServedJob:
    """One job. used: when somebody last joined it."""

    coordinator: Coordinator
    rendezvous: Rendezvous = field(default_factory=Rendezvous)
    used: float = 0.0

    @property
    def name(self) -> str:
        return self.coordinator.job

    @property
    def empty(self) -> bool:
        """Nobody is in it, and nobody waits for it."""
        coordinator = self.coordinator
        waits = len(coordinator.requests) or coordinator.tasks.running or coordinator.tasks.waiting
        return not (coordinator.roster.peers or coordinator.round or waits)


class Jobs:
    """All of them by name; the one without a name is always there."""

    def __init__(self, *, dead_after_s: float) -> None:
        self._dead_after_s = dead_after_s
        self._jobs: dict[str, ServedJob] = {}
        self.unnamed = self.open("", 0.0)

    def __iter__(self) -> Iterator[ServedJob]:
        return iter(list(self._jobs.values()))

    def get(self, name: str) -> ServedJob | None:
        return self._jobs.get(name)

    def find(self, name: str) -> ServedJob:
        """The job, or a new one that nobody has joined yet, and that is not kept."""
        return self._jobs.get(name) or ServedJob(
            coordinator=Coordinator(dead_after_s=self._dead_after_s, job=name)
        )

    def open(self, name: str, now: float) -> ServedJob:
        """The job, to join it. Raises ProtocolError where there are too many with ranks in them."""
        job = self._jobs.get(name)
        if job is None:
            if len(self._jobs) >= MAX_JOBS:
                left = [one for one in self._jobs.values() if one.empty and one.name]
                if not left:
                    raise ProtocolError(
                        f"job {name!r}: expected at most {MAX_JOBS} jobs at one hub, got one more"
                    )
                del self._jobs[min(left, key=lambda one: one.used).name]
            job = self._jobs[name] = self.find(name)
        job.used = now
        return job

    def serves(self, name: str) -> bool:
        """Whether what is asked of this job can be meant: nobody who has forgotten to name one gets another."""
        return name in self._jobs if name else self.unnamed.name in self.here or not self.here

    @property
    def here(self) -> list[str]:
        """Names of those that have ranks; empty for the one without."""
        return sorted(job.name for job in self._jobs.values() if job.coordinator.roster.peers)

    def of(self, peer: str) -> tuple[ServedJob, Peer] | None:
        """The job in which ``peer`` is, and the peer."""
        for job in self._jobs.values():
            if (found := job.coordinator.roster.peers.get(peer)) is not None:
                return job, found
        return None

    def cancel(self, identity: bytes, cancel: m.Cancel, now: float) -> m.Cancelled:
        """A trainer rank ends what waits. Raises ProtocolError for anybody else."""
        job = self._jobs.get(cancel.job)
        peer = job.coordinator.roster.peers.get(cancel.peer) if job else None
        if job is None or peer is None or peer.trainer is None:
            raise ProtocolError("cancel: expected a trainer rank of this hub's")
        return m.Cancelled(ended=job.coordinator.cancel(peer, cancel.reason, now))

    @property
    def peers(self) -> int:
        """How many ranks all of them have."""
        return sum(len(job.coordinator.roster.peers) for job in self._jobs.values())

    @property
    def stored(self) -> int:
        """Bytes in the rendezvous of all jobs."""
        return sum(job.rendezvous.nbytes for job in self._jobs.values())

    @property
    def is_empty(self) -> bool:
        return not any(job.coordinator.roster.peers for job in self._jobs.values())
