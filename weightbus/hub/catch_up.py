"""Replicas that have joined, were left out or are torn get the committed version from another replica.

A catch-up is a round between updates, of two replicas: the donor's ranks are its sources, the joiner's its
targets. It digests under the committed update's seed. The hub has kept what the trainer's ranks then digested
for each set of boxes, and compares with that: nothing that a donor says counts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from weightbus.control import messages as m
from weightbus.hub.compare import Pair, sums_text, total
from weightbus.hub.isolation import Isolation
from weightbus.hub.members import Peer
from weightbus.hub.roster import Roster

log = logging.getLogger("weightbus.hub")

# After a round, or a rank's coming, an update may begin within so long, and serves the replica as well.
QUIET_S = 1.0

# What a beat says counts so long after a round, when those that were under way have come.
BEATS_S = 0.6

# How often the hub looks whether a replica lacks something.
LOOK_S = 0.25

# Engines are asked for so long whether they can; a donor that works does not look.
READY_S = 5.0

# A replica whose catch-up has failed is tried again after a pause that doubles, so often.
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0
TRIES = 8


@dataclass(slots=True, kw_only=True)
class Sealed:
    """The committed version, as far as it can be proved again: of all modules, by one update, verified.

    sums: by ``wants_id``, the group that wants these boxes, the trainer's digest for it, and how many bytes.
    holders: replicas that have it.
    """

    enter: m.Enter
    incarnation: int
    version: int
    plan: str
    seed: bytes
    sums: dict[str, tuple[int, Pair, int]]
    holders: set[int]


@dataclass(slots=True)
class _Failed:
    times: int = 0
    until: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """Which replica gives the version to which; peers in the order of group ranks, and as members."""

    donor: int
    joiner: int
    enter: m.Enter
    members: dict[str, m.Member]


@dataclass(slots=True)
class CatchUp:
    """Of one job: what is committed, who needs it, and who may give it.

    touched: replicas whose weights somebody else has set since; they stay as they are, and give nothing.
    """

    roster: Roster
    isolation: Isolation
    touched: set[int]
    sealed: Sealed | None = None
    _wants: dict[str, dict[int, str]] = field(default_factory=dict)  # by plan and group
    _behind: set[int] = field(default_factory=set)
    _failed: dict[int, _Failed] = field(default_factory=dict)

    # -- what is committed -------------------------------------------------------------------------

    def surveyed(self, plan: str, wants: Mapping[int, str]) -> None:
        """A plan is made: which group wants what. Plans are of one epoch, and forgotten with it."""
        self._wants[plan] = dict(wants)

    def forget_plans(self) -> None:
        self._wants.clear()

    def committed(
        self,
        enter: m.Enter,
        incarnation: int,
        offer: m.Offer,
        seed: bytes | None,
        members: Mapping[str, m.Member],
        dones: Mapping[str, m.Done],
    ) -> None:
        """An update has been committed on these members."""
        took_part = {member.server.replica for member in members.values() if member.server}
        self._behind = (self._behind | set(self.roster.replicas())) - took_part
        self.touched -= took_part
        for replica in took_part:
            self._failed.pop(replica, None)
        wants = self._wants.get(offer.plan, {})
        self.sealed = None
        if not (enter.catch_up and enter.verify and enter.modules is None and seed is not None and wants):
            return
        sent: dict[int, list[m.Fold]] = {}
        for done in dones.values():
            for fold in done.sent:
                sent.setdefault(fold.group, []).append(fold)
        sums = {
            wants_id: (group, total(fold.sums for fold in folds), sum(fold.nbytes for fold in folds))
            for group, wants_id in wants.items()
            for folds in [sent.get(group, [])]
        }
        self.sealed = Sealed(
            enter=enter,
            incarnation=incarnation,
            version=enter.version,
            plan=offer.plan,
            seed=seed,
            sums=sums,
            holders=took_part,
        )

    def labelled(self, version: int) -> None:
        if self.sealed is not None:
            self.sealed.version = version

    def left(self, peer: Peer) -> None:
        """A server rank has gone; another process in its place may do better, and holds nothing."""
        if peer.server is not None:
            replica = peer.server.replica
            self._failed.pop(replica, None)
            self.touched.discard(replica)
            if self.sealed is not None:
                self.sealed.holders.discard(replica)

    # -- who needs it, and who gives it ------------------------------------------------------------

    def needs(self, replica: int, since: float = -math.inf) -> bool:
        """Whether a whole replica holds something else than the committed version, as beats have said since."""
        assert self.sealed is not None  # noqa: S101 - asked where something is committed
        peers = self.roster.replicas()[replica].values()
        if replica in self.touched or any(peer.trainer or peer.heard < since for peer in peers):
            return False
        states = {peer.state for peer in peers}
        if not states <= {"empty", "ready", "torn"}:
            return False  # it is just doing something, or has not said
        others = any(peer.version != self.sealed.version for peer in peers)
        return replica in self._behind or states != {"ready"} or others

    def holds(self, replica: int) -> bool:
        """Whether a whole replica may give the committed version to others."""
        there = replica in self.roster.complete() and replica not in self.touched
        return there and all(peer.state == "ready" for peer in self.roster.replicas()[replica].values())

    def lacking(self, since: float, now: float) -> list[int]:
        """Replicas that are to be brought up now. since: when beats count from."""
        if self.sealed is None or self.sealed.incarnation != self.roster.incarnation:
            return []
        return [
            replica
            for replica in self.roster.complete()
            if self.needs(replica, since)
            and not self.isolation.is_out(replica, now)
            and (failed := self._failed.get(replica, _Failed())).until <= now
            and failed.times < TRIES
        ]

    def pair(self, lacking: Iterable[int]) -> Pairing | None:
        """The next catch-up, if a donor is there."""
        for joiner in lacking:
            assert self.sealed is not None  # noqa: S101 - else nothing is lacking
            donors = [donor for donor in sorted(self.sealed.holders - {joiner}) if self.holds(donor)]
            if donors:
                turn = self._failed.get(joiner, _Failed()).times  # one that does not look is not asked again
                return self._pairing(self.sealed, donors[turn % len(donors)], joiner)
        return None

    def _pairing(self, sealed: Sealed, donor: int, joiner: int) -> Pairing:
        replicas = self.roster.replicas()
        members: dict[str, m.Member] = {}
        for place, (_, peer) in enumerate(sorted(replicas[donor].items())):
            member = peer.member()
            member.donor, member.server, member.trainer = member.server, None, place
            members[peer.id] = member
        for _, peer in sorted(replicas[joiner].items()):
            members[peer.id] = peer.member()
        enter = m.Enter(
            peer="",
            kind="catch_up",
            version=sealed.version,
            modules=None,
            verify=True,
            facts="",
            settings=sealed.enter.settings,
            min_replicas=1,
            join_s=READY_S,
            ready_s=min(READY_S, sealed.enter.ready_s),
            transfer_s=sealed.enter.transfer_s,
            jobs=[m.Job(version=sealed.version, plan=sealed.plan, seed=sealed.seed, modules=None)],
            repeats=False,
        )
        return Pairing(donor=donor, joiner=joiner, enter=enter, members=members)

    def unknown(self, wants: Mapping[str, str]) -> list[str]:
        """Peers whose boxes nobody held when the version was committed. wants: ``wants_id`` of each."""
        assert self.sealed is not None  # noqa: S101 - in a catch-up
        return [peer for peer, wants_id in wants.items() if wants_id not in self.sealed.sums]

    def group(self, wants_id: str) -> int:
        """The committed update's group that wanted the same boxes."""
        assert self.sealed is not None  # noqa: S101 - in a catch-up
        return self.sealed.sums[wants_id][0]

    def wrong(self, wants: Mapping[str, str], dones: Mapping[str, m.Done]) -> dict[str, str]:
        """Peers that do not hold what was committed, and why. wants: ``wants_id`` of each server rank."""
        assert self.sealed is not None  # noqa: S101 - in a catch-up
        found = {}
        for peer, wants_id in wants.items():
            _, expected, nbytes = self.sealed.sums[wants_id]
            live = dones[peer].live
            if [(fold.sums, fold.nbytes) for fold in live] != [(expected, nbytes)]:
                got = f"{sums_text(live[0].sums)} of {live[0].nbytes} bytes" if live else "none"
                text = f"expected digest {sums_text(expected)} of {nbytes} bytes, as the trainer's when version"
                found[peer] = f"{text} {self.sealed.version} was committed, got {got} of what a donor gave"
        return found

    def ended(self, pairing: Pairing, why: str, now: float, *, broken_off: bool) -> None:
        """why: it has failed; empty if the joiner holds the version now. broken_off: by an update."""
        joiner = pairing.joiner
        if not why:
            self._behind.discard(joiner)
            self._failed.pop(joiner, None)
            if self.sealed is not None:
                self.sealed.holders.add(joiner)
        elif not broken_off:
            failed = self._failed.setdefault(joiner, _Failed())
            failed.until = now + min(FIRST_PAUSE_S * 2**failed.times, LONGEST_PAUSE_S)
            failed.times += 1
            end = "it waits for the next update" if failed.times >= TRIES else "it is tried again"
            log.warning(
                "replica %d has not caught up with version %d: %s; %s", joiner, pairing.enter.version, why, end
            )
