"""By whose fault a round fails: who is named first, which replicas to do without, whether to try again."""

from __future__ import annotations

from test_protocol import NOTHING, Room, only

from weightbus.control import messages as m
from weightbus.hub.blame import STILL_S, SYMPTOM_S, WATCH_S
from weightbus.hub.round import GRACE_S, Phase
from weightbus.hub.steps import SAY_S

# Until the hub waits no more for ranks that move bytes.
RUN_S = NOTHING["transfer_s"] + m.REACH_S + SAY_S

STALLED = "transfer: expected to end within 20 s"
BROKEN = "broadcast failed: connection closed by peer"


class Running(Room):
    """Two trainer ranks and two replicas of one rank, in RUN."""

    def __init__(self):
        super().__init__(trainers=2, servers=1)
        self.join("s1", "server", 0, 1, replica=1)
        for peer in ("t0", "t1"):
            self.enter(peer)
        for peer in ("t0", "t1"):
            self.say(m.Facts, peer, blob=b"source")
        for peer in ("s0", "s1"):
            self.say(m.Facts, peer, blob=b"want")
        for peer in ("t0", "t1", "s0", "s1"):
            self.say(m.Ready, peer, plan="p")
        assert self.hub.round.phase is Phase.RUN
        self.heard()

    def outcome(self):
        """As the first of them hears it; None if it goes on."""
        ends = [message for _, message in only(self.heard(), m.Outcome)]
        return ends[0] if ends else None

    def named(self, outcome):
        return [failure.rank.partition(" (")[0] for failure in outcome.failures]


def test_a_death_that_is_heard_late_is_named_first():
    room = Running()
    for peer in ("s0", "t0", "t1"):
        room.say(m.Done, peer, error=BROKEN, symptom=True)
    room.wait(GRACE_S + 0.5)
    assert room.outcome() is None, "somebody else may have died"
    room.drop("s1")
    end = room.outcome()
    assert end is not None, "and nobody is waited for any longer"
    assert room.named(end)[0] == "replica 1 server rank 0"
    assert end.again
    room.enter("t0", version=1)
    room.enter("t1", version=1)
    (offer, *_) = [message for _, message in only(room.heard(), m.Offer)]
    assert {member.server.replica for member in offer.members if member.server} == {0}


def test_where_a_trainer_rank_has_died_nobody_tries_again():
    room = Running()
    for peer in ("s0", "s1", "t0"):
        room.say(m.Done, peer, error=BROKEN, symptom=True)
    room.drop("t1")
    end = room.outcome()
    assert room.named(end)[0] == "trainer rank 1"
    assert not end.again
    assert not room.hub.isolation.left_out(1, room.now)


def test_what_a_rank_says_of_itself_is_not_hidden_by_what_follows_from_it():
    room = Running()
    room.say(m.Done, "s0", error="RuntimeError: a bad hook")
    room.say(m.Done, "s1", error=BROKEN, symptom=True)
    room.wait(GRACE_S + 0.1)
    end = room.outcome()
    assert room.named(end)[0] == "replica 0 server rank 0"
    assert end.again
    assert room.hub.isolation.left_out(1, room.now) == {0: "RuntimeError: a bad hook"}


def test_where_nobody_has_failed_by_itself_all_try_again():
    room = Running()
    for peer in ("t0", "t1", "s0", "s1"):
        room.say(m.Done, peer, error=BROKEN, symptom=True)
    room.wait(SYMPTOM_S + 0.1)
    end = room.outcome()
    assert sorted(room.named(end)) == [
        "replica 0 server rank 0",
        "replica 1 server rank 0",
        "trainer rank 0",
        "trainer rank 1",
    ]
    assert end.again
    assert room.hub.isolation.left_out(1, room.now) == {}


def test_a_transfer_that_has_taken_all_its_time_is_not_tried_again():
    room = Running()
    room.wait(NOTHING["transfer_s"])
    for peer in ("t0", "t1", "s0", "s1"):
        room.say(m.Done, peer, error=STALLED, symptom=True)
    room.wait(SYMPTOM_S)
    assert not room.outcome().again


def test_who_waits_for_one_whose_transfer_has_failed_is_not_named():
    """As where it could not make its group: the others go on making theirs."""
    room = Running()
    room.say(m.Done, "s1", error="no group could be made: Network is unreachable", symptom=True)
    look(room, "t0", "t1", "s0", seconds=SYMPTOM_S + WATCH_S)
    end = room.outcome()
    assert room.named(end) == ["replica 1 server rank 0"]
    assert end.again
    assert room.hub.isolation.left_out(1, room.now) == {}


def test_a_link_that_is_cut_is_named_by_both_ends_and_its_server_is_left_out():
    room = Running()
    for peer, apart in (("t0", [3]), ("t1", [3]), ("s0", [3]), ("s1", [0, 1, 2])):
        room.say(m.Done, peer, error=STALLED, symptom=True, apart=apart)
    end = room.outcome()
    assert room.named(end)[0] == "replica 1 server rank 0", "at once: nobody is waited for"
    assert "no data connection with trainer rank 0" in end.failures[0].reason
    assert end.again
    assert room.hub.isolation.left_out(1, room.now).keys() == {1}


