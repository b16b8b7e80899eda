"""Server ranks that wait for a version (``Subscriber.wait``): one end for all ranks of a replica.

What ends a wait is an outcome of which these ranks are members, and which they hear themselves; else the hub
tells them: that the trainer refused, cancelled, died, or did without them, or that the time is over. Of both,
what a rank hears first counts, and all ranks of a replica hear them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from weightbus.control import messages as m
from weightbus.control.patience import Patience
from weightbus.hub.members import Peer
from weightbus.hub.roster import Roster

# A rank that comes later to a wait that has ended for the others hears the same for so long.
LATE_S = 10.0


@dataclass(slots=True, kw_only=True)
class _Wait:
    """Of one replica. peers: who waits, by the number of its call. why: it ends with this as soon as its ranks
    follow no round. end: how it ended, for those who come later; until then ``deadline`` is when it does."""

    version: int
    patience: Patience
    deadline: float
    peers: dict[str, int] = field(default_factory=dict)
    why: list[m.Failure] = field(default_factory=list)
    end: m.Waited | None = None


class Waits:
    """Of one job. outbox: (peer, message) for ranks; header: of what is of no round."""

    def __init__(
        self, roster: Roster, outbox: list[tuple[str, m.Message]], header: Callable[[], m.Header]
    ) -> None:
        self._roster, self._outbox, self._header = roster, outbox, header
        self._waits: dict[int, _Wait] = {}

    @property
    def any(self) -> bool:
        """Whether there are waits, or ends to tell to those who come later."""
        return bool(self._waits)

    def __len__(self) -> int:
        return sum(wait.end is None for wait in self._waits.values())

    def ask(self, ask: m.Await, now: float) -> None:
        """A server rank begins to wait."""
        server = self._roster.peers[ask.peer].server
        if server is None:
            return
        if ask.of == self._roster.incarnation and ask.holds is not None and ask.holds >= ask.version:
            self._say(ask.peer, m.Waited(number=ask.number, ok=True))
            return
        wait = self._waits.get(server.replica)
        if wait is None or (wait.end is not None and (ask.peer in wait.peers or ask.version != wait.version)):
            wait = _Wait(version=ask.version, patience=Patience(now), deadline=now + ask.wait_s)
            self._waits[server.replica] = wait
        if wait.end is not None:
            self._tell(server.replica, wait, ask.peer, ask.number)
            return
        wait.peers[ask.peer] = ask.number
        if ask.version != wait.version:
            reason = (
                f"wait: expected version {wait.version} as on the first rank that called, got {ask.version}"
            )
            self._stop(wait, [_failure(str(self._roster.peers[ask.peer]), reason)])
        if self._roster.incarnation and not self._roster.has_trainers:
            self._stop(wait, [_failure("trainer", "all ranks have left or died, and none has joined since")])

    def stop(self, rank: str, reason: str) -> bool:
        """All waits end, each as soon as its ranks follow no round; whether there are any."""
        for wait in self._waits.values():
            self._stop(wait, [_failure(rank, reason)])
        return len(self) > 0

    def settle(self, version: int, outcome: m.Outcome, replicas: Container[int], now: float) -> None:
        """An update has ended, as the ranks of these replicas are told; its outcome is their waits' end."""
        for replica, wait in list(self._waits.items()):
            if wait.end is not None or version < wait.version or (outcome.again and not outcome.ok):
                continue
            if replica not in replicas:
                without = outcome.left_out.get(replica, "not all of its ranks were there")
                text = f"version {version} was committed without it: {without}"
                self._stop(wait, [_failure(f"replica {replica}", text)] if outcome.ok else outcome.failures)
            elif outcome.ok:
                del self._waits[replica]  # who comes later holds it
            else:
                # A rank that has not looked yet takes no part in a round that is over, and hears this only.
                end = m.Waited(number=0, ok=False, moved=outcome.moved, failures=outcome.failures)
                self._end(replica, wait, end, now)

    def lost(self, peer: Peer, reason: str) -> None:
        """A server rank has gone: its replica is no whole one any more."""
        if peer.server is None or (wait := self._waits.get(peer.server.replica)) is None:
            return
        wait.peers.pop(peer.id, None)
        self._stop(wait, [_failure(str(peer), reason)])

    def advance(
        self, now: float, busy: Container[int], missing: Callable[[], Sequence[tuple[str, str]]]
    ) -> None:
        """End those whose time is over. busy: replicas whose ranks follow a round. missing: what that waits
        for."""
        for replica, wait in list(self._waits.items()):
            if wait.end is not None:
                if now >= wait.deadline:
                    del self._waits[replica]
                continue
            waited_s = now - wait.patience.since
            if replica not in busy and wait.patience.is_over(now):
                lines = [f"{who}: {what}"[:1000] for who, what in missing()] or [
                    "trainer: has called no update"
                ]
                told = m.Missing(
                    what=f"wait for version {wait.version}", waited_s=waited_s, lines=lines[: m.MAX_MISSING]
                )
                for peer in wait.peers:
                    self._say(peer, told)
            if replica in busy or not (wait.why or now >= wait.deadline):
                continue
            if not wait.why:
                text = f"no update to version {wait.version} or later in {waited_s:.1f} s"
                wait.why = [_failure("trainer", text), *(_failure(*one) for one in missing())]
            self._end(replica, wait, m.Waited(number=0, ok=False, failures=wait.why), now)

    def _end(self, replica: int, wait: _Wait, end: m.Waited, now: float) -> None:
        wait.end, wait.deadline = end, now + LATE_S
        waiting, wait.peers = wait.peers, {}
        for peer, number in waiting.items():
            self._tell(replica, wait, peer, number)

    def _tell(self, replica: int, wait: _Wait, peer: str, number: int) -> None:
        assert wait.end is not None  # noqa: S101 - for mypy
        wait.peers[peer] = number
        end = wait.end
        self._say(peer, m.Waited(number=number, ok=end.ok, moved=end.moved, failures=end.failures))

    def _say(self, peer: str, message: m.Waited | m.Missing) -> None:
        message.stamp(self._header())
        self._outbox.append((peer, message))

    @staticmethod
    def _stop(wait: _Wait, why: list[m.Failure]) -> None:
        if wait.end is None:
            wait.why = wait.why or why


def _failure(rank: str, reason: str) -> m.Failure:
    return m.Failure(rank=rank, tensor=None, reason=reason)
