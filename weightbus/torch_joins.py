"""What a conversion makes of tensors, as boxes: of views, copies, ``cat`` and ``stack``, without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from weightbus.box import Box
from weightbus.torch_trace import _Recorder, _storage, _view
from weightbus.trace import Grid, Piece, Untraceable, View, pieces_of

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


@dataclass(frozen=True, slots=True)
class _Part:
    """One of the tensors that were joined. box: where it lies. axis: the one that it lacks; -1 is none."""

    tensor: Tensor
    box: Box
    axis: int


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
    """Writes down what was joined, and where the pieces of a tensor come from."""

    def __init__(self, wires: Mapping[str, Tensor]) -> None:
        super().__init__(wires, {}, False, {})
        self._joins: dict[int, list[_Part]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (_aten.cat.default, _aten.stack.default) and any(map(self._known, args[0])):
            result = func(*args, **(kwargs or {}))
            dim = int(args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)) % result.dim()
            self._join(result, args[0], dim, lacks=func is _aten.stack.default)
            return result
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _join(self, result: Tensor, tensors: Sequence[Tensor], dim: int, *, lacks: bool) -> None:
        parts, at = [], 0
        for tensor in tensors:
            if not self._known(tensor) or tensor.dtype != result.dtype:
                raise Untraceable("it joins weights with what is none, or of another dtype")
            size = 1 if lacks else tensor.shape[dim] if tensor.dim() == result.dim() else 0
            offsets, sizes = [0] * result.dim(), list(result.shape)
            offsets[dim], sizes[dim] = at, size
            parts.append(_Part(tensor, Box(tuple(offsets), tuple(sizes)), dim if lacks else -1))
            at += size
        self._joins[_storage(result)] = parts
        self._sources[_storage(result)] = result, None

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

    def _pieces(self, source: Tensor, target: View, dtype: torch.dtype, grid: Grid) -> list[Piece]:
        parts = self._joins.get(_storage(source))
        if parts is None:
            return super()._pieces(source, target, dtype, grid)
        held, _ = self._sources[_storage(source)]
        found = []
        for piece in pieces_of(_view(source), Grid.like(held), target, grid):
            for part in parts:
                inner = piece.box.intersect(part.box)
                if inner is None:
                    continue
                view = piece.view.sub(Box(*_less(inner, piece.box)))
                index = list(inner.within(part.box))
                if part.axis >= 0:
                    del index[part.axis]
                    kept = [axis for axis in range(len(view.sizes)) if axis != part.axis]
                    view = View(
                        tuple(view.sizes[axis] for axis in kept),
                        tuple(view.strides[axis] for axis in kept),
                        view.offset,
                    )
                found += self._pieces(part.tensor[tuple(index)], view, dtype, grid)
        return found


def _less(inner: Box, outer: Box) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets in ``outer``, and sizes."""
    return tuple(o - base for o, base in zip(inner.offsets, outer.offsets, strict=True)), inner.sizes


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
