"""Which bytes of a file a box of a stored tensor is: runs of one length, at one distance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from weightbus.planning.box import Box
from weightbus.planning.spec import ITEMSIZE
from weightbus.storage.disk import Stored

# What one thread reads before it copies.
BUFFER_BYTES = 8 << 20


class OnDevice(Protocol):
    """A stored tensor that is memory on a GPU."""

    def copy(self, box: Box, dst: Tensor) -> None:
        """``box`` of it into ``dst``, ``row_major`` and of its dtype, in the order of the current stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A box of a stored tensor. view: what takes it, cast where the dtypes differ; None is not known yet."""

    stored: Stored
    box: Box
    view: Tensor | None


@dataclass(slots=True, kw_only=True, eq=False)
class Piece:
    """At most a buffer of a read, as equal runs of bytes in its file.

    number: the read's. begin, pitch: the byte where the first run begins, and how far on each next one does.
    kept: the piece's bytes, where they are kept in memory.
    """

    number: int
    stored: Stored
    box: Box
    within: tuple[slice, ...]
    begin: int
    pitch: int
    runs: int
    nbytes: int
    kept: Tensor | None = None

    def in_runs(self, memory: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Where each run begins in the file, and its part of the piece's memory."""
        length = self.nbytes // self.runs
        for i in range(self.runs):
            yield self.begin + i * self.pitch, memory[i * length : (i + 1) * length]


def pieces_of(reads: Sequence[Read], buffer_bytes: int | None = None) -> list[Piece]:
    limit = BUFFER_BYTES if buffer_bytes is None else buffer_bytes
    found = []
    for number, read in enumerate(reads):
        stored, itemsize = read.stored, ITEMSIZE[read.stored.spec.dtype]
        for whole in read.box.split(limit // itemsize) if read.box.volume else ():
            for box, first, pitch, runs in runs_of(stored.spec.shape, whole):
                piece = Piece(
                    number=number,
                    stored=stored,
                    box=box,
                    within=() if box is read.box else box.within(read.box),
                    begin=stored.begin + first * itemsize,
                    pitch=pitch * itemsize,
                    runs=runs,
                    nbytes=box.volume * itemsize,
                )
                found.append(piece)
    return found


def runs_of(shape: Sequence[int], box: Box) -> Iterator[tuple[Box, int, int, int]]:
    """Boxes that make up ``box``, each of equal runs at one distance in a row-major tensor: the box, where its
    first run begins, the distance, and how many runs it has; in elements."""
    axis = len(shape)
    while axis and box.sizes[axis - 1] == shape[axis - 1]:
        axis -= 1
    axis = max(axis - 1, 0)  # one axis more may be cut, and the run is still contiguous
    if axis < 2 or Box(box.offsets[:axis], box.sizes[:axis]).runs_in(Box.whole(shape[:axis])):
        first = 0
        for offset, size in zip(box.offsets, shape, strict=True):
            first = first * size + offset
        yield box, first, math.prod(shape[axis:]), math.prod(box.sizes[:axis])
        return
    for part in box.split(box.volume // next(n for n in box.sizes if n > 1)):
        yield from runs_of(shape, part)
