"""The coordinator and up to six ranks as a model: any order of messages, deaths, hub losses and rejoinings.

Ranks are as simple as ``Session`` is seen from the hub, with its own ``Rounds`` to tell what they take.
Whatever happens, a round has one end for all, and nobody is ready with what was not proved.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from test_protocol import fold

from weightbus.control import messages as m
from weightbus.control.rounds import Rounds
from weightbus.hub.blame import SYMPTOM_S
from weightbus.hub.coordinator import Coordinator
from weightbus.hub.recovery import FORMER_S, Rebuilt
from weightbus.hub.steps import End, Steps

PLACES = (
    ("trainer", 0, 0),
    ("trainer", 0, 1),
    *(("server", replica, rank) for replica in (0, 1) for rank in (0, 1)),
)
JOIN_S, READY_S, TRANSFER_S = 10.0, 5.0, 8.0


@dataclass(eq=False)
class Rank:
    """One process. inbox, outgoing: on the way from and to the hub. wrote: bytes of a round that goes on."""

    role: str
    replica: int
    rank: int
    process: str
    peer: str = ""
    rounds: Rounds = field(default_factory=lambda: Rounds(""))
    inbox: deque = field(default_factory=deque)
    outgoing: deque = field(default_factory=deque)
    open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    calls: int | None = None  # the version of its own call
    offer: m.Offer | None = None
    seed: bytes | None = None
    finished: bool = False
    unheard: bytes | None = None
    sealed: bytes | None = None
    ready: bytes | None = None  # the seed of what it serves; None: nothing, or a mixture
    version: int | None = None
    epoch: int = 0
    group: str = ""
    members: list = field(default_factory=list)

    def held(self):
        place = next((i for i, one in enumerate(self.members) if one.peer == m.member_id(self.peer)), 0)
        header = self.rounds.header
        return m.Held(
            incarnation=header.incarnation,
            epoch=self.epoch,
            place=place,
            members=len(self.members),
            group=self.group,
            version=self.version,
            sealed=self.sealed,
            verdict="verified",
            unheard=self.unheard,
            round=header.update,
        )

    def say(self, message):
        message.stamp(self.rounds.header)
        self.outgoing.append(message)


class Model(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.now, self.processes = 100.0, 0
        self.hub = Coordinator(dead_after_s=1e9)
        self.ranks = {}
        self.did, self.group, self.ends = (
            {},
            {},
            {},
        )  # by seed: what each member did, who they are, what was heard

    # -- a rank's part -------------------------------------------------------------------------------

    def start(self, place):
        self.processes += 1
        self.ranks[place] = Rank(*PLACES[place], process=f"p{self.processes}")
        self.join(self.ranks[place])

    def join(self, rank):
        if rank.peer in self.hub.roster.peers:
            return
        hello = m.Hello(
            process=rank.process, host="h", pid=1, device="cpu", role=rank.role, rank=rank.rank, size=2,
            replica=rank.replica, held=rank.held() if rank.members else None, start="s",
        )  # fmt: skip
        peer = self.hub.roster.admit(hello, f"{rank.process} at {id(self.hub)}", self.now)
        if isinstance(peer, m.Refused):
            return  # its place is held by a process whose death the hub does not know yet
        rank.peer = peer.id
        rank.rounds.joined(self.hub.header())
        self.hub.joined(peer, self.now)
        self.post()

    def post(self):
        """What the hub says lies in its ranks' inboxes."""
        peers = {rank.peer: rank for rank in self.ranks.values()}
        for peer, message in self.hub.outbox:
            if peer in peers:
                peers[peer].inbox.append(message)
        self.hub.outbox.clear()

    def hear_one(self, rank, how):
        message = rank.inbox.popleft()
        if not rank.rounds.accepts(message):
            if isinstance(message, m.Offer):
                self.decline(rank, message)
            return
        match message:
            case m.Offer():
                self.offered(rank, message)
            case m.Gathered(of="sources") if rank.role == "server":
                rank.say(m.Facts(peer=rank.peer, blob=b"wants"))
            case m.Gathered(of="wants"):
                rank.say(m.Ready(peer=rank.peer, plan="p"))
            case m.Go():
                rank.seed, rank.ready = message.seed, None
                self.group[message.seed] = {one.peer for one in rank.members}
                self.did.setdefault(message.seed, {})[m.member_id(rank.peer)] = how
                if how != "silent":
                    rank.finished = how in ("right", "wrong")
                    self.done(rank, how)
            case m.Detail():
                wrong = self.did[rank.seed].get(m.member_id(rank.peer)) == "wrong"
                sums = [m.TensorSums(job=0, group=0, sums={"w": (5 + wrong, 0)})]
                sends = rank.role == "trainer"
                rank.say(m.Sums(peer=rank.peer, sent=sums * sends, live=sums * (not sends)))
            case m.Outcome():
                if rank.offer is None and message.version not in (None, rank.calls):
                    return
                self.ended(rank, message)

    def done(self, rank, how):
        sends = rank.role == "trainer"
        sums = [fold(5 + (how == "wrong"))]
        error = {"error": "of its own", "symptom": "broadcast failed"}.get(how, "")
        done = m.Done(peer=rank.peer, error=error, symptom=how == "symptom")
        if not error:
            done.sent, done.live = sums * sends, sums * (not sends)
        rank.say(done)

    def offered(self, rank, offer):
        if rank.role == "trainer" and rank.offer is None and offer.version != rank.calls:
            self.decline(rank, offer)
            return
        if rank.offer is None:
            rank.open.enter_context(rank.rounds.within(offer))
        rank.offer = offer
        if offer.members:
            rank.members = offer.members
        rank.epoch, rank.group = offer.epoch, offer.group
        if offer.planned:
            rank.say(m.Ready(peer=rank.peer, plan="p"))
        elif rank.role == "trainer":
            rank.say(m.Facts(peer=rank.peer, blob=b"sources"))

    def decline(self, rank, offer):
        with rank.rounds.beside(offer):
            rank.say(m.Refuse(peer=rank.peer, reason="another round"))

    def ended(self, rank, outcome):
        seed, version = rank.seed, rank.offer.version if rank.offer else None
        if seed is not None:
            self.ends.setdefault(seed, set()).add(outcome.ok)
        if outcome.ok:
            rank.sealed, rank.version, rank.ready = seed, version, seed
        elif seed is not None:
            rank.group = ""
        self.over(rank)

    def over(self, rank):
        rank.open.close()
        rank.rounds.entered = rank.rounds.orphaned = False
        rank.calls = rank.offer = rank.seed = rank.unheard = None
        rank.finished = False

    def take(self, rank):
        message = rank.outgoing.popleft()
        if rank.peer not in self.hub.roster.peers or message.peer != rank.peer:
            return  # the server drops what unknown peers say
        if isinstance(message, m.Enter):
            self.hub.enter(message, self.now)
        else:
            self.hub.answer(message, self.now)
        self.post()

    def enter(self, rank, version):
        rank.calls = version
        rank.rounds.entered = True
        call = m.Enter(
            peer=rank.peer, kind="update", version=version, modules=None, verify=True, facts="f",
            settings=m.Settings(bucket_bytes=64),
            min_replicas=1, join_s=JOIN_S, ready_s=READY_S, transfer_s=TRANSFER_S,
        )  # fmt: skip
        rank.say(call)

    # -- what may happen -----------------------------------------------------------------------------

    @initialize(places=st.sampled_from([(0, 1, 2, 3), (0, 1, 2, 3, 4, 5)]))
    def begin(self, places):
        for place in places:
            self.start(place)

    place = st.integers(0, 5)
    how = st.sampled_from(["right"] * 3 + ["wrong", "error", "symptom", "silent"])

    @rule()
    def call(self):
        """The trainer's ranks call that are free, for what another waits for, else for a new version."""
        trainers = [rank for rank in self.ranks.values() if rank.role == "trainer"]
        waiting = [rank.calls for rank in trainers if rank.calls is not None]
        version = max([waiting[0]] if waiting else [rank.version or 0 for rank in trainers], default=0)
        for rank in trainers:
            if rank.calls is None and rank.offer is None and rank.peer in self.hub.roster.peers:
                self.enter(rank, version + (not waiting))

    @rule(place=place, how=how)
    def hear(self, place, how):
        if (rank := self.ranks.get(place)) and rank.inbox:
            self.hear_one(rank, how)

    @rule(place=place)
    def deliver(self, place):
        if (rank := self.ranks.get(place)) and rank.outgoing:
            self.take(rank)

    some = st.sets(place, max_size=5)

    @rule(steps=st.sampled_from([8, 2, 8, 1, 8, 4]), how=how, who=place, deaf=some, mute=st.none() | place)
    def go_on(self, steps, how, who, deaf, mute):
        """All go on, in their order; ``who`` does as is drawn, the others what is right. What ``deaf`` ranks
        would hear of an end, and what ``mute`` says, stays under way."""
        for _ in range(steps):
            for place, rank in self.ranks.items():
                while rank.inbox and not (place in deaf and isinstance(rank.inbox[0], m.Outcome)):
                    self.hear_one(rank, how if place == who else "right")
            for place, rank in self.ranks.items():
                while rank.outgoing and place != mute:
                    self.take(rank)

    @rule(place=place)
    def give_up(self, place):
        """An interrupt: the rank says so, and waits for the end."""
        rank = self.ranks.get(place)
        if rank and rank.peer in self.hub.roster.peers and (rank.offer or rank.calls is not None):
            rank.say(m.Refuse(peer=rank.peer, reason="interrupted"))

    @rule(place=place, noticed=st.booleans())
    def die(self, place, noticed):
        rank = self.ranks.pop(place, None)
        if rank is not None and noticed:
            self.drop(rank.peer)

    def drop(self, peer):
        if (gone := self.hub.roster.peers.get(peer)) is not None:
            self.hub.roster.remove(gone)
            self.hub.lost(gone, "died", self.now)
            self.post()

    @rule()
    def notice(self):
        """The hub notices who has died."""
        here = {rank.peer for rank in self.ranks.values()}
        for peer in [peer for peer in self.hub.roster.peers if peer not in here]:
            self.drop(peer)

    @rule(place=place)
    def restart(self, place):
        if place not in self.ranks:
            self.start(place)

    @rule()
    def lose_hub(self):
        """Nothing that was on the way arrives. Who has done its part waits for what a new hub learns."""
        self.hub = Coordinator(dead_after_s=1e9)
        for rank in self.ranks.values():
            rank.inbox.clear()
            rank.outgoing.clear()
            if rank.seed is not None and rank.finished:
                rank.unheard, rank.rounds.orphaned = rank.seed, True
            elif rank.offer is not None or rank.calls is not None:
                if rank.seed is not None:
                    rank.group = ""
                self.over(rank)

    @rule(deaf=some)
    def lost_at_the_end(self, deaf):
        """A hub is lost when some have heard how a round has ended, and others have not; then all come back."""
        self.call()
        self.go_on(8, "right", 0, deaf, None)
        self.lose_hub()
        for rank in self.ranks.values():
            self.join(rank)
        self.go_on(2, "right", 0, set(), None)

    @rule(place=place)
    def rejoin(self, place):
        if rank := self.ranks.get(place):
            self.join(rank)

    @rule(seconds=st.sampled_from((0.5, SYMPTOM_S, READY_S, TRANSFER_S + JOIN_S)))
    def wait(self, seconds):
        for _ in range(int(2 * seconds)):
            self.now += 0.5
            self.hub.advance(self.now)
        self.post()

    # -- what holds ----------------------------------------------------------------------------------

    @invariant()
    def one_end(self):
        for seed, ends in self.ends.items():
            assert len(ends) == 1, f"{seed.hex()[:8]} has ended in two ways"

    @invariant()
    def nothing_unproved_is_ready(self):
        for rank in self.ranks.values():
            if rank.ready is not None:
                did = self.did[rank.ready]
                assert set(did) == self.group[rank.ready], "a member has not done its part"
                assert set(did.values()) == {"right"}, f"ready after {did}"

    def teardown(self):
        """All come back, and the time of each deadline passes: each rank has heard an end, one for all."""
        for rank in self.ranks.values():
            self.join(rank)
        self.notice()
        for rank in self.ranks.values():
            self.join(rank)
        for _ in range(8):
            self.go_on(3, "right", 0, set(), None)
            self.wait(FORMER_S + TRANSFER_S + JOIN_S)
        assert self.hub.round is None
        self.one_end()
        self.nothing_unproved_is_ready()
        sealed = {rank.sealed for rank in self.ranks.values()}
        for rank in self.ranks.values():
            assert rank.peer in self.hub.roster.peers
            assert rank.offer is None or rank.unheard is not None, f"{rank} waits for an end"
            assert rank.unheard is None or rank.unheard not in sealed, f"{rank} has not heard of a commit"