def test_one_end_that_says_so_is_enough():
    room = Running()
    room.say(m.Done, "t0", error="no group could be made: timed out", symptom=True, apart=[3])
    room.wait(GRACE_S + 0.1)
    end = room.outcome()
    assert room.named(end) == ["replica 1 server rank 0", "trainer rank 0"]
    assert end.again


def test_a_trainer_rank_that_reaches_no_replica_is_named_itself():
    room = Running()
    room.say(m.Done, "t0", error=STALLED, symptom=True, apart=[1, 2, 3])
    room.wait(GRACE_S + 0.1)
    end = room.outcome()
    assert room.named(end)[0] == "trainer rank 0"
    assert not end.again
    assert room.hub.isolation.left_out(1, room.now) == {}


def test_a_rank_that_has_failed_by_itself_is_named_before_links():
    room = Running()
    room.say(m.Done, "s0", error="RuntimeError: a bad hook")
    room.say(m.Done, "t0", error=STALLED, symptom=True, apart=[3, 1 << 19])
    room.wait(GRACE_S + 0.1)
    end = room.outcome()
    assert room.named(end)[0] == "replica 0 server rank 0"
    assert room.hub.isolation.left_out(1, room.now).keys() == {0}


def look(room, *peers, seconds=STILL_S + 0.5):
    """Their main threads go on, for longer than it takes to see that another does not."""
    for _ in range(round(seconds / WATCH_S)):
        for peer in peers:
            room.hub.roster.peers[peer].looks += 1
        room.wait(WATCH_S)


def test_who_stands_still_is_named_by_those_who_wait_for_it():
    """A trainer rank that hangs keeps all others waiting."""
    room = Running()
    look(room, "t0", "s0", "s1", seconds=RUN_S)
    end = room.outcome()
    assert room.named(end) == ["trainer rank 1"]
    assert "busy elsewhere" in end.failures[0].reason
    assert not end.again


def test_a_stalled_transfer_is_the_fault_of_who_stands_still():
    room = Running()
    look(room, "t0", "t1", "s0")
    room.say(m.Done, "s0", error="transfer: expected to end within 4 s", symptom=True)
    look(room, "t0", "t1", "s0", seconds=SYMPTOM_S + WATCH_S)
    end = room.outcome()
    assert room.named(end) == ["replica 1 server rank 0", "replica 0 server rank 0"]
    assert end.again
    assert room.hub.isolation.left_out(1, room.now).keys() == {1}


def test_the_only_one_that_stands_still_is_named_where_all_others_have_given_up():
    room = Running()
    look(room, "t1", "s0", "s1", seconds=NOTHING["transfer_s"])
    for peer in ("t1", "s0", "s1"):
        room.say(m.Done, peer, error=STALLED, symptom=True)
    room.wait(WATCH_S)
    end = room.outcome()
    assert room.named(end)[0] == "trainer rank 0", "at once"
    assert not end.again


def test_where_all_look_all_who_are_silent_are_named():
    room = Running()
    room.say(m.Done, "t0")
    look(room, "t0", "t1", "s0", "s1", seconds=RUN_S)
    assert room.named(room.outcome()) == [
        "trainer rank 1",
        "replica 0 server rank 0",
        "replica 1 server rank 0",
    ]


def test_a_hub_that_was_stopped_itself_says_so():
    room = Running()
    look(room, "t0", "t1", "s0", "s1")
    room.now += NOTHING["transfer_s"] + 5.0
    room.hub.advance(room.now)
    assert room.outcome() is None, "what was said meanwhile is still to be heard"
    room.wait(RUN_S)
    end = room.outcome()
    assert room.named(end)[0] == "hub"
    assert "stood still for 25.0 s" in end.failures[0].reason
    assert not end.again
    assert room.hub.isolation.left_out(1, room.now) == {}


def test_ranks_that_have_given_up_a_stopped_hub_are_not_waited_for():
    room = Running()
    look(room, "t0", "t1", "s0", "s1")
    room.now += 15.0
    for peer in ("t0", "s0"):
        again = room.hub.roster.peers[peer]
        again.held = m.Held(epoch=1, members=4)
        room.hub.joined(again, room.now)
    room.wait(GRACE_S + 0.5)
    end = room.outcome()
    assert room.named(end)[0] == "hub"
    assert "trainer rank 0" in room.named(end)


def test_once_a_death_is_known_others_have_a_second_to_say_what_they_know():
    room = Running()
    room.say(m.Done, "s0", error=BROKEN, symptom=True)
    room.drop("s1")
    room.wait(GRACE_S + 0.1)
    assert room.outcome().again
