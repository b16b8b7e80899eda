"""The digest by csrc/grid61.cu.

A call is three kernels, and the host waits once, for their end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from weightbus.digest.grid61 import axis_keys
from weightbus.digest.segments import VECTOR, BoxCopy, Tiling, segments_of
from weightbus.memory.cuda_kernels import kernels, stream_of
from weightbus.memory.shard import Part

_KERNELS = ("grid61_prepare", "grid61_sums", "grid61_copies", "grid61_finish")
_WARP = 32
_BLOCK = 256
_TABLE_PER_AXIS = 7 * 64  # kTablePerAxis in csrc/grid61.h
_MAX_TILE_BYTES = 1 << 16
_MIN_TILE_BYTES = 1 << 12


def grid61_kernels() -> list[Any]:
    """Of the current device; raises ImportError if they can't be had."""
    return kernels("grid61.cu", _KERNELS)


class CudaSums:
    """Sums of parts on one CUDA device, with buffers that are allocated here and only here.

    copies: where each part is written as it is read (``why_not_copied`` says what can be); by default nowhere.
    """

    def __init__(self, parts: Sequence[Part], copies: Sequence[Sequence[BoxCopy]] = ()) -> None:
        self._keep = list(parts), list(copies)
        self._device = device = parts[0].tensor.device
        total = sum(part.nbytes for part in parts)
        segments = segments_of(parts, _tiling(total, device), copies)
        self._axes, self._tiles, self._count = segments.axes, segments.tiles, len(segments.table)
        bounds = np.append(segments.first_tiles, segments.tiles)
        owners = np.repeat(np.arange(self._count, dtype=np.int32), np.diff(bounds))
        with torch.cuda.device(device):
            self._kernels = grid61_kernels()
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._table = torch.from_numpy(segments.table).to(device)
            self._stores = torch.from_numpy(segments.stores).to(device) if copies else None
            self._owners = torch.from_numpy(owners).to(device)
            # The host's memory, as the kernels see it: sooner than copies of so few bytes.
            self._keys = torch.empty((2, self._axes), dtype=torch.int64, pin_memory=True)
            self._sums = torch.empty((len(parts), 2), dtype=torch.int64, pin_memory=True)
            self._powers = torch.empty(2 * self._axes * _TABLE_PER_AXIS, dtype=torch.int64, device=device)
            self._steps = torch.empty(2 * self._count, dtype=torch.int64, device=device)
            self._halves = torch.empty((len(parts), 2, 2), dtype=torch.int64, device=device)
        self._keys_host, self._sums_host = (t.numpy().view(np.uint64) for t in (self._keys, self._sums))
        self._launches = self._prepared()

    def launch(self, seed: bytes, stream: torch.cuda.Stream | None) -> Callable[[], npt.NDArray[np.uint64]]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream() if stream is None else stream
            self._done.synchronize()  # until its end, an earlier launch that nobody waited for reads its keys
            self._keys_host[:] = axis_keys(seed, self._axes)
            with stream_of(stream.cuda_stream, self._device.index):
                for kernel, threads, arguments in self._launches:
                    kernel((-(-threads // _BLOCK),), (_BLOCK,), arguments)
            self._done.record(stream)
        return self._result

    def _result(self) -> npt.NDArray[np.uint64]:
        self._done.synchronize()
        return self._sums_host.copy()

    def _prepared(self) -> list[tuple[Any, int, tuple[int, ...]]]:
        """Each launch's kernel, threads and arguments."""
        prepare, sums, copying, finish = self._kernels
        keys, table, owners, powers, steps, halves, out = (
            tensor.data_ptr()
            for tensor in (
                self._keys, self._table, self._owners, self._powers, self._steps, self._halves, self._sums,
            )
        )  # fmt: skip
        count, axes, tiles = self._count, self._axes, self._tiles
        stores = () if self._stores is None else (self._stores.data_ptr(),)
        work = max(self._powers.numel(), self._steps.numel(), self._halves.numel())
        launches = [
            (
                prepare,
                min(work, _BLOCK << 10),
                (keys, axes, table, count, self._halves.numel(), powers, steps, halves),
            ),
            (
                copying if stores else sums,
                tiles * _WARP,
                (table, *stores, owners, tiles, powers, axes, steps, halves),
            ),
            (finish, self._sums.numel(), (halves, self._sums.numel(), out)),
        ]
        return [launch for launch in launches if launch[1]]


def _tiling(total: int, device: torch.device) -> Tiling:
    """Tiles small enough that every warp of the device gets several, large enough to amortise their ends."""
    warps = 32 * torch.cuda.get_device_properties(device).multi_processor_count
    tile = min(max(total // (4 * warps), _MIN_TILE_BYTES), _MAX_TILE_BYTES)
    return Tiling(strip_bytes=_WARP * VECTOR, tile_bytes=1 << (tile.bit_length() - 1), threads=_WARP)
