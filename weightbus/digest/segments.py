"""Where a part's bytes lie, as regular sets of runs, cut into tiles: what both fast implementations read.

The fields and their meaning are those of ``Segment`` and ``Slot`` in csrc/grid61.h, and of ``Store`` in
csrc/grid61.cu: where the bytes are written as they are digested, if they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
from torch import Tensor

from weightbus.digest.grid61 import outer_axes
from weightbus.memory.shard import Part
from weightbus.planning.box import Box
from weightbus.planning.spec import ITEMSIZE

WORD = 4
VECTOR = 16
SLOTS = 16
MAX_EXPONENT = 2**42  # of kDigits in csrc/grid61.h
_FIELDS = 15
_SLOT_FIELDS = 5
_STORE_FIELDS = 2

BoxCopy = tuple[Box, Tensor]
"""A box of a part, and where it is written: in the box's sizes, in the part's ``spec.dtype``."""


@dataclass(frozen=True, slots=True)
class Dim:
    """Runs repeat ``count`` times, ``stride`` bytes apart; each step multiplies by key[axis]**exponent.

    to: bytes between them where they are written.
    """

    count: int
    stride: int
    axis: int
    exponent: int
    to: int = 0


@dataclass(frozen=True, slots=True)
class Runs:
    """A regular set of byte runs, [lead, end) after ``address``; ``lead`` bytes of the first word precede it.

    starts: exponent of each canonical axis's key at the first word. to: the address at which the first run is
    written; 0 if none is.
    """

    address: int
    lead: int
    end: int
    starts: dict[int, int]
    dims: tuple[Dim, ...]
    to: int = 0

    def cut(self, low: int, high: int) -> Runs:
        """Bytes [low, high) of each run; ``low`` is a multiple of a word."""
        starts = {**self.starts, 0: self.starts[0] + low // WORD}
        lead, to = 0 if low else self.lead, self.to + low if self.to else 0
        return replace(self, address=self.address + low, lead=lead, end=high - low, starts=starts, to=to)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How tiles are cut. threads: vectors of a strip that are read at once; 1 walks run by run."""

    strip_bytes: int
    tile_bytes: int
    threads: int


@dataclass(frozen=True, slots=True)
class Segments:
    """table: int64 array of shape (segments, fields of Segment); stores: of shape (segments, fields of Store),
    zeros where nothing is written. axes: canonical axes that have keys."""

    table: npt.NDArray[np.int64]
    stores: npt.NDArray[np.int64]
    first_tiles: npt.NDArray[np.int64]
    tiles: int
    axes: int


