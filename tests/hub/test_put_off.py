"""An update whose replica is not all there is put off, not failed; and one that waits can be cancelled."""

from __future__ import annotations

import pytest
from test_protocol import Room, fold, only

from weightbus.control import client_messages as a
from weightbus.control import messages as m
from weightbus.hub.coordinator import Phase


def meeting(servers=2, **changes):
    """A room in which server rank 0 has taken up an update, and its poll is over."""
    room = Room(servers=servers)
    room.enter("t0", **changes)
    room.say(m.Facts, "t0", blob=b"source")
    room.say(m.Facts, "s0", blob=b"want")
    room.say(m.Later, "s0")
    return room


def beat(room, peer, state):
    room.hub.roster.peers[peer].state = state
    room.hub.roster.peers[peer].heard = room.now


def outcomes(room):
    return {peer: outcome for peer, outcome in only(room.heard(), m.Outcome)}


def test_who_does_not_poll_is_not_waited_for():
    room = meeting()
    room.wait(0.3)
    assert room.hub.round.phase is Phase.WANTS, "no beat has come since"
    beat(room, "s1", "ready")
    room.wait(0.1)
    found = outcomes(room)
    assert found.keys() == {"t0", "s0", "s1"}
    assert all(
        (one.ok, one.again, one.put_off, one.moved) == (False, True, True, False) for one in found.values()
    )
    assert "server rank 1" in str(found["s0"].failures[0])
    assert room.hub.round is None


def test_who_is_at_work_is_waited_for():
    room = meeting()
    for _ in range(10):
        room.wait(0.3)
        beat(room, "s1", "updating")
    assert room.hub.round.phase is Phase.WANTS


def test_of_other_replicas_nobody_is_put_off():
    """They come at their own time, as do the trainer's ranks."""
    room = Room(servers=1)
    room.join("r1", "server", 0, 1, replica=1)
    room.enter("t0")
    room.say(m.Facts, "t0", blob=b"source")
    room.say(m.Facts, "s0", blob=b"want")
    room.say(m.Later, "s0")
    room.wait(0.3)
    beat(room, "r1", "ready")
    room.wait(0.3)
    assert room.hub.round.phase is Phase.WANTS


def test_each_time_they_wait_longer_for_each_other_and_then_somebody_is_to_blame():
    room = meeting()
    begun, meets, ends = room.now, [], []
    while True:
        offer = next(message for _, message in only(room.heard(), m.Offer))
        meets.append(offer.meet_s)
        room.wait(0.3)
        beat(room, "s1", "ready")
        room.wait(offer.meet_s)
        ends.append(outcomes(room)["t0"])
        if not ends[-1].put_off:
            break
        room.enter("t0")
        room.say(m.Facts, "t0", blob=b"source")
        room.say(m.Facts, "s0", blob=b"want")
        room.say(m.Later, "s0")
    assert meets == [m.MEET_S * 2**i for i in range(len(meets))]
    assert len(meets) > 3
    assert not ends[-1].again
    assert "server rank 1: no answer in phase WANTS" in str(ends[-1].failures[0])
    assert 5.0 <= room.now - begun < 12.0, "ready_s, and at most twice as long"


def test_a_request_is_answered_when_the_update_has_ended_for_good():
    room = Room(servers=2)
    room.hub.requests.add(b"client", a.AskUpdate(id="i", hub="h", wait_s=100.0), room.now)
    room.hub.requests.poll(b"trainer", 0, 1, 1, -1)
    task = room.hub.requests.outbox.pop()[1].task
    room.enter("t0", version=task.version, task=task.task)
    room.say(m.Facts, "t0", blob=b"source")
    room.say(m.Facts, "s0", blob=b"want")
    room.say(m.Later, "s0")
    room.wait(0.1)
    beat(room, "s1", "ready")
    room.wait(0.1)
    assert outcomes(room)["t0"].put_off
    assert not room.hub.requests.outbox
    room.enter("t0", version=task.version, task=task.task)
    for kind in (m.Facts, m.Ready, m.Done):
        fields = {m.Facts: {"blob": b"b"}, m.Ready: {"plan": "p"}, m.Done: {"sent": [fold(5)]}}[kind]
        room.say(kind, "t0", **fields)
        for server in ("s0", "s1"):
            room.say(kind, server, **({"live": [fold(5)]} if kind is m.Done else fields))
    ((_, answer),) = room.hub.requests.outbox
    assert (answer.id, answer.ok) == ("i", True)


def cancel(room, reason="a bad step"):
    return room.hub.cancel(room.hub.roster.peers["t0"], reason, room.now)


@pytest.mark.parametrize("phase", [Phase.ENTER, Phase.SOURCES, Phase.WANTS, Phase.READY])
def test_a_cancel_ends_what_waits(phase):
    room = Room(servers=2 if phase is Phase.ENTER else 1, trainers=2 if phase is Phase.ENTER else 1)
    room.enter("t0")
    for kind, peer, fields in ((m.Facts, "t0", {"blob": b"s"}), (m.Facts, "s0", {"blob": b"w"})):
        if room.hub.round.phase is not phase:
            room.say(kind, peer, **fields)
    assert room.hub.round.phase is phase
    assert cancel(room)
    found = outcomes(room)
    assert all((one.ok, one.again, one.moved) == (False, False, False) for one in found.values())
    assert all("cancelled: a bad step" in str(one.failures[0]) for one in found.values())
    assert room.hub.round is None
    assert not cancel(room), "nothing waits any more"
    room.enter("t0")
    assert not room.hub.round.failures, "what is called afterwards is not cancelled"


def test_what_moves_goes_on():
    room = Room()
    room.to_run()
    assert not cancel(room)
    assert room.hub.round.phase is Phase.RUN


def test_a_cancel_between_two_calls_of_one_update():
    room = meeting()
    beat(room, "s1", "ready")
    room.wait(0.1)
    room.hub.roster.peers["s1"].heard = room.now
    room.wait(0.1)
    assert outcomes(room)["t0"].put_off
    assert cancel(room)
    room.enter("t0")
    assert "cancelled: a bad step" in str(outcomes(room)["t0"].failures[0])
    room.enter("t0")
    assert room.hub.round is not None
    assert not room.hub.round.failures
