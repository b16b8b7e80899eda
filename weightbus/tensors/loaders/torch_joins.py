"""What a conversion makes of tensors, as boxes: of views, copies, ``cat`` and ``stack``, without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weightbus.planning.box import Box
from weightbus.tensors.loaders.torch_trace import _Recorder, _view
from weightbus.tensors.loaders.trace import Grid, Piece, Untraceable

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Move:
    """``box`` of the tensor ``wire`` lies in ``target``, a box of the converted one.

    axes: for each axis of the box, that of the target along which it lies; -1 for one of a single element.
    """

    wire: str
    box: Box
    target: Box
    axes: tuple[int, ...]

    def within(self, held: Box, view: Tensor) -> tuple[Box, Tensor] | None:
        """What of it lies in ``held``, of which ``view`` is the memory: the box of the wire tensor, and the
        part of the view in its axes."""
        inner = self.target.intersect(held)
        if inner is None:
            return None
        low = [o - base for o, base in zip(inner.offsets, self.target.offsets, strict=True)]
        offsets = [
            o + (low[axis] if axis >= 0 else 0) for o, axis in zip(self.box.offsets, self.axes, strict=True)
        ]
        sizes = [inner.sizes[axis] if axis >= 0 else 1 for axis in self.axes]
        part = view[inner.within(held)]
        strides = [part.stride(axis) if axis >= 0 else 1 for axis in self.axes]
        return Box(tuple(offsets), tuple(sizes)), part.as_strided(sizes, strides, part.storage_offset())


def trace_conversion(
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], wires: Mapping[str, tuple[Sequence[int], str]]
) -> dict[str, tuple[tuple[int, ...], str, list[Move]]]:
    """Shape, dtype and moves of each tensor that ``run`` makes of tensors on the meta device.

    wires: shape and dtype by name. Raises Untraceable, with the reason, unless it does nothing but move
    elements, each to one place.
    """
    given = {
        name: torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in wires.items()
    }
    recorder = _Joins(given)
    try:
        with torch.no_grad(), recorder:
            made = run(given)
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(f"on tensors without data it raised {type(error).__name__}: {error}") from error
    return {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), recorder.moves(tensor))
        for name, tensor in made.items()
    }


class _Joins(_Recorder):  # type: ignore[no-untyped-call]
    """Says where the pieces of a tensor come from."""

    def __init__(self, wires: Mapping[str, Tensor]) -> None:
        super().__init__(wires, {}, False, {})

    def moves(self, tensor: Tensor) -> list[Move]:
        """Where all of a tensor comes from. Raises Untraceable where a part of it does not."""
        if not self._known(tensor):
            raise Untraceable("it makes a tensor that is not of those that it was given")
        shape = tuple(tensor.shape)
        whole = torch.empty(shape, device="meta")
        grid = Grid.like(whole)
        found = [
            move
            for piece in self._pieces(tensor, _view(whole), tensor.dtype, grid)
            for move in _moves(piece, grid)
        ]
        if sum(move.target.volume for move in found) != tensor.numel():
            raise Untraceable("it leaves elements out")
        return found


def _moves(piece: Piece, grid: Grid) -> list[Move]:
    """A piece as moves along axes: in slices, where two of its axes lie along one of the target's."""
    axes: list[int] = []
    for axis, (size, stride) in enumerate(zip(piece.view.sizes, piece.view.strides, strict=True)):
        own = -1 if size == 1 else next((a for a in grid.axes() if grid.strides[a] <= stride), -2)
        if own == -2 or (own >= 0 and (grid.strides[own] != stride or own in axes)):
            return [move for part in _slices(piece, axis, grid) for move in _moves(part, grid)]
        axes.append(own)
    return [Move(piece.wire, piece.box, piece.target, tuple(axes))]


def _slices(piece: Piece, axis: int, grid: Grid) -> list[Piece]:
    found = []
    for i in range(piece.box.sizes[axis]):
        offsets, sizes = [0] * len(piece.box.sizes), list(piece.box.sizes)
        offsets[axis], sizes[axis] = i, 1
        view = piece.view.sub(Box(tuple(offsets), tuple(sizes)))
        box = Box(tuple(o + n for o, n in zip(piece.box.offsets, offsets, strict=True)), tuple(sizes))
        place = grid.place(view.offset)
        ends = grid.place(view.offset + sum((n - 1) * s for n, s in zip(view.sizes, view.strides, strict=True)))
        own = Box(place, tuple(end - begin + 1 for begin, end in zip(place, ends, strict=True)))
        found.append(replace(piece, box=box, view=view, target=own))
    return found
