"""A rank that joins the hub again: what the hub has said to the member that it was before is void."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest

from weightbus.control import messages as m
from weightbus.control.link import Link
from weightbus.control.rounds import Rounds
from weightbus.errors import ProtocolError
from weightbus.session.context import Context

OLD = m.Header("", 1, 4, 40)


def offer(header):
    made = m.Offer(
        group="g", kind="update", version=4, modules=None, verify=True, plan="p", planned=True,
        settings=m.Settings(bucket_bytes=64),
        members=[], ready_s=1.0, transfer_s=1.0,
    )  # fmt: skip
    made.stamp(header)
    return made


def link(*waiting):
    """As far as moving to another connection goes; ``waiting`` is what the old one still brings."""
    one = Link.__new__(Link)
    one.rounds, one.address = Rounds(""), "tcp://x"
    one._inbox, one._lost, one._touched, one._looks = deque(), "", 0.0, 0
    old = deque(waiting)
    one._connection = SimpleNamespace(receive=lambda *a, **k: old.popleft() if old else None, close=old.clear)
    one._fresh, one._anew = SimpleNamespace(receive=lambda *a, **k: None), True
    return one


def test_offers_of_the_old_connection_are_dropped():
    """A link was cut, the hub has dropped this rank, and what it had sent comes once the link is whole."""
    one = link(offer(OLD))
    assert one.receive(0) is None
    assert one.lost == ""


def test_where_keys_were_renewed_they_are_not():
    one = link(offer(OLD))
    one._anew = False
    assert isinstance(one.receive(0), m.Offer)


def test_a_round_that_was_begun_over_the_old_connection_is_lost():
    """Its thread had taken the offer just before the heartbeats' thread joined again: nobody would end it."""
    one = link()
    with one.rounds.within(offer(OLD)):
        one.receive(0)
        assert "has joined again meanwhile" in one.lost


def test_an_offer_to_others_changes_nothing():
    context = SimpleNamespace(link=SimpleNamespace(peer="me"), epoch=3, members=[], place=2)
    before = dict(vars(context))
    made = offer(OLD)
    made.members = [m.Member(peer=m.member_id("somebody"), trainer=0, server=None)]
    with pytest.raises(ProtocolError, match="expected this rank among the 1 members"):
        Context.enter_epoch(context, made)
    assert vars(context) == before
