"""By whose fault a round fails: who says so of itself, who has died, who stands still while others wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from weightbus.control import messages as m
from weightbus.hub.isolation import culprit
from weightbus.hub.members import Peer

# That a transfer has failed under a rank is often a death of another, which the hub may hear of later.
SYMPTOM_S = 3.0

# A main thread that has not looked for messages for so long stands still; its beats come every half second.
STILL_S = 1.5
WATCH_S = 0.25


@dataclass(slots=True)
class Blame:
    """Of one round. peers: who has failed by itself, with the reason. symptoms: of the others nobody knows why;
    since: the first. apart: whom each rank could not reach then.

    A rank that says so first has failed by itself, as what others then say may follow from it. A death is
    one in any case, and comes first, whenever it is heard.
    """

    peers: dict[str, str] = field(default_factory=dict)
    symptoms: bool = False
    since: float = 0.0
    apart: dict[str, set[str]] = field(default_factory=dict)
    deaths: int = 0
    away_s: float = 0.0  # for which the hub itself has stood still
    _ticked: float = 0.0
    _watched: float = 0.0
    _looks: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether something has failed, and nobody has by itself so far."""
        return self.symptoms and not self.peers

    def symptom(self, peer: str, apart: Iterable[int], members: Sequence[str], now: float) -> None:
        """A transfer has failed under a rank. apart: as of ``Done``."""
        self.symptoms, self.since = True, self.since or now
        if ends := {members[place] for place in apart if place < len(members)} - {peer}:
            self.apart[peer] = ends

    def own(self, peers: Iterable[str], reason: str) -> None:
        if not self.peers:
            self.peers = dict.fromkeys(peers, reason)

    def died(self, peer: str, reason: str) -> None:
        self.peers[peer] = reason
        self.deaths += 1

    def replicas(self, members: dict[str, m.Member]) -> dict[int, str]:
        """Those to do without; none where a trainer rank has failed."""
        return {
            replica: reason
            for peer, reason in self.peers.items()
            if culprit(members, self.peers)
            for replica in culprit(members, [peer])
        }

    def tick(self, now: float) -> float:
        """For how long the hub itself stood still since it was last here, as one that was stopped; else 0, and
        after the first time."""
        gap, self._ticked = now - (self._ticked or now), now
        gap = gap if gap > STILL_S else 0.0
        first = not self.away_s
        if gap:
            self.away_s += gap
            self._looks.clear()
        return gap if first else 0.0

    def is_due(self, now: float) -> bool:
        """Whether to ``watch`` again."""
        return now - self._watched >= WATCH_S

    def watch(self, waited_for: Iterable[Peer], now: float) -> None:
        """Whose main threads have looked for messages meanwhile."""
        self._watched = now
        for peer in waited_for:
            if self._looks.get(peer.id, (-1, 0.0))[0] != peer.looks:
                self._looks[peer.id] = peer.looks, now

    def all_look(self, waited_for: Iterable[str], now: float) -> bool:
        """Whether the main threads of all these are known to look for messages."""
        return all(id in self._looks and now - self._looks[id][1] <= STILL_S for id in waited_for)

    def all_still(self, waited_for: Iterable[str], now: float) -> bool:
        """Whether the main threads of all these are known to stand still."""
        return all(id in self._looks and now - self._looks[id][1] > STILL_S for id in waited_for)

    def still(self, waited_for: Iterable[str], now: float) -> dict[str, float]:
        """Of the ranks that are waited for, those whose main thread looks for no message, and for how long:
        the others wait for these. All of them, with 0, where that is not known."""
        waited_for = list(waited_for)
        since = {id: now - self._looks[id][1] for id in waited_for if id in self._looks}
        still = {id: seconds for id, seconds in since.items() if seconds > STILL_S}
        told = still and len(still) < len(waited_for)
        return still if told else dict.fromkeys(waited_for, 0.0)
