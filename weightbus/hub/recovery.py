"""What a new hub learns from ranks that knew another: epoch, group, plans, and outcomes not heard.

A hub keeps nothing on disk. All that counts is known to the ranks, who bring it with their hello
(``messages.Held``): so a hub that was killed can be replaced, and nothing that was committed is lost.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import msgspec

from weightbus.control import messages as m
from weightbus.control.client_messages import Past, RankTimes
from weightbus.hub.members import Peer
from weightbus.hub.roster import Roster
from weightbus.hub.round import Round

# Of so many updates the hub can still say how they ended.
MAX_OUTCOMES = 16

# From the first rank of an earlier hub's group on, an update waits so long for the others of it.
FORMER_S = 3.0

Group = tuple[int, str, set[str]]


# What a rank says of an earlier hub's numbers is believed below this: there is room above.
MAX_HELD_NUMBER = 1 << 60
MAX_HELD_VERSION = 1 << 61


class Rebuilt:
    """What ranks have brought. All of it is forgotten with the rank that brought it, but for outcomes."""

    def __init__(self) -> None:
        self._outcomes: OrderedDict[bytes, m.Outcome] = OrderedDict()
        self._drawn: OrderedDict[bytes, None] = OrderedDict()
        self._waiting: dict[bytes, dict[str, Peer]] = {}
        self._sealed: dict[bytes, dict[str, Peer]] = {}
        self._former_until = 0.0

    def came(self, peer: Peer, now: float) -> None:
        """A rank has come; the first of an earlier hub's group sets how long the others are waited for."""
        if not self._former_until and peer.held is not None and peer.held.members:
            self._former_until = now + FORMER_S

    def awaits(self, roster: Roster, now: float) -> bool:
        """Whether members of an earlier hub's group, as the trainer's ranks know it, may be just coming: all
        have lost that hub at once, and none should miss an update by this."""
        if now >= self._former_until:
            return False
        known = [peer.held for peer in roster.trainers().values() if peer.held and peer.held.members]
        last = max(known, key=lambda held: held.epoch, default=None)
        if last is None:
            return False
        here = sum(peer.held is not None and peer.held.epoch == last.epoch for peer in roster.peers.values())
        return here < last.members

    def drawn(self, seed: bytes) -> None:
        """A seed of this hub's own: of its update no rank tells it anything."""
        self._drawn[seed] = None
        if len(self._drawn) > MAX_OUTCOMES:
            self._drawn.popitem(last=False)

    def ended(self, seed: bytes | None, outcome: m.Outcome) -> None:
        """An update that had begun to move bytes has ended."""
        if seed is not None:
            self._outcomes[seed] = outcome
            if len(self._outcomes) > MAX_OUTCOMES:
                self._outcomes.popitem(last=False)

    def left(self, peer: Peer) -> None:
        if (held := peer.held) is None:
            return
        for index, seed in ((self._waiting, held.unheard), (self._sealed, held.sealed)):
            if seed is not None and seed in index:
                index[seed].pop(peer.id, None)
                if not index[seed]:
                    del index[seed]

    def joined(self, peer: Peer, roster: Roster, job: str) -> list[tuple[str, m.Message]]:
        """Outcomes that can be told now to ranks that have not heard them."""
        if (held := peer.held) is None:
            return []
        for index, said in ((self._waiting, held.unheard), (self._sealed, held.sealed)):
            if said is not None:
                index.setdefault(said, {})[peer.id] = peer
        told: list[tuple[str, m.Message]] = []
        for seed in {seed for seed in (held.unheard, held.sealed) if seed is not None}:
            waiting = list(self._waiting.get(seed, {}).values())
            if not waiting:
                continue
            outcome = self._outcomes.get(seed) or self._found(seed, waiting, roster)
            if outcome is not None:
                self.ended(seed, outcome)
                for other in waiting:
                    assert other.held is not None  # noqa: S101 - it waits by what it held
                    del self._waiting[seed][other.id]
                    other.held.unheard = None
                    mine = msgspec.structs.replace(outcome)
                    # Of the round in which it waits, whoever has the hub's part in that now.
                    mine.stamp(m.Header(job, other.held.incarnation, other.held.epoch, other.held.round))
                    told.append((other.id, mine))
        return told

    def _found(self, seed: bytes, waiting: Sequence[Peer], roster: Roster) -> m.Outcome | None:
        """How an update of an earlier hub ended: committed, if any rank of its group has heard that it was."""
        if seed in self._drawn:
            return None
        peers = roster.peers.values()
        held = waiting[0].held
        assert held is not None  # noqa: S101 - it waits by what it held
        others = [peer.held for peer in self._sealed.get(seed, {}).values() if peer.held]
        sealed = next((other for other in others if _is_of(other, held)), None)
        if sealed is None and len([peer for peer in waiting if _is_of(peer.held, held)]) < held.members:
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
        if first is None or not first.group or first.members != len(peers) or first.epoch != last_epoch(peers):
            return None
        plans = set(first.plans)
        for place, peer in enumerate(peers):
            held = peer.held
            if held is None or (held.epoch, held.group, held.place) != (first.epoch, first.group, place):
                return None
            plans &= set(held.plans)
        return first.epoch, first.group, plans


def _is_of(one: m.Held | None, other: m.Held) -> bool:
    """Whether both name the same group, which only its members can, and a place in it."""
    if one is None or not one.group or one.place >= one.members:
        return False
    return (one.group, one.epoch, one.members) == (other.group, other.epoch, other.members)


def last_epoch(peers: Iterable[Peer]) -> int:
    """The highest epoch that any of these has been in; a new group's is above it."""
    epochs = [peer.held.epoch for peer in peers if peer.held]
    return max([epoch for epoch in epochs if epoch < MAX_HELD_NUMBER], default=0)


def last_version(roster: Roster, peer: Peer) -> int:
    """The last version that ``peer``, who has come, lets the hub know of; -1 if of none. What the trainer's
    ranks say is believed, and what servers say that are of a group with one of them."""
    trainers = [one.held for one in roster.trainers().values() if one.held]
    groups = {held.group for held in trainers if held.group}
    asked = roster.peers.values() if peer.trainer and groups else [peer]
    believed = [one.held for one in asked if one.held and one.held.group in groups]
    if peer.trainer and peer.held:
        believed.append(peer.held)
    versions = [held.version for held in believed if held.version is not None]
    return max([version for version in versions if version < MAX_HELD_VERSION], default=-1)


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