bounded = settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    stateful_step_count=40,
    max_examples=int(os.environ.get("WEIGHTBUS_FUZZ", "200")),
)


@pytest.mark.timeout(300)
def test_in_any_order_a_round_has_one_end_and_nothing_unproved_is_ready():
    run_state_machine_as_test(Model, settings=bounded)


# -- planted faults --------------------------------------------------------------------------------

FIND = (Phase.explicit, Phase.generate)  # one is enough, however long


def _half(self, round, verdict, now, end=Coordinator._end):
    """The last member is not told."""
    end(self, round, verdict, now)
    if self.outbox and isinstance(self.outbox[-1][1], m.Outcome):
        self.outbox.pop()


def _unproved(self, round, now):
    return End("verified")


def _believes(self, seed, waiting, roster):
    return m.Outcome(ok=True, moved=True, verdict="verified")


PLANTED = {
    "one is not told": (Coordinator, "_end", _half),
    "sums are not compared": (Steps, "judge", _unproved),
    "a new hub believes in a commit": (Rebuilt, "_found", _believes),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name, monkeypatch):
    owner, method, planted = PLANTED[name]
    monkeypatch.setattr(owner, method, planted)
    found = settings(bounded, max_examples=20000, report_multiple_bugs=False, derandomize=True, phases=FIND)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Model, settings=found)
