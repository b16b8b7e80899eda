"""The digest in torch operations, close to the definition: it serves where no fast implementation can.

Bytes times weights is a matrix product. Weights are cut into limbs of 16 bits, so that float64 sums of up
to 2**29 products of a byte and a limb are exact integers, on every device and in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weightbus.digest.grid61 import P, axis_keys, outer_axes
from weightbus.memory.shard import Part
from weightbus.planning.box import Box
from weightbus.planning.spec import ITEMSIZE
from weightbus.tensors.bucket import torch_dtype

PIECE_BYTES = 1 << 17


class ReferenceSums:
    """Sums of parts on any device, piece by piece; the slow counterpart of CpuSums and CudaSums."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)

    def launch(self, seed: bytes, stream: torch.cuda.Stream | None) -> Callable[[], npt.NDArray[np.uint64]]:
        with torch.cuda.stream(stream):  # a no-op for None
            rows = [part_sums(part, seed) for part in self._parts]
        out = np.array(rows, dtype=np.uint64).reshape(len(rows), 2)
        return lambda: out


def part_sums(part: Part, seed: bytes) -> tuple[int, int]:
    """Both lanes' sums of one part, at its place in the global tensor."""
    tensor, itemsize = part.tensor, ITEMSIZE[part.spec.dtype]
    dtype = torch_dtype(part.spec.dtype)
    outer = outer_axes(part.spec.shape, itemsize)
    keys = axis_keys(seed, outer + 1)
    totals = [0, 0]
    for piece in part.box.split(PIECE_BYTES // itemsize):
        if piece.volume == 0:
            continue
        local = tensor[piece.within(part.box)].contiguous().to(dtype).reshape(-1).view(torch.uint8)
        place = _byte_positions(part.spec.shape, piece, outer, itemsize, local.device)
        matrix = local.reshape(-1, place.numel()).double()
        for lane in (0, 1):
            totals[lane] += _matrix_sum(matrix, place, piece, keys[lane])
    return totals[0] % P, totals[1] % P


def _byte_positions(
    shape: Sequence[int], piece: Box, outer: int, itemsize: int, device: torch.device
) -> Tensor:
    """Place in its canonical row of each byte of one row of the piece, ascending."""
    place = torch.arange(itemsize, device=device)
    pitch = itemsize
    for axis in reversed(range(outer, len(shape))):
        steps = torch.arange(piece.offsets[axis], piece.ends[axis], device=device) * pitch
        place = (steps[:, None] + place).reshape(-1)
        pitch *= shape[axis]
    return place


def _matrix_sum(matrix: Tensor, place: Tensor, piece: Box, keys: list[int]) -> int:
    """One lane's sum of a piece, given as rows of bytes."""
    first = int(place[0]) // 4
    powers = _powers(keys[0], int(place[-1]) // 4 - first + 1, place.device)
    weights = _rotate(powers[place // 4 - first], place % 4 * 8)
    limbs = torch.stack([weights >> shift & 0xFFFF for shift in (0, 16, 32, 48)], dim=1)
    products = (matrix @ limbs.double()).long()
    rows = torch.zeros_like(products[:, 0])
    for column, shift in enumerate((0, 16, 32, 48)):
        rows = (rows + _rotate(products[:, column], torch.tensor(shift, device=rows.device))) % P
    row_weights = torch.full_like(rows[:1], pow(keys[0], first, P))
    outer = len(keys) - 1
    for axis in range(outer):
        key = keys[outer - axis]
        start = torch.full_like(row_weights[:1], pow(key, piece.offsets[axis], P))
        steps = _multiply(_powers(key, piece.sizes[axis], rows.device), start)
        row_weights = _multiply(row_weights[:, None], steps).reshape(-1)
    terms = _multiply(rows, row_weights)
    return int((terms >> 31).sum()) * 2**31 + int((terms & 0x7FFFFFFF).sum())


def _powers(key: int, count: int, device: torch.device) -> Tensor:
    """key**0, ..., key**(count - 1) mod P; of more than ``count`` for the cache's sake, cut."""
    return _power_table(key, (count - 1).bit_length(), device)[:count]


@lru_cache(maxsize=16)
def _power_table(key: int, bits: int, device: torch.device) -> Tensor:
    powers = torch.ones(1, dtype=torch.int64, device=device)
    for bit in range(bits):
        step = torch.tensor(pow(key, 1 << bit, P), device=device)
        powers = torch.cat([powers, _multiply(powers, step)])
    return powers


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a * b mod P for int64 in [0, P), with limbs of 31 bits: 2**62 = 2 and 2**61 = 1 mod P."""
    a1, a0, b1, b0 = a >> 31, a & 0x7FFFFFFF, b >> 31, b & 0x7FFFFFFF
    middle = a0 * b1 + a1 * b0
    return (2 * a1 * b1 + a0 * b0 + ((middle & 0x3FFFFFFF) << 31) + (middle >> 30)) % P


def _rotate(a: Tensor, bits: Tensor) -> Tensor:
    """a * 2**bits mod P for int64 in [0, P) and bits below 61: a rotation of 61 bits."""
    return ((a << bits) & P) | (a >> (61 - bits))
