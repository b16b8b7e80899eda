"""The peer plan against a count of every element."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightbus.errors import CoverageError
from weightbus.planning.box import Box
from weightbus.planning.exports import Exports, Reach
from weightbus.planning.facts import Holding
from weightbus.planning.peer_plan import casts_of, plan_peer, why_no_cast, why_too_much
from weightbus.planning.plan import Want
from weightbus.planning.spec import Spec

SHAPE = (7, 5)


def cells(box: Box) -> list[tuple[int, ...]]:
    return list(product(*(range(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))))


def bands(axis: int, cuts: list[int]) -> list[Box]:
    """SHAPE cut along an axis."""
    edges = [0, *sorted(set(cuts)), SHAPE[axis]]
    boxes = []
    for low, high in pairwise(edges):
        offsets, sizes = [0, 0], list(SHAPE)
        offsets[axis], sizes[axis] = low, high - low
        boxes.append(Box(tuple(offsets), tuple(sizes)))
    return boxes


def facts(*boxes: Box, dtype: str = "float32", shape: tuple[int, ...] = SHAPE):
    return {"w": Holding(spec=Spec(name="w", dtype=dtype, shape=shape), boxes=boxes)}


layouts = st.tuples(st.integers(0, 1), st.lists(st.integers(1, 4), max_size=3)).map(lambda x: bands(*x))


@settings(max_examples=200, deadline=None)
@given(layouts, layouts, st.integers(1, 3), st.integers(1, 3))
def test_every_wanted_element_once_and_from_a_holder(held, wanted, copies, first_server):
    # ``copies`` data-parallel trainer replicas; server ranks may be the same processes.
    sources = {rank: facts(held[rank % len(held)]) for rank in range(copies * len(held))}
    wants = {first_server + i: Want(replica=0, rank=i, facts=facts(box)) for i, box in enumerate(wanted)}
    plan = plan_peer(sources, wants)
    proved = Counter(cell for proof in plan.proofs for cell in cells(proof.box))
    assert proved == Counter(cells(Box.whole(SHAPE)))
    for rank, want in wants.items():
        got = Counter(cell for piece in plan.copies[rank] for cell in cells(piece.box))
        assert got == Counter(cell for box in want.facts["w"].boxes for cell in cells(box))
        for piece in plan.copies[rank]:
            (box,) = sources[piece.src]["w"].boxes
            assert box.intersect(piece.box) == piece.box
            mine = sources.get(rank, facts())["w"].boxes
            assert (piece.src == rank) == any(box.intersect(piece.box) for box in mine)
    assert plan.fingerprint == plan_peer(sources, wants).fingerprint


def test_readers_of_equal_holders_are_spread():
    whole = Box.whole(SHAPE)
    sources = {rank: facts(whole) for rank in range(2)}
    wants = {2 + i: Want(replica=i, rank=0, facts=facts(whole)) for i in range(4)}
    plan = plan_peer(sources, wants)
    assert Counter(piece.src for pieces in plan.copies.values() for piece in pieces) == {0: 2, 1: 2}


def test_a_gap_is_refused():
    sources = {0: facts(Box((0, 0), (6, 5)))}
    with pytest.raises(CoverageError, match="w: "):
        plan_peer(sources, {1: Want(replica=0, rank=0, facts=facts(Box.whole(SHAPE)))})


def test_which_casts_there_are():
    sources = {0: facts(Box.whole(SHAPE))}
    same = Want(replica=0, rank=0, facts=facts(Box.whole(SHAPE)))
    other = Want(replica=1, rank=2, facts=facts(Box.whole(SHAPE), dtype="bfloat16"))
    assert casts_of(sources, [same]) == {}
    text = "w is float32 on the trainer and bfloat16 on replica 1 server rank 2"
    assert casts_of(sources, [same, other]) == {("float32", "bfloat16"): text}


def test_why_a_cast_is_not_copied():
    text = "w is float32 on the trainer and float64 on replica 0 server rank 0"
    able, unable = Reach(device="a"), Reach(device="a", no_cast="server rank 1: no kernel that casts")
    assert why_no_cast({}, [able, unable]) == ""
    assert why_no_cast({("float32", "bfloat16"): text}, [able]) == ""
    assert why_no_cast({("float32", "bfloat16"): text}, [able, unable]) == unable.no_cast
    assert why_no_cast({("float32", "float64"): text}, [able]).startswith(text)


@pytest.mark.parametrize(
    ("held", "devices", "more"),
    [
        ([(0, 12)], ["there"], True),  # all of it comes from another device, twice as wide
        ([(0, 12)], ["here"], False),
        ([(0, 6), (6, 6)], ["here", "there"], False),  # half of it: as much as a broadcast
        ([(0, 5), (5, 7)], ["here", "there"], True),
    ],
)
def test_more_bytes_than_a_broadcast_are_not_copied(held, devices, more):
    sources = {rank: facts(Box((row, 0), (rows, 5)), shape=(12, 5)) for rank, (row, rows) in enumerate(held)}
    whole = facts(Box.whole((12, 5)), dtype="bfloat16", shape=(12, 5))
    wants = {9: Want(replica=0, rank=0, facts=whole)}
    exports = {rank: Exports(device=device) for rank, device in enumerate(devices)}
    plan = plan_peer(sources, wants)
    assert bool(why_too_much(plan, sources, exports, {9: Reach(device="here")})) == more
