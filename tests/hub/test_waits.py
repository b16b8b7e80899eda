"""Ranks that wait for a version, in any interleaving with rounds, cancels and deaths: one end for a replica."""

from __future__ import annotations

import os
from collections import deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from weightbus.control import messages as m
from weightbus.hub import coordinator as coordinators
from weightbus.hub.coordinator import Coordinator
from weightbus.hub.waits import LATE_S, Waits

TRAINERS = ("t0", "t1")
REPLICAS = {0: ("s0", "s1"), 1: ("s2",)}
SERVERS = tuple(rank for ranks in REPLICAS.values() for rank in ranks)
FOLD = [m.Fold(job=0, group=0, sums=(3, 4), nbytes=8, due=8)]


class Rank:
    """One rank as ``Session`` and ``wait_for`` have it: what it has not looked at, and what it is in."""

    def __init__(self, name):
        self.name = name
        self.inbox = deque()
        self.round = None
        self.wait = self.waited = None  # (version, number), once it has been called here; the end, once heard
        self.calls = 0
        self.holds = (None, 0)
        self.ends = []
        self.called = False


class Replicas(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.hub = Coordinator(dead_after_s=1e9)
        self.now = 100.0
        self.ranks = {name: Rank(name) for name in (*TRAINERS, *SERVERS)}
        self.pending = {}  # by server rank: the call that its engine has made, and it has not begun
        self.begun = {}  # by replica: when the call was made, its version and its time
        self.version = 0
        for rank, name in enumerate(TRAINERS):
            self.join(name, "trainer", rank, 2, 0)
        for replica, names in REPLICAS.items():
            for rank, name in enumerate(names):
                self.join(name, "server", rank, len(names), replica)

    def join(self, name, role, rank, size, replica):
        hello = m.Hello(
            process=name,
            host="h",
            pid=1,
            device="cpu",
            role=role,
            rank=rank,
            size=size,
            replica=replica,
            start="x",
        )
        self.hub.joined(self.hub.roster.admit(hello, name, self.now), self.now)
        self.deliver()

    def deliver(self):
        for name, message in self.hub.outbox:
            if name in self.ranks:
                self.ranks[name].inbox.append(message)
        self.hub.outbox.clear()

    def say(self, rank, message, header):
        message.peer = rank.name
        message.stamp(header)
        if rank.name in self.hub.roster.peers:
            self.hub.answer(message, self.now)
            self.deliver()

    # -- what may happen ---------------------------------------------------------------------------

    @rule(
        replica=st.sampled_from(tuple(REPLICAS)),
        ahead=st.integers(0, 2),
        wait_s=st.sampled_from((0.0, 3.0, 50.0)),
    )
    def call(self, replica, ahead, wait_s):
        """An engine tells all its ranks to wait, if none waits already; each begins when it comes to it."""
        names = REPLICAS[replica]
        free = not any(name in self.pending or self.ranks[name].wait for name in names)
        if free and all(name in self.hub.roster.peers for name in names):
            self.begun[replica] = self.now
            self.pending |= dict.fromkeys(names, (self.version + ahead, wait_s))

    @rule(name=st.sampled_from(SERVERS))
    def begin(self, name):
        if name in self.pending:
            rank = self.ranks[name]
            (version, wait_s), rank.calls = self.pending.pop(name), rank.calls + 1
            rank.wait = version, rank.calls
            ask = m.Await(
                peer=name,
                number=rank.calls,
                version=version,
                wait_s=wait_s,
                holds=rank.holds[0],
                of=rank.holds[1],
            )
            self.say(rank, ask, self.hub.header())

    @rule(name=st.sampled_from(TRAINERS), refuse=st.booleans())
    def update(self, name, refuse):
        if name in self.hub.roster.peers and not self.ranks[name].called:
            self.ranks[name].called = True
            enter = m.Enter(
                peer=name, kind="update", version=self.version + 1, modules=None, verify=True, facts="f",
                settings=m.Settings(bucket_bytes=64), min_replicas=1, join_s=20.0, ready_s=5.0, transfer_s=20.0,
                refusal="no" * refuse, repeats=False,
            )  # fmt: skip
            self.hub.enter(enter, self.now)
            self.deliver()

    @rule(name=st.sampled_from(TRAINERS))
    def cancel(self, name):
        if peer := self.hub.roster.peers.get(name):
            self.hub.cancel(peer, "on a whim", self.now)
            self.deliver()

    @rule(name=st.sampled_from(("t1", "s2")))
    def die(self, name):
        if peer := self.hub.roster.peers.get(name):
            self.hub.roster.remove(peer)
            self.hub.lost(peer, "died", self.now)
            self.deliver()
            del self.ranks[name]
            self.ranks[name] = Rank(name)
            self.pending.pop(name, None)

    @rule(name=st.sampled_from(SERVERS))
    def hurry(self, name):
        rank = self.ranks[name]
        if rank.round is not None:
            self.say(rank, m.Later(peer=name), rank.round.header)

    @rule(seconds=st.sampled_from((0.1, 1.5, 4.0)))
    def time_goes_on(self, seconds):
        """All ranks beat. An engine's ranks begin within less than LATE_S of each other."""
        for name in list(self.pending):
            if self.now + seconds - self.begun[self.replica_of(name)] > LATE_S / 2:
                self.begin(name)
        self.now += seconds
        for name, peer in self.hub.roster.peers.items():
            peer.heard = self.now
            peer.state = "updating" if self.ranks[name].round is not None else "ready"
        self.hub.advance(self.now)
        self.deliver()

    @rule(name=st.sampled_from((*TRAINERS, *SERVERS)))
    def look(self, name):
        """The rank acts upon the next message, if it is in a call that does."""
        rank = self.ranks[name]
        if rank.inbox and (rank.called or rank.wait or rank.round):
            self.act(rank, rank.inbox.popleft())

    # -- what a rank does --------------------------------------------------------------------------

    @staticmethod
    def replica_of(name):
        return next(replica for replica, names in REPLICAS.items() if name in names)

    def act(self, rank, message):
        sends = rank.name in TRAINERS
        match message:
            case m.Offer():
                if any(isinstance(one, m.Outcome) and one.header == message.header for one in rank.inbox):
                    rank.inbox = deque(
                        one for one in rank.inbox if isinstance(one, m.Waited) or one.header != message.header
                    )
                    return
                rank.round = message
                if message.planned:
                    self.say(rank, m.Ready(peer="", plan="p"), message.header)
                elif sends:
                    self.say(rank, m.Facts(peer="", blob=b"sources"), message.header)
            case m.Gathered(of="sources") if not sends:
                self.say(rank, m.Facts(peer="", blob=b"wants"), message.header)
            case m.Gathered(of="wants"):
                self.say(rank, m.Ready(peer="", plan="p"), message.header)
            case m.Go():
                self.say(rank, m.Done(peer="", sent=FOLD * sends, live=FOLD * (not sends)), message.header)
            case m.Outcome():
                offer, rank.round, rank.called = rank.round, None, False
                if message.ok and offer is not None:
                    self.version = max(self.version, offer.version)
                    rank.holds = offer.version, offer.incarnation
                if rank.wait and offer is not None and (end := rank.waited or message) is not None:
                    fits = offer.version >= rank.wait[0] and not message.again
                    if fits or rank.waited:
                        self.ended(rank, end.ok, end.failures)
            case m.Waited() if rank.wait and message.number == rank.wait[1]:
                rank.waited = message
                if rank.round is None:
                    self.ended(rank, message.ok, message.failures)

    def ended(self, rank, ok, failures):
        rank.ends.append((ok, "" if ok else "; ".join(map(str, failures))))
        rank.wait = rank.waited = None

    # -- what holds --------------------------------------------------------------------------------

    @invariant()
    def one_end(self):
        one, two = (self.ranks[name].ends for name in REPLICAS[0])
        for a, b in zip(one, two, strict=False):
            assert a == b

    def teardown(self):
        """All that waits ends, and alike."""
        for _ in range(40):
            for name in SERVERS:
                self.begin(name)
            self.time_goes_on(4.0)
            for _ in range(8):
                for name in self.ranks:
                    self.look(name)
        assert all(self.ranks[name].wait is None for name in SERVERS)
        one, two = (self.ranks[name].ends for name in REPLICAS[0])
        assert one == two
        assert len(self.hub.waits) == 0


bounded = settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    stateful_step_count=50,
    max_examples=int(os.environ.get("WEIGHTBUS_FUZZ", "200")),
)


