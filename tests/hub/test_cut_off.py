"""Of links that do not work, whose fault that is."""

from __future__ import annotations

import pytest

from weightbus.control import messages as m
from weightbus.hub.links import cut_off


def member(trainer=None, replica=None, rank=0):
    server = None if replica is None else m.ServerId(replica=replica, rank=rank)
    return m.Member(peer="", host="", pid=1, trainer=trainer, server=server)


MEMBERS = {
    "t0": member(0),
    "t1": member(1),
    "a0": member(None, 0, 0),
    "a1": member(None, 0, 1),
    "b0": member(None, 1, 0),
    "b1": member(None, 1, 1),
}


@pytest.mark.parametrize(
    ("apart", "expected"),
    [
        ({}, {}),
        ({"t0": ["b0"]}, {"b0": ["t0"]}),
        ({"b0": ["t0"]}, {"b0": ["t0"]}),
        ({"t0": ["b0", "b1"]}, {"b0": ["t0"], "b1": ["t0"]}),
        ({"t0": ["b0"], "a0": ["b0"], "a1": ["b0"]}, {"b0": ["t0", "a0", "a1"]}),
        ({"a0": ["b0", "b1"]}, {"a0": ["b0", "b1"]}),
        ({"t0": ["a0", "b1"]}, {"t0": ["a0", "b1"]}),
        ({"t0": ["t1"]}, {"t0": ["t1"]}),
        ({"t0": ["t0"]}, {}),
    ],
)
def test_who_is_cut_off(apart, expected):
    assert cut_off(MEMBERS, apart) == expected


def test_of_one_replica_its_ranks_are_named():
    members = {peer: MEMBERS[peer] for peer in ("t0", "t1", "a0", "a1")}
    assert cut_off(members, {"t0": ["a0", "a1"], "t1": ["a0", "a1"]}) == {
        "a0": ["t0", "t1"],
        "a1": ["t0", "t1"],
    }


def test_processes_that_are_both_are_named_as_trainer_ranks():
    members = {"x": member(0, 0, 0), "y": member(1, 0, 1)}
    assert cut_off(members, {"x": ["y"]}) == {"x": ["y"]}
