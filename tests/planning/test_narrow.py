"""Searches for where two copies differ, against copies that are there to look at."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightbus.planning.box import Box, check_exact_cover
from weightbus.planning.narrow import MAX_BOXES, MAX_ROUNDS, Search, bounding, cut, grid_of


def sums(array, boxes):
    whole = Box.whole(array.shape)
    digests = [hashlib.sha256(array[box.within(whole)].tobytes()).digest() for box in boxes]
    return [(int.from_bytes(digest[:7], "little"), 1) for digest in digests]


def search(right, wrong, within=None):
    """Run a search on two arrays; The search, and what it asked for."""
    shape = right.shape
    found = Search.within(within or Box.whole(shape))
    asked = []
    while boxes := found.boxes():
        assert len(boxes) <= MAX_BOXES
        asked.append(boxes)
        found.compared(sums(right, boxes), sums(wrong, boxes))
        assert found.rounds <= MAX_ROUNDS
    return found, asked


shapes = st.lists(st.integers(1, 40), min_size=0, max_size=4).map(tuple)


@settings(max_examples=200, deadline=None)
@given(shapes, st.data())
def test_the_box_is_the_one_around_all_differences(shape, data):
    right = np.zeros(shape, dtype=np.int64)
    wrong = right.copy()
    spots = data.draw(
        st.lists(st.tuples(*(st.integers(0, n - 1) for n in shape)), min_size=1, max_size=6, unique=True)
    )
    for number, spot in enumerate(spots, start=1):
        wrong[spot] = number
    found, _ = search(right, wrong)
    lows = tuple(min(axis) for axis in zip(*spots, strict=True))
    sizes = tuple(max(axis) - low + 1 for axis, low in zip(zip(*spots, strict=True), lows, strict=True))
    assert (found.box, found.lost) == (Box(lows, sizes), False)
    parts, differing = found.grid
    if parts == found.box.volume:
        assert differing == len(set(spots))
    else:
        assert 1 <= differing <= len(set(spots))


@pytest.mark.parametrize(
    ("shape", "spot", "rounds"),
    [((4096, 4096), (4095, 17), 3), ((151936, 8), (99999, 7), 4), ((3, 5, 7), (2, 0, 6), 2), ((), (), 1)],
)
def test_one_element_takes_a_few_rounds(shape, spot, rounds):
    """The last of them sees the element alone. What is asked for does not grow with the tensor."""
    right = np.zeros(shape, dtype=np.int8)
    wrong = right.copy()
    wrong[spot] = 1
    found, asked = search(right, wrong)
    assert (found.box, found.grid) == (Box(spot, (1,) * len(shape)), (1, 1))
    assert found.rounds == rounds
    assert sum(map(len, asked)) <= rounds * MAX_BOXES


def test_what_changes_meanwhile_is_lost():
    found = Search.within(Box.whole((8, 8)))
    boxes = found.boxes()
    found.compared([(1, 1)] * len(boxes), [(1, 1)] * len(boxes))
    assert found.lost
    assert found.boxes() == []


def test_one_axis_that_agrees_is_lost_too():
    found = Search.within(Box.whole((4, 4)))
    boxes = found.boxes()
    live = [(2, 2) if box.sizes[0] == 1 else (1, 1) for box in boxes]
    found.compared([(1, 1)] * len(boxes), live)
    assert found.lost


@given(st.tuples(st.integers(0, 50), st.integers(51, 400)), st.integers(1, 64))
def test_cut(span, parts):
    ranges = cut(span, parts)
    assert len(ranges) <= parts
    assert [low for low, _ in ranges] == [span[0], *(high for _, high in ranges[:-1])]
    assert ranges[-1][1] == span[1]


@settings(max_examples=100, deadline=None)
@given(shapes)
def test_grids_cover_exactly(shape):
    boxes = grid_of(Box.whole(shape))
    assert len(boxes) <= MAX_BOXES
    check_exact_cover("grid", shape, boxes, "test")
    if Box.whole(shape).volume <= MAX_BOXES:
        assert all(box.volume == 1 for box in boxes)


def test_bounding():
    boxes = [Box((3, 0), (2, 4)), Box((1, 6), (1, 1)), Box((0, 0), (0, 9))]
    assert bounding(boxes) == Box((1, 0), (4, 7))
