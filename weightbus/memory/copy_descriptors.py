"""Copies as csrc/copy.cu takes them: rows of one pitch at each end, in units that one thread moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weightbus.planning.runs import runs_of

Pair = tuple[Tensor, Tensor]
"""Destination and source."""

# Kind in csrc/copy.cu
VECTORS, BYTES, FLOAT_TO_BFLOAT16, FLOAT_TO_HALF, ONE_TO_BFLOAT16, ONE_TO_HALF = range(6)
CASTS = {
    (torch.float32, torch.bfloat16): FLOAT_TO_BFLOAT16,
    (torch.float32, torch.float16): FLOAT_TO_HALF,
}
_ONE = {FLOAT_TO_BFLOAT16: ONE_TO_BFLOAT16, FLOAT_TO_HALF: ONE_TO_HALF}

_VECTOR_BYTES = 16
_CAST_UNIT = 8  # elements
_LONG_BYTES = 1 << 16  # more than this is not copied byte by byte, but left to torch


class Piece(NamedTuple):
    """The fields of ``Piece`` in csrc/copy.cu, but the tile: addresses, units of a row, pitches in bytes."""

    src: int
    dst: int
    units: int
    rows: int
    src_pitch: int
    dst_pitch: int
    kind: int


def piece_of(dst: Tensor, src: Tensor) -> Piece | None:
    """None where the kernel can't do it: casts, and what is long, must be aligned."""
    dims = _rows(dst, src)
    if dims is None or not dst.numel() or src.is_conj() or src.is_neg() or dst.is_conj() or dst.is_neg():
        return None
    rows, columns, dst_pitch, src_pitch = dims
    src_pitch, dst_pitch = src_pitch * src.itemsize, dst_pitch * dst.itemsize
    places = src.data_ptr() | dst.data_ptr() | src_pitch | dst_pitch
    aligned = places % _VECTOR_BYTES == 0
    if (cast := CASTS.get((src.dtype, dst.dtype))) is not None:
        if not aligned or columns % _CAST_UNIT:
            return None
        return Piece(src.data_ptr(), dst.data_ptr(), columns // _CAST_UNIT, rows, src_pitch, dst_pitch, cast)
    if src.dtype != dst.dtype:
        return None
    row_bytes = columns * src.itemsize
    unit, kind = (_VECTOR_BYTES, VECTORS) if aligned and row_bytes % _VECTOR_BYTES == 0 else (1, BYTES)
    if kind == BYTES and rows * row_bytes > _LONG_BYTES:
        return None
    return Piece(src.data_ptr(), dst.data_ptr(), row_bytes // unit, rows, src_pitch, dst_pitch, kind)


def _rows(dst: Tensor, src: Tensor) -> tuple[int, int, int, int] | None:
    """Both as rows of one pitch each: rows, columns, and the pitches, in elements; None where they are not."""
    dims: list[tuple[int, int, int]] = []  # size, and stride of both
    for size, one, other in zip(dst.shape, dst.stride(), src.stride(), strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * one and dims[-1][2] == size * other:
            dims[-1] = dims[-1][0] * size, one, other
        else:
            dims.append((size, one, other))
    columns, one, other = dims.pop() if dims else (1, 1, 1)
    if (one, other) != (1, 1) or len(dims) > 1:
        return None
    rows, dst_pitch, src_pitch = dims[0] if dims else (1, 0, 0)
    return rows, columns, dst_pitch, src_pitch


def cast_pieces(dst: Tensor, address: int, strides: Sequence[int], kind: int) -> list[Piece]:
    """What casts a box of floats at ``address``, of ``strides`` in elements, into all of ``dst``, wherever both
    lie. kind: of ``CASTS``."""
    found: list[Piece] = []
    for run in runs_of(dst.shape, dst.stride(), strides, itemsize=1):
        src, to = address + 4 * run.src, dst.data_ptr() + 2 * run.dst
        found += _cast_rows(src, to, run.width, run.rows, 4 * run.src_pitch, 2 * run.dst_pitch, kind)
    return found


def _cast_rows(
    src: int, dst: int, columns: int, rows: int, src_pitch: int, dst_pitch: int, kind: int
) -> Iterator[Piece]:
    """In units of 8 floats as far as they are aligned, else one by one."""
    if (src | dst | src_pitch | dst_pitch) % _VECTOR_BYTES:
        yield Piece(src, dst, columns, rows, src_pitch, dst_pitch, _ONE[kind])
        return
    whole = columns // _CAST_UNIT
    if whole:
        yield Piece(src, dst, whole, rows, src_pitch, dst_pitch, kind)
    if rest := columns % _CAST_UNIT:
        done = whole * _CAST_UNIT
        yield Piece(src + 4 * done, dst + 2 * done, rest, rows, src_pitch, dst_pitch, _ONE[kind])