def runs_of(part: Part, dst: Tensor | None = None) -> list[Runs]:
    """The part's bytes as sets of runs with one phase each; empty for no elements.

    dst: where they are written, in the part's sizes and ``spec.dtype``; else nowhere.
    """
    tensor, box, shape = part.tensor, part.box, part.spec.shape
    if box.volume == 0:
        return []
    itemsize = ITEMSIZE[part.spec.dtype]
    lies_at = tensor.data_ptr() // (tensor.element_size() // itemsize)  # as if it lay as it travels
    strides = [step * itemsize for step in tensor.stride()]
    goes_to = 0 if dst is None else dst.data_ptr()
    to = [0] * len(strides) if dst is None else [step * itemsize for step in dst.stride()]
    outer = outer_axes(shape, itemsize)
    starts = {outer - axis: box.offsets[axis] for axis in range(outer) if box.offsets[axis]}
    dims = [
        Dim(box.sizes[axis], strides[axis], outer - axis, 1, to[axis])
        for axis in range(outer)
        if box.sizes[axis] > 1
    ]
    run, place, pitch = itemsize, 0, itemsize
    inner: list[
        tuple[int, int, int, int]
    ] = []  # count, stride, pitch in the row, to: what the run can't take in
    for axis in reversed(range(outer, len(shape))):
        count, stride = box.sizes[axis], strides[axis]
        place += box.offsets[axis] * pitch
        if count > 1:
            last = inner[-1] if inner else (1, run, run, run if goes_to else 0)
            if (stride, pitch, to[axis]) != tuple(last[0] * step for step in last[1:]):
                inner.append((count, stride, pitch, to[axis]))
            elif inner:
                inner[-1] = (last[0] * count, *last[1:])
            else:
                run *= count
        pitch *= shape[axis]
    # Pieces whose pitch is no multiple of a word take turns through 2 or 4 phases: one set for each.
    turns = [WORD // math.gcd(pitch, WORD) for _, _, pitch, _ in inner]
    found = []
    for turn in product(*map(range, turns)):
        begin, address, written_to, row_dims = place, lies_at, goes_to, []
        for first, step, (count, stride, pitch, apart) in zip(turn, turns, inner, strict=True):
            begin += first * pitch
            address += first * stride
            written_to += first * apart
            times = -(-(count - first) // step)
            row_dims.append(Dim(times, stride * step, 0, pitch * step // WORD, apart * step))
        if all(dim.count > 0 for dim in row_dims):
            lead = begin % WORD
            many = tuple(dim for dim in (*dims, *row_dims) if dim.count > 1)
            starting = {**starts, 0: begin // WORD}
            found.append(Runs(address - lead, lead, lead + run, starting, many, written_to))
    return found


def segments_of(parts: Sequence[Part], tiling: Tiling, copies: Sequence[Sequence[BoxCopy]] = ()) -> Segments:
    """All parts' runs in tiles. copies: where each part is written; those that are hold each element once.

    Raises NotImplementedError for a part that needs more than SLOTS slots, or powers beyond MAX_EXPONENT.
    """
    rows: list[tuple[int, ...]] = []
    stores: list[tuple[int, ...]] = []
    first_tiles = []
    tiles, axes = 0, 1
    for number, part in enumerate(parts):
        for runs in _all_runs(part, copies[number] if copies else ()):
            axes = max(axes, 1 + max((*runs.starts, *(dim.axis for dim in runs.dims))))
            for piece in _pieces(runs, tiling):
                row, store, count = _segment(piece, tiling, tiles, number, part.narrowed)
                rows.append(row)
                stores.append(store)
                first_tiles.append(tiles)
                tiles += count
    width = _FIELDS + SLOTS * _SLOT_FIELDS
    return Segments(
        np.array(rows, dtype=np.int64).reshape(len(rows), width),
        np.array(stores, dtype=np.int64).reshape(len(rows), _STORE_FIELDS + SLOTS),
        np.array(first_tiles, np.int64),
        tiles,
        axes,
    )


def _all_runs(part: Part, copies: Sequence[BoxCopy]) -> Iterator[Runs]:
    if not copies:
        yield from runs_of(part)
    for box, dst in copies:
        yield from runs_of(replace(part, box=box, tensor=part.tensor[box.within(part.box)]), dst)


def why_not_written(part: Part, copies: Sequence[BoxCopy]) -> str:
    """Why a kernel can't write what it reads of ``part``, all of it once, in whole vectors; empty if it can."""
    boxes = [box for box, _ in copies]
    if sum(box.volume for box in boxes) != part.box.volume or any(
        one.intersect(other) for one, other in combinations(boxes, 2)
    ):
        return "what is copied of it is not all that is digested, once"
    vector = VECTOR // 2 if part.narrowed else VECTOR  # addresses of what is cast are halved
    for runs in _all_runs(part, copies):
        read, written = runs.address, runs.to
        for dim in runs.dims:
            read, written = read | dim.stride, written | dim.to
        if runs.lead or runs.end % VECTOR or read % vector or written % VECTOR:
            return f"its rows are not made of {VECTOR} bytes each at both ends"
        if len(runs.dims) + len(runs.starts) + 3 > SLOTS:
            return f"more than {SLOTS} dimensions"
    return ""


def _pieces(runs: Runs, tiling: Tiling) -> Iterator[Runs]:
    """Runs as whole strips and remainders, so that the threads over a short remainder read rows abreast."""
    if tiling.threads == 1:
        yield runs
        return
    strip = tiling.strip_bytes
    pieces = [runs]
    longest = max((dim.count for dim in runs.dims), default=1)
    if longest < min(64, runs.end // strip):
        # Few long runs: walk along the run, as over rows of up to 8 strips.
        pitch = strip << min(3, max(0, (runs.end // strip // 32).bit_length() - 1))
        head = pitch if runs.lead else 0
        rows = (runs.end - head) // pitch
        body = runs.cut(head, head + pitch)
        body = replace(body, dims=(*body.dims, Dim(rows, pitch, 0, pitch // WORD, pitch)))
        tail = head + rows * pitch
        pieces = [body] if rows else []
        pieces += [runs.cut(0, head)] if head else []
        pieces += [runs.cut(tail, runs.end)] if tail < runs.end else []
    for piece in pieces:
        whole = piece.end // strip * strip
        if whole:
            yield piece.cut(0, whole)
        if whole < piece.end:
            yield piece.cut(whole, piece.end)


def _segment(
    runs: Runs, tiling: Tiling, first_tile: int, part: int, cast: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """One row of the table and of the stores, and its number of tiles. cast: as ``Part.narrowed``."""
    dims = list(runs.dims)
    walk = Dim(1, 0, 0, 0)
    if dims:
        # Short runs are read abreast, so they should be neighbors; long ones want the longest walk.
        many = [dim for dim in dims if dim.count >= 16] if runs.end < 128 else []
        walk = min(many, key=lambda dim: dim.stride) if many else max(dims, key=lambda dim: dim.count)
        dims.remove(walk)
    strips = -(-runs.end // tiling.strip_bytes)
    strip_bytes = min(runs.end, tiling.strip_bytes)
    abreast = max(1, min(walk.count, tiling.threads // -(-strip_bytes // VECTOR)))
    chunk = max(1, tiling.tile_bytes // (abreast * strip_bytes))
    if tiling.threads > 1:
        chunk = min(chunk, max(1, tiling.tile_bytes // tiling.strip_bytes))
    chunks = -(-walk.count // (abreast * chunk))
    chunk_rows = -(-walk.count // (chunks * abreast)) * abreast
    chunks = -(-walk.count // chunk_rows)

    starts = dict(runs.starts)
    slots = [(strips, tiling.strip_bytes, 0, tiling.strip_bytes // WORD, starts.pop(0))]
    slots.append(
        (chunks, walk.stride * chunk_rows, walk.axis, walk.exponent * chunk_rows, starts.pop(walk.axis, 0))
    )
    slots += [(dim.count, dim.stride, dim.axis, dim.exponent, starts.pop(dim.axis, 0)) for dim in dims]
    to = [runs.to, walk.to, tiling.strip_bytes, walk.to * chunk_rows, *(dim.to for dim in dims)]
    slots += [(1, 0, axis, 0, start) for axis, start in starts.items()]
    if len(slots) > SLOTS:
        raise NotImplementedError(f"more than {SLOTS} dimensions")
    if any(start + count * exponent > MAX_EXPONENT for count, _, _, exponent, start in slots):
        raise NotImplementedError(f"places beyond {MAX_EXPONENT} rows or words")
    bits = runs.address | walk.stride | VECTOR
    for dim in dims:
        bits |= dim.stride
    fields = (
        runs.address, first_tile, part, runs.lead, runs.end, tiling.strip_bytes, walk.count, chunk_rows,
        walk.stride, walk.axis, walk.exponent, abreast, bits & -bits, cast, len(slots),
    )  # fmt: skip
    unused = (0,) * ((SLOTS - len(slots)) * _SLOT_FIELDS)
    store = (*to, *(0,) * (_STORE_FIELDS + SLOTS - len(to))) if runs.to else (0,) * (_STORE_FIELDS + SLOTS)
    return (*fields, *(n for slot in slots for n in slot), *unused), store, math.prod(slot[0] for slot in slots)
