"""What loading code does with wire tensors, as boxes: from the strides of the copies that it makes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from torch import Tensor

from weightbus.planning.box import Box, less, overlap

# More pieces than this say that a tensor is scattered rather than cut into boxes.
MAX_PIECES = 4096


class Untraceable(Exception):
    """Why a hook's effect can't be written as boxes; never leaves this package."""


class Fault(Untraceable):
    """What loading code does with any tensors, with data too: an update by it is refused."""


class Overwritten(Fault):
    """Two wire tensors are written to the same elements: which of them counts is not to be guessed."""


@dataclass(frozen=True, slots=True)
class View:
    """Strided elements of a tensor's storage; ``offset`` counts elements from the tensor's first."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.sizes, self.strides, tensor.storage_offset() + self.offset)

    def sub(self, box: Box) -> View:
        """The elements of ``box``, which counts along this view's axes."""
        skipped = sum(n * stride for n, stride in zip(box.offsets, self.strides, strict=True))
        return View(box.sizes, self.strides, self.offset + skipped)


@dataclass(frozen=True, slots=True)
class Grid:
    """A tensor's shape and strides: where its elements lie, each in one place."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def like(cls, tensor: Tensor) -> Grid:
        return cls(tuple(tensor.shape), tuple(tensor.stride()))

    def axes(self) -> list[int]:
        """Axes of more than one element, the one with the largest stride first."""
        return sorted((a for a, n in enumerate(self.shape) if n > 1), key=lambda a: -self.strides[a])

    def place(self, offset: int) -> tuple[int, ...]:
        """Coordinates of the element ``offset`` elements after the first."""
        found = [0] * len(self.shape)
        for axis in self.axes():
            found[axis], offset = divmod(offset, self.strides[axis])
        if offset:
            raise Untraceable("it reaches between the elements of a tensor")
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Piece:
    """``box`` of a wire tensor goes to ``view`` of the parameter, which is its box ``target``.

    wire: the tensor's name, where there are several.
    """

    box: Box
    view: View
    target: Box
    wire: str = ""


@dataclass(frozen=True, slots=True)
class Fill:
    """``target``, a box of the parameter, is set to one number, as a padded vocabulary's tail is."""

    target: Box
    value: complex


@dataclass(frozen=True, slots=True)
class Effect:
    """All that loading code does to one parameter. Its boxes of the parameter are disjoint."""

    pieces: tuple[Piece, ...] = ()
    fills: tuple[Fill, ...] = ()

    @property
    def targets(self) -> list[Box]:
        """All boxes of the parameter that it writes."""
        return [piece.target for piece in self.pieces] + [fill.target for fill in self.fills]

    def copied(self, new: Sequence[Piece]) -> Effect:
        """This effect, then copies."""
        if overlap([piece.target for piece in self.pieces], [piece.target for piece in new]):
            raise Untraceable("it writes an element twice")
        return Effect((*self.pieces, *new), _without(self.fills, [piece.target for piece in new]))

    def filled(self, new: Sequence[Fill]) -> Effect:
        """This effect, then fills."""
        if overlap([piece.target for piece in self.pieces], [fill.target for fill in new]):
            raise Untraceable("it overwrites what it has copied")
        return Effect(self.pieces, (*_without(self.fills, [fill.target for fill in new]), *new))


@dataclass(frozen=True, slots=True)
class _Loop:
    """``count`` elements, ``source`` elements apart in the wire tensor, ``target`` apart in the parameter."""

    count: int
    source: int
    target: int


def pieces_of(source: View, wire: Grid, target: View, parameter: Grid) -> list[Piece]:
    """A copy from ``source`` of the wire tensor to ``target`` of the parameter, as boxes of both.

    Both views have the same sizes. Raises Untraceable where the copy is not a moderate number of boxes.
    """
    if 0 in source.sizes:
        return []
    loops = [
        _Loop(*loop) for loop in zip(source.sizes, source.strides, target.strides, strict=True) if loop[0] > 1
    ]
    if any(loop.source <= 0 or loop.target <= 0 for loop in loops):
        raise Untraceable("it writes one element to several places, or several to one")
    loops = [part for loop in loops for part in _split(loop, "source", wire, wire.place(source.offset))]
    loops = [
        part for loop in loops for part in _split(loop, "target", parameter, parameter.place(target.offset))
    ]
    kept, walked = _boxed(loops, wire, parameter)
    if math.prod(loop.count for loop in walked) > MAX_PIECES:
        raise Untraceable(f"it scatters the tensor into more than {MAX_PIECES} pieces")
    return [
        _piece(kept, source.offset + from_, wire, target.offset + to, parameter) for from_, to in _walk(walked)
    ]