def test_one_end_for_all_ranks_of_a_replica():
    run_state_machine_as_test(Replicas, settings=bounded)


PLANTED = {
    "the end is kept from ranks": (Waits, "_tell", lambda self, *_: None),
    "who comes later is forgotten": (Waits, "settle", lambda self, *_: self._waits.clear()),
    "the outcome is not told apart": (Waits, "advance", lambda self, now, busy, missing: None),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name, monkeypatch):
    monkeypatch.setattr(*PLANTED[name])
    found = settings(bounded, max_examples=500, report_multiple_bugs=False, derandomize=True)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Replicas, settings=found)


def test_meeting_again_takes_longer_each_time():
    assert m.MEET_S * 2**coordinators.MAX_DOUBLINGS > 3600


def test_ranks_that_find_the_round_over_are_told_too():
    """They began to wait while an update went on that they had not looked at, and it ended before they did."""
    ranks = Replicas()
    for name in TRAINERS:
        ranks.update(name=name, refuse=False)
    ranks.call(replica=0, ahead=0, wait_s=50.0)
    ranks.begin(name="s0")
    ranks.begin(name="s1")
    ranks.cancel(name="t0")
    ranks.teardown()
    (end,) = {end for name in REPLICAS[0] for end in ranks.ranks[name].ends}
    assert "cancelled: on a whim" in end[1]
