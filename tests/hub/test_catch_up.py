"""Catch-ups at the hub, without sockets: when one begins, what it proves, and that an update comes first."""

from __future__ import annotations

import itertools

import pytest

from weightbus.control import messages as m
from weightbus.errors import ProtocolError
from weightbus.hub.catch_up import FIRST_PAUSE_S, QUIET_S, READY_S, TRIES
from weightbus.hub.coordinator import Coordinator, Phase

SUMS = {"want 0": (3, 4), "want 1": (5, 6)}


class Room:
    """One trainer rank, and replicas of two ranks each, that all do as they are told."""

    def __init__(self, replicas=(0,)):
        self.hub = Coordinator(dead_after_s=1e9)
        self.now, self.beats = 0.0, True
        self.join("t0", "trainer", 0, 1)
        for replica in replicas:
            self.add(replica)

    def join(self, name, role, rank, size, replica=0):
        hello = m.Hello(
            process=name,
            host="h",
            pid=ord(name[-1]),
            device="cpu",
            role=role,
            rank=rank,
            size=size,
            replica=replica,
        )
        peer = self.hub.roster.admit(hello, name, self.now)
        peer.state = "empty" if role == "server" else ""
        self.hub.joined(peer, self.now)

    def add(self, replica):
        for rank in range(2):
            self.join(f"s{replica}{rank}", "server", rank, 2, replica)

    def enter(self, version, **changes):
        fields = {
            "modules": None,
            "facts": "f",
            "settings": m.Settings(bucket_bytes=64),
            "min_replicas": 1,
            "verify": True,
        }
        times = {"join_s": 10.0, "ready_s": 5.0, "transfer_s": 20.0}
        enter = m.Enter(peer="t0", kind="update", version=version, **{**fields, **times, **changes})
        self.hub.enter(enter, self.now)

    def answer(self, *, until=None, live=SUMS):
        """All members answer, phase by phase, up to ``until``. live: digests of what servers hold."""
        while self.hub.round is not None and self.hub.round.phase is not until:
            round = self.hub.round
            for id in sorted(round.expected):
                if self.hub.round is round and id not in round.answers:
                    self.say(round, id, round.members[id], live)

    def say(self, round, id, member, live):
        sends = member.trainer is not None
        want = f"want {id[-1]}"
        match round.phase:
            case Phase.SOURCES | Phase.WANTS:
                message = m.Facts(peer=id, blob=want.encode(), wants_id="" if sends else want)
            case Phase.READY:
                message = m.Ready(peer=id, plan="p")
            case Phase.RUN:
                groups = sorted(SUMS) if member.donor is None else [want]
                sent = [
                    m.Fold(job=0, group=int(name[-1]), sums=SUMS[name], nbytes=8, due=8)
                    for name in groups * sends
                ]
                own = [m.Fold(job=0, group=int(id[-1]), sums=live[want], nbytes=8, due=8)]
                message = m.Done(peer=id, sent=sent, live=own * (not sends))
        message.stamp(round.header)
        assert self.hub.answer(message, self.now)

    def update(self, version, **changes):
        self.enter(version, **changes)
        self.answer()
        return self.outcome("t0")

    def wait(self, seconds):
        for _ in range(round(seconds / 0.25)):
            self.now += 0.25
            for peer in self.hub.roster.peers.values():
                peer.heard = self.now if self.beats else 0.0
            self.hub.advance(self.now)

    def outcome(self, id):
        sent = [message for peer, message in self.hub.outbox if peer == id and isinstance(message, m.Outcome)]
        self.hub.outbox.clear()
        return sent[-1]

    def states(self, replica):
        return {(peer.state, peer.version) for peer in self.hub.roster.replicas()[replica].values()}


def joined_late(**changes):
    """Version 1 is committed on replica 0, and replica 1 has come since."""
    room = Room()
    assert room.update(1, **changes).ok
    room.add(1)
    return room


def test_a_joiner_is_brought_up_once_it_is_quiet():
    room = joined_late()
    room.wait(QUIET_S / 2)
    assert room.hub.round is None
    room.wait(QUIET_S)
    assert room.hub.round.enter.kind == "catch_up"
    assert [str(member) for member in room.hub.round.members.values()] == [
        "replica 0 server rank 0 as a donor",
        "replica 0 server rank 1 as a donor",
        "replica 1 server rank 0",
        "replica 1 server rank 1",
    ]
    room.answer()
    goes = {peer: message for peer, message in room.hub.outbox if isinstance(message, m.Go)}
    assert {peer: go.group for peer, go in goes.items() if peer.startswith("s1")} == {"s10": 0, "s11": 1}
    assert len({go.seed for go in goes.values()}) == 1
    assert room.outcome("s11").ok
    assert room.states(1) == {("ready", 1)}
    assert room.hub.committed == 1
    room.wait(60)
    assert room.hub.round is None, "once is enough"


@pytest.mark.parametrize("state", ["", "updating"])
def test_beats_that_were_under_way_start_nothing(state):
    """They say what was so before the commit, or in the midst of it."""
    room = joined_late()
    room.beats = False
    room.wait(5)
    assert room.hub.round is None
    room.beats = True
    room.hub.roster.peers["s11"].state = state
    room.wait(5)
    assert room.hub.round is None
    room.hub.roster.peers["s11"].state = "empty"
    room.wait(1)
    assert room.hub.round is not None


def test_nothing_counts_before_its_sums_match():
    room = joined_late()
    room.wait(2)
    room.answer(live={"want 0": (3, 4), "want 1": (5, 7)})
    outcome = room.outcome("s10")
    assert (outcome.ok, outcome.moved) == (False, True)
    assert "expected digest" in str(outcome.failures[0])
    assert "replica 1 server rank 1" in str(outcome.failures[0])
    assert room.states(1) == {("torn", None)}
    assert room.hub.catch_up.needs(1)


