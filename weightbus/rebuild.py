"""What a new hub learns from ranks that knew another: epoch, group, plans, and outcomes not heard.

A hub keeps nothing on disk. All that counts is known to the ranks, who bring it with their hello
(``messages.Held``): so a hub that was killed can be replaced, and nothing that was committed is lost.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from weightbus import messages as m
from weightbus.asks import Past, RankTimes
from weightbus.roster import Peer, Roster

if TYPE_CHECKING:
    from weightbus.protocol import Round

# Of so many updates the hub can still say how they ended.
MAX_OUTCOMES = 16

Group = tuple[int, str, set[str]]


class Rebuilt:
    """epoch: the highest that any rank has been in; a new group's is above it."""

    def __init__(self) -> None:
        self.epoch = 0
        self._outcomes: OrderedDict[bytes, m.Outcome] = OrderedDict()

    def ended(self, seed: bytes | None, outcome: m.Outcome) -> None:
        """An update that had begun to move bytes has ended."""
        if seed is not None:
            self._outcomes[seed] = outcome
            if len(self._outcomes) > MAX_OUTCOMES:
                self._outcomes.popitem(last=False)

    def joined(self, peer: Peer, roster: Roster, job: str) -> list[tuple[str, m.Message]]:
        """Outcomes that can be told now to ranks that have not heard them."""
        if (held := peer.held) is None:
            return []
        self.epoch = max(self.epoch, held.epoch)
        told: list[tuple[str, m.Message]] = []
        for seed in {held.unheard, held.sealed} - {None}:
            assert seed is not None
            waiting = [p for p in roster.peers.values() if p.held and p.held.unheard == seed]
            outcome = self._outcomes.get(seed) or self._found(seed, waiting, roster)
            if outcome is not None:
                self.ended(seed, outcome)
                for other in waiting:
                    assert other.held is not None
                    other.held.unheard = None
                    mine = msgspec.structs.replace(outcome)
                    # Of the round in which it waits, whoever has the hub's part in that now.
                    mine.stamp(m.Header(job, other.held.incarnation, other.held.epoch, other.held.round))
                    told.append((other.id, mine))
        return told

    def _found(self, seed: bytes, waiting: Sequence[Peer], roster: Roster) -> m.Outcome | None:
        """How an update of an earlier hub ended: committed, if any rank has heard that it was."""
        peers = roster.peers.values()
        sealed = next((p.held for p in peers if p.held and p.held.sealed == seed), None)
        if sealed is None:
            held = waiting[0].held if waiting else None
            if held is None or len(waiting) < held.members:
                return None
        reason = "it was lost before it had told any rank of a decision"
        return m.Outcome(
            ok=sealed is not None,
            moved=True,
            verdict=sealed.verdict if sealed else "failed",
            failures=[] if sealed else [m.Failure(rank="hub", tensor=None, reason=reason)],
            trainers=len(roster.trainers()),
            replicas=roster.complete(),
            servers=sum(p.server is not None for p in peers),
        )

    def group(self, peers: Sequence[Peer]) -> Group | None:
        """Epoch, token and plans of a group that has outlived its hub: all of it is here, in its order."""
        first = peers[0].held
        if first is None or not first.group or first.epoch < self.epoch or first.members != len(peers):
            return None
        plans = set(first.plans)
        for place, peer in enumerate(peers):
            held = peer.held
            if held is None or (held.epoch, held.group, held.place) != (first.epoch, first.group, place):
                return None
            plans &= set(held.plans)
        return first.epoch, first.group, plans


def past_of(round: Round, outcome: m.Outcome, began: float) -> Past:
    """The record of a round for status and timeline. began: as time.time() is."""
    answered: dict[str, dict[str, float]] = {}
    for (peer, phase), when in round.answered.items():
        answered.setdefault(peer, {})[phase.name] = when - round.started
    offered = min(round.phases.values(), default=0.0)
    times = []
    for peer, member in round.members.items():
        done = round.dones.get(peer)
        starts = {stage: offered + start for stage, start in done.starts.items()} if done else {}
        times.append(
            RankTimes(
                rank=str(member),
                ready_s=answered.get(peer, {}).get("READY"),
                done_s=answered.get(peer, {}).get("RUN"),
                starts=starts,
                stages=done.stages if done else {},
            )
        )
    return Past(
        kind=round.enter.kind,
        version=round.enter.version,
        epoch=outcome.epoch,
        planned=bool(round.offer and round.offer.planned),
        began=began,
        seconds=outcome.seconds,
        verdict=outcome.verdict,
        nbytes=max((done.nbytes for done in round.dones.values()), default=0),
        servers=outcome.servers,
        failures=outcome.failures[:8],
        phases=round.phases,
        ranks=times,
    )
