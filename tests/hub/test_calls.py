"""What a trainer rank calls: refused at once where it makes no sense, numbered where it asks for a number."""

from __future__ import annotations

import pytest
from test_protocol import Room, only

from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.errors import ProtocolError


@pytest.mark.parametrize(("committed", "after"), [(None, m.MAX_COUNT), (m.MAX_COUNT, None), (m.MAX_COUNT, 7)])
def test_the_hub_gives_no_number_that_the_wire_cannot_carry(committed, after):
    room = Room(trainers=2)
    if committed is not None:
        room.hub._believe(committed)
    for peer in ("t0", "t1"):
        room.enter(peer, version=0, follows=True, after=after)
    ended = only(room.heard(), m.Outcome)
    assert [peer for peer, _ in ended] == ["t0", "t1"]
    for _, outcome in ended:
        assert not outcome.ok
        assert f"expected a last one below {m.MAX_COUNT}" in outcome.failures[0].reason
        assert "resume=" in outcome.failures[0].reason
        wire.decode_from_hub(wire.encode(outcome))


def test_the_last_number_that_the_wire_carries_is_given():
    room = Room()
    room.enter("t0", version=0, follows=True, after=m.MAX_COUNT - 1)
    offers = only(room.heard(), m.Offer)
    assert {offer.version for _, offer in offers} == {m.MAX_COUNT}
    assert all(wire.decode_from_hub(wire.encode(offer)) for _, offer in offers)


def test_what_no_rank_may_call_is_refused_at_once_and_not_when_its_start_takes_over():
    room = Room(trainers=2)
    room.drop("t0")
    hello = m.Hello(process="e", host="h", pid=2, device="cpu", role="trainer", rank=0, size=2, start="another")
    early = room.hub.roster.admit(hello, "e", room.now)
    assert room.hub.roster.is_early(early)
    with pytest.raises(ProtocolError, match="expected an update, a check or a label, got a catch-up"):
        room.enter("e", kind="catch_up")
    room.drop("t1")
    assert not room.hub.roster.is_early(early)
    assert not only(room.heard(), m.Offer)
