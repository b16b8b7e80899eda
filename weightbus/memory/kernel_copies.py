"""Copies within one GPU's memory by csrc/runs.cu: any number of boxes in one launch.

There a call for each box costs more than the bytes, and strided boxes are slow by the driver's own copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from weightbus.planning.runs import Run

_BLOCK = 256  # kBlock in csrc/runs.cu
_TILE_UNITS = 4 * _BLOCK  # kTile there
_WIDEST_UNIT = 16
# Columns of a row of the table, struct CopyRun in csrc/runs.cu.
_COLUMNS = 8


def copy_table(runs: Sequence[Run]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """The kernel's table, a row for each run, and the row of each tile. Offsets are whole addresses."""
    rows, tiles = [], []
    first_tile = 0
    for run in (piece for whole in runs for piece in _aligned(whole)):
        unit = math.gcd(_WIDEST_UNIT, run.dst, run.src, run.width, run.dst_pitch, run.src_pitch)
        width = run.width // unit
        rows.append((run.dst, run.src, width, run.rows, run.dst_pitch, run.src_pitch, unit, first_tile))
        tiles.append(-(-width * run.rows // _TILE_UNITS))
        first_tile += tiles[-1]
    table = np.array(rows, dtype=np.uint64).reshape(-1, _COLUMNS).view(np.int64)
    return table, np.repeat(np.arange(len(rows), dtype=np.uint32), tiles)


def _aligned(run: Run) -> Iterator[Run]:
    """A run of one row in pieces, so that an odd end does not narrow the vectors of all of it."""
    if run.rows > 1 or (run.dst - run.src) % _WIDEST_UNIT:
        yield run
        return
    head = min(-run.src % _WIDEST_UNIT, run.width)
    middle = (run.width - head) // _WIDEST_UNIT * _WIDEST_UNIT
    start = 0
    for width in (head, middle, run.width - head - middle):
        if width:
            yield replace(run, dst=run.dst + start, src=run.src + start, width=width)
        start += width


class KernelCopies:
    """Copies between addresses that one device reaches as its own; prepared once.

    Raises ImportError where the kernel can't be had.
    """

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        from weightbus.memory.cuda_kernels import kernels, stream_of

        self._stream_of, self._device = stream_of, device
        table, run_of_tile = copy_table(runs)
        self._tiles = len(run_of_tile)
        with torch.cuda.device(device):
            (self._kernel,) = kernels("runs.cu", ("copy_runs",))
            self._table = torch.from_numpy(table).to(device)
            self._run_of_tile = torch.from_numpy(run_of_tile.view(np.int32)).to(device)

    def start(self, stream: torch.cuda.Stream) -> None:
        """Queue all of them on ``stream``, of the device, which is the current one."""
        if self._tiles:
            with self._stream_of(stream.cuda_stream, self._device.index):
                self._kernel((self._tiles,), (_BLOCK,), (self._table.data_ptr(), self._run_of_tile.data_ptr()))
