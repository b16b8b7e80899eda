"""Hyper-rectangles of a tensor, in elements of its global shape. Pure integers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightbus.errors import CoverageError


@dataclass(frozen=True, slots=True)
class Box:
    """Offsets and sizes, one of each per axis of the global shape; a 0-d tensor has neither."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def volume(self) -> int:
        return math.prod(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(o + n for o, n in zip(self.offsets, self.sizes, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The elements of both, or None where there are none."""
        lows = tuple(map(max, self.offsets, other.offsets))
        sizes = tuple(high - low for high, low in zip(map(min, self.ends, other.ends), lows, strict=True))
        return None if any(n <= 0 for n in sizes) else Box(lows, sizes)

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Index of this box in an array that holds exactly ``outer``."""
        return tuple(
            slice(o - base, o - base + n)
            for o, base, n in zip(self.offsets, outer.offsets, self.sizes, strict=True)
        )

    def runs_in(self, outer: Box) -> bool:
        """Whether this box lies in ``outer``, and its elements are neighbours in a row-major array of that."""
        if self.intersect(outer) != self:
            return False
        axis = next((a for a, n in enumerate(self.sizes) if n > 1), len(self.sizes))
        return self.sizes[axis + 1 :] == outer.sizes[axis + 1 :]

    def inside(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.sizes) and all(
            o >= 0 and n >= 0 and o + n <= whole
            for o, n, whole in zip(self.offsets, self.sizes, shape, strict=True)
        )

    def split(self, max_elements: int) -> list[Box]:
        """Pieces of at most ``max_elements`` elements, in row-major order, each a run of whole rows
        of the box where the limit allows that; so that pieces of a contiguous box are contiguous."""
        if self.volume <= max_elements:
            return [self]
        axis = next(a for a, n in enumerate(self.sizes) if n > 1)
        step = max(1, max_elements // math.prod(self.sizes[axis + 1 :]))
        pieces = []
        for start in range(0, self.sizes[axis], step):
            size = min(step, self.sizes[axis] - start)
            piece = Box(
                (*self.offsets[:axis], self.offsets[axis] + start, *self.offsets[axis + 1 :]),
                (*self.sizes[:axis], size, *self.sizes[axis + 1 :]),
            )
            pieces += piece.split(max_elements)
        return pieces

    def __str__(self) -> str:
        spans = zip(self.offsets, self.ends, strict=True)
        return "[" + ", ".join(f"{low}:{high}" for low, high in spans) + "]"


def overlap(boxes: Sequence[Box], others: Sequence[Box] | None = None) -> bool:
    """Whether a box shares an element with one of ``others``; without these, with another one of ``boxes``.

    n log n where the boxes follow each other along some axis, as the rows of a matrix do.
    """
    marked = [(box, True) for box in boxes] + [(box, False) for box in others or ()]
    marked = [(box, mine) for box, mine in marked if box.volume]
    if len(marked) < 2:
        return False
    axes = range(len(marked[0][0].sizes))
    axis = max(axes, key=lambda axis: len({box.offsets[axis] for box, _ in marked}), default=None)
    if axis is None:
        return others is None or {mine for _, mine in marked} == {True, False}
    marked.sort(key=lambda mark: mark[0].offsets[axis])
    for i, (box, mine) in enumerate(marked):
        end = box.offsets[axis] + box.sizes[axis]
        for other, too in marked[i + 1 :]:
            if other.offsets[axis] >= end:
                break
            if (others is None or mine != too) and box.intersect(other):
                return True
    return False


def meets(boxes: Sequence[Box], others: Sequence[Box]) -> list[tuple[int, int, Box]]:
    """The pairs that share elements, in order: the place of each in its list, and what they share.

    A sweep along the axis on which most boxes follow each other, as ``overlap``.
    """
    marked = [(box, 0, place) for place, box in enumerate(boxes) if box.volume]
    marked += [(box, 1, place) for place, box in enumerate(others) if box.volume]
    if not marked:
        return []
    axes = range(len(marked[0][0].sizes))
    axis = max(axes, key=lambda axis: len({box.offsets[axis] for box, _, _ in marked}), default=None)
    if axis is not None:
        marked.sort(key=lambda mark: mark[0].offsets[axis])
    found: list[tuple[int, int, Box]] = []
    open_: tuple[list[tuple[Box, int]], list[tuple[Box, int]]] = ([], [])
    for box, side, place in marked:
        across = open_[1 - side]
        if axis is not None:
            across[:] = [(o, p) for o, p in across if o.offsets[axis] + o.sizes[axis] > box.offsets[axis]]
        for other, there in across:
            if (inner := box.intersect(other)) is not None:
                found.append((there, place, inner) if side else (place, there, inner))
        open_[side].append((box, place))
    return sorted(found, key=lambda pair: pair[:2])


def less(box: Box, other: Box) -> list[Box]:
    """The elements of ``box`` that are not in ``other``, as boxes."""
    common = box.intersect(other)
    if common is None:
        return [box]
    found = []
    for axis, (low, high) in enumerate(zip(common.offsets, common.ends, strict=True)):
        for start, end in ((box.offsets[axis], low), (high, box.ends[axis])):
            if start < end:
                offsets = (*box.offsets[:axis], start, *box.offsets[axis + 1 :])
                sizes = (*box.sizes[:axis], end - start, *box.sizes[axis + 1 :])
                found.append(Box(offsets, sizes))
        box = Box(
            (*box.offsets[:axis], low, *box.offsets[axis + 1 :]),
            (*box.sizes[:axis], high - low, *box.sizes[axis + 1 :]),
        )
    return found


def check_exact_cover(name: str, shape: Sequence[int], boxes: Iterable[Box], where: str) -> None:
    """Raise CoverageError unless the boxes hold each element of ``shape`` exactly once."""
    whole = Box.whole(shape)
    present = [box for box in boxes if box.volume]
    for box in present:
        if not box.inside(shape):
            raise CoverageError(f"{name}: box {box} lies outside shape {tuple(shape)}; {where}")
    held = sum(box.volume for box in present)
    if held != whole.volume:
        verb = "leave out" if held < whole.volume else "repeat"
        raise CoverageError(
            f"{name}: expected boxes of {whole.volume} elements in all, got {held}: they {verb} "
            f"{abs(whole.volume - held)}; {where}"
        )
    # Equal volume leaves overlaps only together with gaps. Sorted by the first axis, a box can only
    # meet those that start before it ends, so shards along that axis cost n log n.
    present.sort(key=lambda box: box.offsets)
    for i, box in enumerate(present):
        for other in present[i + 1 :]:
            if box.offsets and other.offsets[0] >= box.ends[0]:
                break
            if (overlap := box.intersect(other)) is not None:
                raise CoverageError(f"{name}: boxes {box} and {other} both hold {overlap}; {where}")