def fills_of(target: View, parameter: Grid, value: complex) -> list[Fill]:
    """The elements of ``target`` as boxes of the parameter."""
    return [Fill(piece.target, value) for piece in pieces_of(target, parameter, target, parameter)]


def _split(loop: _Loop, side: str, grid: Grid, start: tuple[int, ...]) -> Iterator[_Loop]:
    """The loop in parts that each stay within one axis of the grid."""
    stride = getattr(loop, side)
    axis = next((a for a in grid.axes() if grid.strides[a] <= stride), None)
    if axis is None or stride % grid.strides[axis]:
        raise Untraceable("it steps across the rows of a tensor")
    step = stride // grid.strides[axis]
    if start[axis] + step * (loop.count - 1) < grid.shape[axis]:
        yield loop
        return
    inner, rest = divmod(grid.shape[axis], step)
    if rest or start[axis] >= step or loop.count % inner:
        raise Untraceable("it cuts a flattened tensor in the middle of a row")
    if inner > 1:
        yield replace(loop, count=inner)
    outer = _Loop(loop.count // inner, loop.source * inner, loop.target * inner)
    if outer.count > 1:
        yield from _split(outer, side, grid, start)


def _axis(stride: int, grid: Grid) -> int:
    return next(axis for axis in grid.axes() if grid.strides[axis] <= stride)


def _boxed(loops: list[_Loop], wire: Grid, parameter: Grid) -> tuple[dict[int, _Loop], list[_Loop]]:
    """Loops that make up a box of both, one for each axis of the wire tensor; and the others."""
    kept: dict[int, _Loop] = {}
    walked = []
    for loop in sorted(loops, key=lambda loop: loop.source):
        axis = _axis(loop.source, wire)
        before = kept.get(axis)
        if before is None and loop.source == wire.strides[axis]:
            kept[axis] = loop
        elif before and (loop.source, loop.target) == (
            before.source * before.count,
            before.target * before.count,
        ):
            kept[axis] = replace(before, count=before.count * loop.count)
        else:
            walked.append(loop)
    reach: dict[int, int] = {}  # how far each axis of the parameter is filled without a gap, by stride
    for axis, loop in sorted(kept.items(), key=lambda item: item[1].target):
        own = _axis(loop.target, parameter)
        if loop.target == reach.get(own, parameter.strides[own]):
            reach[own] = loop.target * loop.count
        else:
            walked.append(kept.pop(axis))
    return kept, walked


def _walk(loops: Sequence[_Loop]) -> Iterator[tuple[int, int]]:
    for indices in product(*(range(loop.count) for loop in loops)):
        yield (
            sum(i * loop.source for i, loop in zip(indices, loops, strict=True)),
            sum(i * loop.target for i, loop in zip(indices, loops, strict=True)),
        )


def _piece(kept: Mapping[int, _Loop], source: int, wire: Grid, target: int, parameter: Grid) -> Piece:
    sizes = tuple(kept[a].count if a in kept else 1 for a in range(len(wire.shape)))
    strides = tuple(kept[a].target if a in kept else 1 for a in range(len(wire.shape)))
    own = [1] * len(parameter.shape)
    for loop in kept.values():
        own[_axis(loop.target, parameter)] *= loop.count
    box = Box(wire.place(source), sizes)
    filled = Box(parameter.place(target), tuple(own))
    if not box.inside(wire.shape) or not filled.inside(parameter.shape):
        raise Untraceable("it reaches over the end of a row")
    return Piece(box, View(sizes, strides, target), filled)


def _without(fills: Iterable[Fill], boxes: Sequence[Box]) -> tuple[Fill, ...]:
    """The fills, less what is written over."""
    left = list(fills)
    for box in boxes:
        left = [Fill(rest, fill.value) for fill in left for rest in less(fill.target, box)]
    return tuple(left)
