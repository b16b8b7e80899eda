"""Replicas that updates do without for a while: those by whose fault one has failed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from weightbus.control import messages as m
from weightbus.hub.roster import Roster

# A replica is left out for so long after its first failure in a row, and twice as long after each further one.
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0


@dataclass(slots=True, kw_only=True)
class _LeftOut:
    """reason: of its last failure. until: when it may be tried again.

    looks: how often each rank's main thread had looked for messages; one that has not done so since is stuck.
    """

    reason: str
    failures: int = 0
    until: float = 0.0
    looks: dict[str, int] = field(default_factory=dict)


class Isolation:
    """Of one job. A replica's failures in a row count; a commit, or another process in it, ends them."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._out: dict[int, _LeftOut] = {}

    def blame(self, replica: int, reason: str, now: float) -> None:
        """An update has failed by this replica's fault."""
        out = self._out.setdefault(replica, _LeftOut(reason=reason))
        out.reason, out.failures = reason, out.failures + 1
        out.until = now + min(FIRST_PAUSE_S * 2 ** (out.failures - 1), LONGEST_PAUSE_S)
        out.looks = {peer.id: peer.looks for peer in self._roster.replicas().get(replica, {}).values()}

    def forgive(self, replicas: Iterable[int]) -> None:
        """They have taken part in a commit, or one of their processes has gone."""
        for replica in replicas:
            self._out.pop(replica, None)

    def left_out(self, min_replicas: int, now: float) -> dict[int, str]:
        """Those to do without now, each with the reason; none where too few others would be left."""
        complete = self._roster.complete()
        found = {replica: self._out[replica].reason for replica in complete if self.is_out(replica, now)}
        return found if len(complete) - len(found) >= min_replicas else {}

    def is_out(self, replica: int, now: float) -> bool:
        """Whether it is not to be tried now."""
        out = self._out.get(replica)
        if out is None:
            return False
        peers = self._roster.replicas()[replica].values()
        return now < out.until or any(peer.looks <= out.looks.get(peer.id, -1) for peer in peers)


def culprit(members: dict[str, m.Member], peers: Iterable[str]) -> set[int]:
    """Replicas that these peers are server ranks of; nothing where one of them is a trainer rank."""
    found = [members[peer] for peer in peers if peer in members]
    if any(member.trainer is not None for member in found):
        return set()
    return {member.server.replica for member in found if member.server}
