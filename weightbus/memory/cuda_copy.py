"""Copies by csrc/copy.cu: many in one launch, casting on the way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from weightbus.memory.copy_descriptors import Piece

THREADS, TILE_UNITS = 512, 2048  # kThreads, kTile in csrc/copy.cu

# Beside a transfer it must not take all the memory bandwidth: on an H100 a quarter of the multiprocessors
# moves about three times what the link does.
SHARE = 4


@cache
def why_no_kernel(device: torch.device) -> str:
    """Why the kernel can't be had on a device; empty if it can."""
    try:
        from weightbus.memory.cuda_kernels import kernels

        with torch.cuda.device(device):
            kernels("copy.cu", ("copy_pieces",))
    except ImportError as error:
        return f"no kernel that casts: {error}"
    return ""


class CudaCopies:
    """Prepared copies on one device, replayed in one launch. Raises ImportError where there is no CuPy."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device, *, share: int = SHARE) -> None:
        """pieces: of memory that ``device`` reaches, and that stays where it is. share: one in so many of its
        multiprocessors is taken."""
        from weightbus.memory.cuda_kernels import kernels, stream_of

        self._device, self._stream_of = device, stream_of
        with torch.cuda.device(device):
            (self._kernel,) = kernels("copy.cu", ("copy_pieces",))
        rows, self._tiles = [], 0
        for piece in pieces:
            rows.append((*piece[:-1], self._tiles, piece.kind))
            self._tiles += -(-piece.units * piece.rows // TILE_UNITS)
        self._count = len(rows)
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._blocks = min(self._tiles, max(1, processors // share))

    def run(self) -> None:
        """All copies, in the order of the current stream."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            with self._stream_of(stream, self._device.index):
                arguments = (self._table.data_ptr(), self._count, self._tiles)
                self._kernel((self._blocks,), (THREADS,), arguments)
