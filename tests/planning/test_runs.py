"""Runs against numpy's own strided copies."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from weightbus.planning import runs
from weightbus.planning.runs import Run, row_major, runs_of


def apply(run: Run, dst: np.ndarray, src: np.ndarray) -> None:
    for row in range(run.rows):
        d, s = run.dst + row * run.dst_pitch, run.src + row * run.src_pitch
        dst[d : d + run.width] = src[s : s + run.width]


@st.composite
def windows(draw):
    """Sizes of a box, and for each end the shape of what it is cut from, with the box's offsets."""
    sizes = draw(st.lists(st.integers(0, 4), max_size=4))
    ends = []
    for _ in range(2):
        offsets = [draw(st.integers(0, 2)) for _ in sizes]
        shape = [o + n + draw(st.integers(0, 2)) for o, n in zip(offsets, sizes, strict=True)]
        ends.append((shape, offsets))
    return sizes, *ends


def cut(shape, offsets, sizes, itemsize):
    """A flat byte buffer, and the box's view of it."""
    flat = np.zeros(max(1, int(np.prod(shape, dtype=int))) * itemsize, dtype=np.uint8)
    whole = flat[: int(np.prod(shape, dtype=int)) * itemsize].reshape(*shape, itemsize)
    view = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
    start = view.__array_interface__["data"][0] - flat.__array_interface__["data"][0]
    return flat, view, [stride // itemsize for stride in view.strides[:-1]], start


@settings(max_examples=300, deadline=None)
@given(windows(), st.sampled_from([1, 2, 4]))
def test_runs_copy_the_box_and_nothing_else(window, itemsize):
    sizes, (dst_shape, dst_offsets), (src_shape, src_offsets) = window
    dst, _, dst_strides, dst_start = cut(dst_shape, dst_offsets, sizes, itemsize)
    src, src_view, src_strides, src_start = cut(src_shape, src_offsets, sizes, itemsize)
    src[:] = np.arange(1, len(src) + 1, dtype=np.int64) % 251 + 1
    expected = dst.copy()
    whole = expected[: int(np.prod(dst_shape, dtype=int)) * itemsize].reshape(*dst_shape, itemsize)
    whole[tuple(slice(o, o + n) for o, n in zip(dst_offsets, sizes, strict=True))] = src_view
    found = runs_of(sizes, dst_strides, src_strides, itemsize=itemsize, dst=dst_start, src=src_start)
    for run in found:
        apply(run, dst, src)
    assert np.array_equal(dst, expected)
    assert sum(run.nbytes for run in found) == int(np.prod(sizes, dtype=int)) * itemsize


def test_as_few_as_can_be():
    assert runs_of((4, 3, 5), (15, 5, 1), (15, 5, 1), itemsize=2) == [Run(0, 0, 120)]
    assert runs_of((4096, 6144), (6144, 1), (12288, 1), itemsize=2, dst=64, src=12288) == [
        Run(64, 12288, 12288, 4096, 12288, 24576)
    ]
    # Rows of a stack of matrices, columns cut at both ends: one run for the rows of all of them.
    assert runs_of((8, 16, 32), (512, 32, 1), (1024, 64, 1), itemsize=4) == [Run(0, 0, 128, 128, 128, 256)]
    # Rows and columns cut: one for each matrix.
    assert len(runs_of((8, 16, 32), (512, 32, 1), (2048, 64, 1), itemsize=4)) == 8
    assert runs_of((), (), (), itemsize=4, dst=8) == [Run(8, 0, 4)]
    assert runs_of((3, 0), (1, 1), (1, 1), itemsize=4) == []


def test_a_pitch_the_driver_refuses_is_split(monkeypatch):
    monkeypatch.setattr(runs, "MAX_PITCH", 100)
    assert runs_of((3, 4), (4, 1), (60, 1), itemsize=2) == [Run(0, 0, 8), Run(8, 120, 8), Run(16, 240, 8)]


def test_row_major():
    assert row_major((6, 1), (3, 2))
    assert row_major((1, 6), (3, 1))
    assert row_major((), ())
    assert not row_major((1, 3), (3, 2))
