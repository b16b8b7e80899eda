"""Runs a loader hook on recording tensors: stand-ins on the meta device, with strides but no data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightbus.planning.box import Box, overlap
from weightbus.tensors.loaders.torch_stand_ins import live_storages, standing_in, storage_of
from weightbus.tensors.loaders.trace import (
    Effect,
    Fault,
    Grid,
    Overwritten,
    Piece,
    Untraceable,
    View,
    fills_of,
    pieces_of,
)

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.clone.default)
# What torch raises where an operation needs data, with the word meta; loading code's own errors are others.
_LACKING = (NotImplementedError, RuntimeError, TypeError)
_META = re.compile(r"\bmeta\b", re.IGNORECASE)
# How values go where nothing follows them.
_ESCAPES = {"item", "tolist", "numpy", "__array__", "__dlpack__", "data_ptr"}
# What code asks of a tensor's device, on which it may go other ways.
_DEVICES: dict[Any, Callable[[torch.device], object]] = {
    Tensor.device.__get__: lambda device: device,
    Tensor.is_cpu.__get__: lambda device: device.type == "cpu",  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda device: device.type == "cuda",  # type: ignore[attr-defined]
}

_EMPTIES = (
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.empty_strided.default,
    _aten.new_empty_strided.default,
)
_FILLS = (_aten.fill_.Scalar, _aten.zero_.default)


@dataclass(frozen=True, slots=True)
class Traced:
    """What a run of loading code does. effects: by parameter; pieces name their wire tensors.

    casts: the dtype in which a wire tensor is written, where it is not its own.
    """

    effects: dict[str, Effect]
    casts: dict[str, torch.dtype]


def trace(
    hook: Callable[[dict[str, Tensor], Tensor], object],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    parameters: Mapping[str, Tensor],
) -> dict[str, Effect]:
    """What ``hook(parameters, wire tensor)`` does to each parameter, found without touching any.

    shape, dtype: the wire tensor's. Raises Untraceable, with the reason, unless the hook does nothing but
    view, copy and fill. The hook runs once, on stand-ins of the parameters' own classes and attributes.
    """
    wire = torch.empty(shape, dtype=dtype, device="meta")
    return trace_many(lambda stand_ins, _: hook(stand_ins, wire), {"": wire}, parameters).effects


def trace_many(
    run: Callable[[dict[str, Tensor], Callable[[], None]], object],
    wires: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    *,
    ties: Mapping[str, str] | None = None,
    allow_casts: bool = False,
) -> Traced:
    """``trace`` for code that is given many wire tensors, by name, all on the meta device.

    run: is also given a function that raises what has made it untraceable so far, as code may catch that.

    ties: names that are one tensor: what one of them writes once more, to the same place, is no second write.

    allow_casts: write casts down instead of refusing them; the pieces then hold elements, not bytes.
    """
    with standing_in(parameters) as stand_ins:
        recorder = _Recorder(wires, stand_ins, allow_casts, ties or {})
        recorder.names |= live_storages(parameters)
        try:
            with torch.no_grad(), recorder, _LikeLive(recorder, parameters):
                run(stand_ins, recorder.look)
        except Untraceable:
            raise
        except Exception as error:
            recorder.look()
            if isinstance(error, _LACKING) and _META.search(str(error)):
                raise Untraceable(f"on a tensor without data it raised {_told(error)}") from error
            raise Fault(f"it raised {_told(error)}") from error
        recorder.look()
        if recorder.caught is not None:
            raise Untraceable(f"it goes on after {_told(recorder.caught)}")
        for name, tensor in stand_ins.items():
            if recorder.names.get(storage_of(tensor)) != name:
                raise Fault(f"it gives {name} another storage, where what reads the old one would go on")
    boxes: dict[str, list[Box]] = {}
    for piece in (piece for effect in recorder.effects.values() for piece in effect.pieces):
        boxes.setdefault(piece.wire, []).append(piece.box)
    if any(overlap(found) for found in boxes.values()):
        raise Untraceable("it writes an element to two places")
    return Traced(recorder.effects, recorder.casts)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True)
class _Part:
    """One of the tensors that were joined. box: where it lies. axis: the one that it lacks; -1 is none."""

    tensor: Tensor
    box: Box
    axis: int


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets views through, writes copies and fills down, and refuses all else that touches a recorded tensor."""

    def __init__(
        self,
        wires: Mapping[str, Tensor],
        stand_ins: Mapping[str, Tensor],
        allow_casts: bool,
        ties: Mapping[str, str],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.effects: dict[str, Effect] = {}
        self.casts: dict[str, torch.dtype] = {}
        self._reason: Untraceable | None = None
        self.caught: Exception | None = None  # by the code, if that ends well
        self._allow_casts, self._ties = allow_casts, ties
        self.names = {storage_of(tensor): name for name, tensor in stand_ins.items()}
        self._grids = {name: Grid.like(tensor) for name, tensor in stand_ins.items()}
        self._wires = {storage_of(wire): name for name, wire in wires.items()}
        # Storages of the wire tensors and of copies of their views: a copy holds what its source holds.
        self._sources: dict[int, tuple[Tensor, Tensor | None]] = {
            storage_of(wire): (wire, None) for wire in wires.values()
        }
        # By storage: what was put together of several tensors, at once or in pieces; and what was made for it.
        self._joins: dict[int, list[_Part]] = {}
        self._scratch: dict[int, Tensor] = {}
        # Of these, some that others were made of, which are looked up as they are when those are copied on.
        self._settled: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing here is compiled, and to be skipped by torch._dynamo takes seconds to import it."""
        return False

    def look(self) -> None:
        """Raise the first reason why the code can't be traced, which it may have caught."""
        if self._reason is not None:
            raise self._reason

    def note(self, reason: Untraceable) -> None:
        """Keep the first reason."""
        self._reason = self._reason or reason

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return self._record(func, args, dict(kwargs or {}))
        except Untraceable as reason:
            self.note(reason)
            raise

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [tensor for tensor in tensors if self._known(tensor)]
        if any(tensor.is_conj() or tensor.is_neg() for tensor in known):
            raise Untraceable("it reads weights conjugated or negated")
        if func is _aten.copy_.default and known:
            if storage_of(args[0]) in self._scratch:
                self._collect(args[0], args[1])
            else:
                self._copy(args[0], args[1])
            return args[0]
        if func in (_aten.cat.default, _aten.stack.default) and any(map(self._known, args[0])):
            result = func(*args, **kwargs)
            dim = int(args[1] if len(args) > 1 else kwargs.get("dim", 0)) % result.dim()
            self._join(result, args[0], dim, lacks=func is _aten.stack.default)
            return result
        if func in _FILLS and known:
            self._fill(args[0], args[1] if len(args) > 1 else 0)
            return args[0]
        if func in _COPIES and storage_of(args[0]) in self._sources:
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("meta")
            kwargs.pop("pin_memory", None)
            copy = func(*args, **kwargs)
            self._sources[storage_of(copy)] = copy, args[0]
            self._settled.add(storage_of(args[0]))
            return copy
        if func in _EMPTIES:
            result = func(*args, **{**kwargs, "device": torch.device("meta"), "pin_memory": None})
            self._scratch[storage_of(result)] = result
            return result
        if func._schema.is_mutable and tensors:
            raise Untraceable(f"it changes tensors by {func}")
        result = func(*args, **kwargs)
        if known:
            for leaf in tree_leaves(result):
                if not isinstance(leaf, Tensor) or not self._known(leaf) or leaf.dtype != known[0].dtype:
                    raise Untraceable(f"it computes with weights, by {func}")
        return result

    def _known(self, tensor: Tensor) -> bool:
        storage = storage_of(tensor)
        return storage in self.names or storage in self._sources

    def stands_for(self, tensor: object) -> str | None:
        """The parameter that a tensor is a view of; empty for others that have no data; None for all else."""
        if not isinstance(tensor, Tensor):
            return None
        storage = storage_of(tensor)
        other = "" if storage in self._sources or storage in self._scratch else None
        return self.names.get(storage, other)

    def _fill(self, view: Tensor, value: complex) -> None:
        name = self._written(view)
        if value != value:
            raise Untraceable(f"it fills {name} with NaN, which equals nothing")
        fills = fills_of(_view(view), self._grids[name], value)
        self.effects[name] = self.effects.get(name, Effect()).filled(fills)

    def _copy(self, view: Tensor, source: Tensor) -> None:
        name = self._written(view)
        if storage_of(source) not in self._sources:
            raise Untraceable(f"it copies into {name} what is not of the tensor that arrived")
        pieces = self._pieces(source.expand(view.shape), _view(view), view.dtype, self._grids[name])
        effect = self.effects.get(name, Effect())
        for other in effect.pieces:
            if other.wire not in {piece.wire for piece in pieces} and overlap(
                [other.target], [piece.target for piece in pieces if not self._again(piece, effect)]
            ):
                raise Overwritten(
                    f"it writes {pieces[0].wire} over {other.wire}, which has been copied to {name}"
                )
        self.effects[name] = effect.copied([piece for piece in pieces if not self._again(piece, effect)])

    def _join(self, result: Tensor, tensors: Sequence[Tensor], dim: int, *, lacks: bool) -> None:
        parts, at = [], 0
        for tensor in tensors:
            if not self._known(tensor) or tensor.dtype != result.dtype:
                raise Untraceable("it joins weights with what is none, or of another dtype")
            self._settled.add(storage_of(tensor))
            size = 1 if lacks else tensor.shape[dim] if tensor.dim() == result.dim() else 0
            offsets, sizes = [0] * result.dim(), list(result.shape)
            offsets[dim], sizes[dim] = at, size
            parts.append(_Part(tensor, Box(tuple(offsets), tuple(sizes)), dim if lacks else -1))
            at += size
        self._joins[storage_of(result)] = parts
        self._sources[storage_of(result)] = result, None

    def _collect(self, view: Tensor, source: Tensor) -> None:
        """A copy into memory that the loading code has made itself, to be copied on from there."""
        if storage_of(source) not in self._sources:
            raise Untraceable("it puts weights together with what is none")
        if source.dtype != view.dtype:
            raise Untraceable(f"it casts from {source.dtype} to {view.dtype} on the way")
        if storage_of(view) in self._settled:
            raise Untraceable("it writes over weights that it has made others of")
        self._settled.add(storage_of(source))
        scratch = self._scratch[storage_of(view)]
        found = pieces_of(_view(view), Grid.like(scratch), _view(view), Grid.like(scratch))
        if len(found) != 1 or found[0].box.sizes != tuple(view.shape):
            raise Untraceable("it puts weights together in scattered pieces")
        box = found[0].box
        parts = [part for part in self._joins.get(storage_of(view), []) if box.intersect(part.box) != part.box]
        if overlap([part.box for part in parts], [box]):
            raise Untraceable("it puts weights together in pieces that overlap")
        # What was copied on from there so far is written down already.
        self._joins[storage_of(view)] = [*parts, _Part(source.expand(view.shape), box, -1)]
        self._sources[storage_of(view)] = scratch, None

    def _again(self, piece: Piece, effect: Effect) -> bool:
        """Whether a name that is tied to this one's has written the same there."""
        tie = self._ties.get(piece.wire)
        return tie is not None and any(
            replace(other, wire=piece.wire) == piece and self._ties.get(other.wire) == tie
            for other in effect.pieces
        )

    def _written(self, view: Tensor) -> str:
        name = self.names.get(storage_of(view))
        if name is None:
            raise Untraceable("it writes to a tensor that is no parameter")
        return name

    def _pieces(self, source: Tensor, target: View, dtype: torch.dtype, grid: Grid) -> list[Piece]:
        """A copy from a view of a wire tensor, or of a copy of one, whose own source is looked up."""
        held, origin = self._sources[storage_of(source)]
        if source.dtype != dtype and not self._allow_casts:
            raise Untraceable(f"it casts from {source.dtype} to {dtype}")
        if (parts := self._joins.get(storage_of(source))) is not None:
            return self._joined(parts, source, target, dtype, grid)
        pieces = pieces_of(_view(source), Grid.like(held), target, grid)
        if origin is None:
            wire = self._wires[storage_of(source)]
            if source.dtype != dtype and self.casts.setdefault(wire, dtype) != dtype:
                raise Untraceable(f"it casts from {source.dtype} to {self.casts[wire]} and to {dtype}")
            return [replace(piece, wire=wire) for piece in pieces]
        found = []
        for piece in pieces:
            inner = origin[tuple(slice(o, e) for o, e in zip(piece.box.offsets, piece.box.ends, strict=True))]
            found += self._pieces(inner, piece.view, dtype if self._allow_casts else held.dtype, grid)
        return found

    def _joined(
        self, parts: Sequence[_Part], source: Tensor, target: View, dtype: torch.dtype, grid: Grid
    ) -> list[Piece]:
        """As ``_pieces``, of what was put together."""
        held, _ = self._sources[storage_of(source)]
        found = []
        for piece in pieces_of(_view(source), Grid.like(held), target, grid):
            lacking = piece.box.volume
            for part in parts:
                inner = piece.box.intersect(part.box)
                if inner is None:
                    continue
                lacking -= inner.volume
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
            if lacking:
                raise Untraceable("it copies elements on that it has not set")
        return found


class _LikeLive(TorchFunctionMode):
    """Gives stand-ins the devices of what they stand for, and notes what asks them for data."""

    def __init__(self, recorder: _Recorder, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._recorder = recorder
        self._devices = {name: tensor.device for name, tensor in parameters.items()}
        # Wire tensors arrive where the parameters are.
        self._devices[""] = next(iter(self._devices.values()), torch.device("meta"))

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = self._recorder.stands_for(args[0]) if args else None
        if name is not None:
            device = self._devices[name]
            if (answer := _DEVICES.get(func)) is not None:
                return answer(device)
            args = tuple("meta" if isinstance(arg, torch.device) and arg == device else arg for arg in args)
            if kwargs.get("device") == device:
                kwargs = {**kwargs, "device": "meta"}
            if (asked := getattr(func, "__name__", "")) in _ESCAPES:
                self._recorder.note(Untraceable(f"it asks for values, by {asked}"))
        try:
            return func(*args, **kwargs)
        except Exception as error:
            if any(self._recorder.stands_for(leaf) is not None for leaf in tree_leaves((args, kwargs))):
                if isinstance(error, NotImplementedError) or _META.search(str(error)):
                    self._recorder.note(Untraceable(f"on a tensor without data it raised {_told(error)}"))
                self._recorder.caught = error
            raise


def _less(inner: Box, outer: Box) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets in ``outer``, and sizes."""
    return tuple(o - base for o, base in zip(inner.offsets, outer.offsets, strict=True)), inner.sizes


def _view(tensor: Tensor) -> View:
    return View(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))
