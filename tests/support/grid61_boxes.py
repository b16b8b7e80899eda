"""Tensors, parts and partitions that the digest's tests share."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from weightbus.memory.shard import Part
from weightbus.planning.box import Box
from weightbus.planning.spec import Spec

DTYPES = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.int64, 16: torch.complex128}


def from_bytes(data: Sequence[int], itemsize: int, sizes: Sequence[int], device: str = "cpu") -> Tensor:
    raw = torch.tensor(list(data), dtype=torch.uint8, device=device)
    return raw.view(DTYPES[itemsize]).reshape(tuple(sizes))


def random_tensor(rng: random.Random, itemsize: int, sizes: Sequence[int], device: str = "cpu") -> Tensor:
    return from_bytes(rng.randbytes(math.prod(sizes) * itemsize), itemsize, sizes, device)


def to_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).tolist())


def part_of(
    tensor: Tensor, shape: Sequence[int] | None = None, box: Box | None = None, name: str = "t"
) -> Part:
    shape = tuple(tensor.shape if shape is None else shape)
    spec = Spec(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=shape)
    return Part(spec=spec, box=box or Box.whole(shape), tensor=tensor)


def partition(rng: random.Random, box: Box, pieces: int) -> list[Box]:
    """Random boxes that hold each element of ``box`` once."""
    axes = [axis for axis, n in enumerate(box.sizes) if n > 1]
    if pieces <= 1 or not axes:
        return [box]
    axis = rng.choice(axes)
    cut = rng.randrange(1, box.sizes[axis])
    left = rng.randrange(1, pieces)
    low, high = _halves(box, axis, cut)
    return partition(rng, low, left) + partition(rng, high, pieces - left)


def _halves(box: Box, axis: int, cut: int) -> tuple[Box, Box]:
    def put(values: tuple[int, ...], value: int) -> tuple[int, ...]:
        return (*values[:axis], value, *values[axis + 1 :])

    offset, size = box.offsets[axis], box.sizes[axis]
    return (
        Box(box.offsets, put(box.sizes, cut)),
        Box(put(box.offsets, offset + cut), put(box.sizes, size - cut)),
    )


def chunked(box: Box, axis: int, ways: int) -> list[Box]:
    """torch.chunk's pieces of one axis, empty ones for the ranks left over, as Shard places them."""
    step = -(-box.sizes[axis] // ways)
    pieces = []
    for rank in range(ways):
        low = min(rank * step, box.sizes[axis])
        _, rest = _halves(box, axis, low)
        piece, _ = _halves(rest, axis, min(step, rest.sizes[axis]))
        pieces.append(piece)
    return pieces


def strided_shards(box: Box, axis: int, ways: int, split_factor: int) -> list[list[Box]]:
    """Each rank's boxes under _StridedShard: its piece of each of ``split_factor`` chunks."""
    chunks = [chunked(chunk, axis, ways) for chunk in chunked(box, axis, split_factor)]
    return [[chunk[rank] for chunk in chunks] for rank in range(ways)]


def held_otherwise(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same elements behind other strides or at another alignment."""
    how = rng.randrange(4)
    if how == 0 and tensor.dim():
        order = list(range(tensor.dim()))
        rng.shuffle(order)
        back = [order.index(axis) for axis in range(tensor.dim())]
        return tensor.permute(order).contiguous().permute(back)
    if how == 1 and tensor.dim():
        wide = torch.zeros(
            [n + rng.randrange(4) for n in tensor.shape], dtype=tensor.dtype, device=tensor.device
        )
        view = wide[tuple(slice(0, n) for n in tensor.shape)]
    elif how == 2:
        shift = rng.randrange(10)
        flat = torch.zeros(tensor.numel() + shift, dtype=tensor.dtype, device=tensor.device)
        view = flat[shift:].view(tensor.shape)
    else:
        return tensor
    view.copy_(tensor)
    return view


def random_part(rng: random.Random, device: str = "cpu", max_bytes: int = 20_000) -> Part:
    """A part of any item size, shape, box, strides and alignment."""
    itemsize = rng.choice([1, 1, 2, 2, 2, 4, 8, 16])
    lengths = [1, 2, 3, 4, 5, 7, 8, 13, 17, 33, 64, 65, 130, 300, 1030]
    shape = [rng.choice(lengths) for _ in range(rng.randint(0, 5))]
    while math.prod(shape) * itemsize > max_bytes:
        shape[rng.randrange(len(shape))] = rng.choice([1, 2, 3])
    offsets = [rng.randrange(n) if rng.random() < 0.6 else 0 for n in shape]
    sizes = [
        rng.randint(1, n - o) if rng.random() < 0.6 else n - o for n, o in zip(shape, offsets, strict=True)
    ]
    tensor = held_otherwise(rng, random_tensor(rng, itemsize, sizes, device))
    return part_of(tensor, shape, Box(tuple(offsets), tuple(sizes)))


def shapes(rng: random.Random) -> Iterator[tuple[int, ...]]:
    while True:
        yield tuple(rng.choice([1, 2, 3, 5, 9, 24, 40, 70]) for _ in range(rng.randint(1, 3)))