def test_donors_and_joiners_that_agree_on_other_bytes_are_wrong():
    """A donor whose weights have changed since, and that says of them what the joiner says."""
    other = {"want 0": (7, 7), "want 1": (5, 6)}
    room = joined_late()
    room.wait(2)
    room.answer(until=Phase.RUN)
    going = room.hub.round
    for id, member in going.members.items():
        want = f"want {id[-1]}"
        fold = [m.Fold(job=0, group=int(id[-1]), sums=other[want], nbytes=8, due=8)]
        sends = member.trainer is not None
        done = m.Done(peer=id, sent=fold * sends, live=fold * (not sends))
        done.stamp(going.header)
        room.hub.answer(done, room.now)
    assert not room.outcome("s10").ok
    assert room.states(1) == {("torn", None)}


@pytest.mark.parametrize("phase", [Phase.SOURCES, Phase.WANTS, Phase.READY, Phase.RUN])
def test_an_update_has_right_of_way(phase):
    room = joined_late()
    room.wait(2)
    room.answer(until=phase)
    room.hub.outbox.clear()
    room.enter(2)
    assert room.hub.round.enter.kind == "update"
    assert room.hub.round.phase is Phase.SOURCES, "it waits for nobody"
    ended = {peer: message for peer, message in room.hub.outbox if isinstance(message, m.Outcome)}
    assert ended.keys() == {"s00", "s01", "s10", "s11"}
    assert all("update 2 has begun" in str(outcome.failures[0]) for outcome in ended.values())
    room.answer()
    assert room.outcome("t0").replicas == [0, 1]
    assert room.states(1) == room.states(0) == {("ready", 2)}


def test_failures_are_tried_again_ever_more_rarely_and_then_not():
    room = joined_late()
    begun = []
    for _ in range(80 * 60):
        room.wait(0.25)
        if room.hub.round is not None and (not begun or begun[-1] != room.now):
            begun.append(room.now)
            room.wait(READY_S + 0.5)  # nobody answers
    pauses = [b - a for a, b in itertools.pairwise(begun)]
    assert len(begun) == TRIES
    assert pauses[0] >= FIRST_PAUSE_S
    assert pauses[3] > 4 * pauses[0]
    room.hub.outbox.clear()
    assert room.update(2).replicas == [0, 1], "the next update takes it"
    assert not room.hub.catch_up.needs(1)


@pytest.mark.parametrize("changes", [{"verify": False}, {"modules": ["a"]}, {"catch_up": False}])
def test_what_can_not_be_proved_or_is_not_wished_for(changes):
    room = joined_late(**changes)
    room.wait(30)
    assert room.hub.round is None


def test_boxes_that_were_never_proved():
    room = joined_late()
    room.wait(2)
    room.answer(until=Phase.WANTS)
    going = room.hub.round
    for id in going.expected.copy():
        facts = m.Facts(peer=id, blob=b"other", wants_id="other")
        facts.stamp(going.header)
        room.hub.answer(facts, room.now)
    outcome = room.outcome("s10")
    assert (outcome.ok, outcome.moved) == (False, False)
    assert "holds other boxes" in str(outcome.failures[0])


def test_what_a_task_has_written_stays():
    room = joined_late()
    room.hub.tasks.touched.add(1)
    room.wait(30)
    assert room.hub.round is None
    room.hub.tasks.touched.discard(1)
    room.hub.tasks.touched.add(0)
    room.wait(30)
    assert room.hub.round is None, "nor is it given away"


def test_without_a_donor_the_trainers_next_poll_is_an_update():
    room = Room()
    assert room.update(1).ok
    for id in ("s00", "s01"):
        peer = room.hub.roster.peers[id]
        room.hub.roster.remove(peer)
        room.hub.lost(peer, "died", room.now)
    room.add(0)
    room.wait(3)
    assert room.hub.round is None
    room.hub.requests.poll(b"t", 0, 1, 1, room.hub.floor)
    ((_, polled),) = room.hub.requests.outbox
    assert (polled.task.kind, polled.task.version) == ("update", 2)
    room.hub.requests.outbox.clear()
    room.hub.requests.poll(b"t", 0, 2, 1, room.hub.floor)
    assert room.hub.requests.outbox[0][1].task is None, "once"


def test_a_wait_ends_with_a_catch_up():
    room = joined_late()
    for number, id in enumerate(("s10", "s11")):
        waits = m.Await(peer=id, number=number, version=1, wait_s=100.0)
        waits.stamp(room.hub.header())
        room.hub.answer(waits, room.now)
    room.wait(2)
    room.answer()
    assert len(room.hub.waits) == 0
    assert not any(isinstance(message, m.Waited) for _, message in room.hub.outbox), "the outcome ends it"


def test_nobody_may_call_for_one():
    room = Room()
    with pytest.raises(ProtocolError, match="got a catch-up"):
        room.hub.enter(
            m.Enter(
                peer="t0", kind="catch_up", version=1, modules=None, verify=True, facts="f",
                settings=m.Settings(bucket_bytes=64),
                min_replicas=1, join_s=1.0, ready_s=1.0, transfer_s=1.0,
            ),
            0.0,
        )  # fmt: skip


def test_of_another_start_of_the_trainer_nothing_is_given():
    room = joined_late()
    peer = room.hub.roster.peers["t0"]
    room.hub.roster.remove(peer)
    room.hub.lost(peer, "left", room.now)
    room.join("t1", "trainer", 0, 1)
    assert room.hub.incarnation == 2
    room.wait(30)
    assert room.hub.round is None
