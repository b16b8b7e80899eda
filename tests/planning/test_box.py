"""Boxes against arrays that are marked element by element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightbus.errors import CoverageError
from weightbus.planning.box import Box, check_exact_cover, overlap
from weightbus.planning.spec import ITEMSIZE, Spec, castable

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = [draw(st.integers(0, n)) for n in shape]
    return Box(tuple(offsets), tuple(draw(st.integers(0, n - o)) for o, n in zip(offsets, shape, strict=True)))


def marked(box: Box, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, dtype=int)
    mask[box.within(Box.whole(shape))] = 1
    return mask


@given(st.data(), shapes)
def test_intersect_holds_the_elements_of_both(data: st.DataObject, shape: tuple[int, ...]) -> None:
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    both = marked(a, shape) & marked(b, shape)
    common = a.intersect(b)
    assert (common is None) == (not both.any())
    assert common == b.intersect(a)
    if common is not None:
        assert np.array_equal(marked(common, shape), both)


@given(st.data(), shapes)
def test_within_indexes_an_array_of_the_outer_box(data: st.DataObject, shape: tuple[int, ...]) -> None:
    outer = data.draw(boxes_in(shape))
    inner = data.draw(boxes_in(outer.sizes))
    inner = Box(tuple(map(sum, zip(outer.offsets, inner.offsets, strict=True))), inner.sizes)
    source = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    whole = Box.whole(shape)
    assert np.array_equal(source[outer.within(whole)][inner.within(outer)], source[inner.within(whole)])


@given(st.data(), shapes, st.integers(1, 40))
def test_split_is_in_row_major_order_and_bounded(
    data: st.DataObject, shape: tuple[int, ...], max_elements: int
) -> None:
    box = data.draw(boxes_in(shape))
    pieces = box.split(max_elements)
    assert all(piece.volume <= max_elements for piece in pieces)
    source = np.arange(box.volume).reshape(box.sizes)
    if box.volume:
        flat = np.concatenate([source[piece.within(box)].ravel() for piece in pieces])
        # Row-major order, each element once; so each piece of a contiguous box is contiguous.
        assert np.array_equal(flat, np.arange(box.volume))
    else:
        assert pieces == [box]


def test_split_keeps_whole_rows_where_they_fit() -> None:
    assert Box((2, 0), (5, 4)).split(9) == [Box((2, 0), (2, 4)), Box((4, 0), (2, 4)), Box((6, 0), (1, 4))]
    assert Box((), ()).split(1) == [Box((), ())]


@given(st.data(), shapes.filter(lambda shape: np.prod(shape, dtype=int) <= 60))
def test_check_exact_cover_agrees_with_counting(data: st.DataObject, shape: tuple[int, ...]) -> None:
    # Half of the examples are true covers, which random boxes would almost never be.
    boxes = data.draw(st.permutations(Box.whole(shape).split(data.draw(st.integers(1, 20)))))
    if data.draw(st.booleans()):
        boxes = [*boxes[data.draw(st.integers(0, 1)) :], *data.draw(st.lists(boxes_in(shape), max_size=2))]
    count = sum((marked(box, shape) for box in boxes), np.zeros(shape, dtype=int))
    if (count == 1).all():
        check_exact_cover("w", shape, boxes, "here")
    else:
        with pytest.raises(CoverageError, match=r"^w: .*; here$"):
            check_exact_cover("w", shape, boxes, "here")


@given(st.data(), shapes)
def test_overlap_agrees_with_counting(data: st.DataObject, shape: tuple[int, ...]) -> None:
    ones, others = (data.draw(st.lists(boxes_in(shape), max_size=4)) for _ in range(2))
    one, other = (sum((marked(box, shape) for box in boxes), np.zeros(shape)) for boxes in (ones, others))
    assert overlap(ones) == bool((one > 1).any())
    assert overlap(ones, others) == bool(((one > 0) & (other > 0)).any())


def test_check_exact_cover_names_what_is_wrong() -> None:
    def error(boxes: list[Box]) -> str:
        with pytest.raises(CoverageError) as raised:
            check_exact_cover("w", (10, 2), boxes, "server rank 2")
        return str(raised.value)

    assert "leave out 4" in error([Box((0, 0), (8, 2))])
    assert "repeat 2" in error([Box((0, 0), (10, 2)), Box((3, 0), (1, 2))])
    assert "[8:11, 0:2] lies outside shape (10, 2)" in error([Box((8, 0), (3, 2))])
    # The volume is right, yet row 4 is held twice and row 9 not at all.
    assert "both hold [4:5, 0:2]" in error([Box((0, 0), (5, 2)), Box((4, 0), (5, 2))])


def test_castable_pairs_are_exactly_floats_and_complexes() -> None:
    floats = {"float16", "bfloat16", "float32", "float64"}
    complexes = {"complex32", "complex64", "complex128"}
    for src in ITEMSIZE:
        for dst in ITEMSIZE:
            expected = src == dst or {src, dst} <= floats or {src, dst} <= complexes
            assert castable(src, dst) == expected, (src, dst)


def test_itemsizes_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    assert {name: getattr(torch, name).itemsize for name in ITEMSIZE} == ITEMSIZE


def test_spec_counts_elements_and_bytes() -> None:
    spec = Spec(name="w", dtype="bfloat16", shape=(3, 5))
    assert (spec.elements, spec.nbytes, str(spec)) == (15, 30, "w bfloat16[3, 5]")
    assert Spec(name="s", dtype="complex64", shape=()).nbytes == 8
    assert Spec(name="e", dtype="int8", shape=(4, 0)).nbytes == 0
