"""Copies by csrc/copy.cu: many in one launch, casting on the way, on a quarter of the GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightbus.memory.copy_descriptors import Pair, piece_of
from weightbus.memory.cuda_kernels import kernels, stream_of

THREADS, TILE_UNITS = 512, 2048  # kThreads, kTile in csrc/copy.cu

# Beside a transfer it must not take all the memory bandwidth: on an H100 a quarter of the multiprocessors
# moves about three times what the link does.
SHARE = 4


class CudaCopies:
    """Prepared copies on one device, replayed in one launch. Raises ImportError where there is no CuPy."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        """pairs: for which ``piece_of`` is not None; all on one device."""
        self._keep = list(pairs)
        self._device = device = pairs[0][0].device
        (self._kernel,) = kernels("copy.cu", ("copy_pieces",))
        rows, self._tiles = [], 0
        for dst, src in pairs:
            piece = piece_of(dst, src)
            assert piece is not None  # noqa: S101 - as the docstring says
            rows.append((*piece[:-1], self._tiles, piece.kind))
            self._tiles += -(-piece.units * piece.rows // TILE_UNITS)
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._blocks = min(self._tiles, max(1, processors // SHARE))

    def run(self) -> None:
        """All copies, in the order of the current stream."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            with stream_of(stream, self._device.index):
                arguments = (self._table.data_ptr(), len(self._keep), self._tiles)
                self._kernel((self._blocks,), (THREADS,), arguments)
