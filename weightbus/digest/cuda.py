"""The digest by csrc/grid61.cu: compiled at first use by NVRTC through CuPy, which caches it on disk.

A call is three kernels, and the host waits once, for their end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import cupy  # type: ignore[import-untyped, import-not-found, unused-ignore]
import numpy as np
import numpy.typing as npt
import torch

from weightbus.digest.grid61 import axis_keys
from weightbus.digest.segments import VECTOR, Tiling, segments_of
from weightbus.part import Part

_WARP = 32
_BLOCK = 256
_TABLE_PER_AXIS = 7 * 64  # kTablePerAxis in csrc/grid61.h
_MAX_TILE_BYTES = 1 << 16
_MIN_TILE_BYTES = 1 << 12


class CudaSums:
    """Sums of parts on one CUDA device, with buffers that are allocated here and only here."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._keep = list(parts)
        self._device = device = parts[0].tensor.device
        total = sum(part.tensor.numel() * part.tensor.element_size() for part in parts)
        segments = segments_of(parts, _tiling(total, device))
        self._axes, self._tiles, self._count = segments.axes, segments.tiles, len(segments.table)
        bounds = np.append(segments.first_tiles, segments.tiles)
        owners = np.repeat(np.arange(self._count, dtype=np.int32), np.diff(bounds))
        with torch.cuda.device(device):
            self._kernels = _kernels()
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._table = torch.from_numpy(segments.table).to(device)
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
            with _stream(stream.cuda_stream, self._device.index):
                for kernel, threads, arguments in self._launches:
                    kernel((-(-threads // _BLOCK),), (_BLOCK,), arguments)
            self._done.record(stream)
        return self._result

    def _result(self) -> npt.NDArray[np.uint64]:
        self._done.synchronize()
        return self._sums_host.copy()

    def _prepared(self) -> list[tuple[Any, int, tuple[int, ...]]]:
        """Each launch's kernel, threads and arguments."""
        prepare, sums, finish = self._kernels
        keys, table, owners, powers, steps, halves, out = (
            tensor.data_ptr()
            for tensor in (
                self._keys, self._table, self._owners, self._powers, self._steps, self._halves, self._sums,
            )
        )  # fmt: skip
        count, axes, tiles = self._count, self._axes, self._tiles
        work = max(self._powers.numel(), self._steps.numel(), self._halves.numel())
        launches = [
            (
                prepare,
                min(work, _BLOCK << 10),
                (keys, axes, table, count, self._halves.numel(), powers, steps, halves),
            ),
            (sums, tiles * _WARP, (table, owners, tiles, powers, axes, steps, halves)),
            (finish, self._sums.numel(), (halves, self._sums.numel(), out)),
        ]
        return [launch for launch in launches if launch[1]]


def _tiling(total: int, device: torch.device) -> Tiling:
    """Tiles small enough that every warp of the device gets several, large enough to amortise their ends."""
    warps = 32 * torch.cuda.get_device_properties(device).multi_processor_count
    tile = min(max(total // (4 * warps), _MIN_TILE_BYTES), _MAX_TILE_BYTES)
    return Tiling(strip_bytes=_WARP * VECTOR, tile_bytes=1 << (tile.bit_length() - 1), threads=_WARP)


@lru_cache(maxsize=1)
def _kernels(options: tuple[str, ...] = ()) -> tuple[Any, Any, Any]:
    # One source, so that CuPy's cache key, which does not see included files, changes with the header.
    try:
        code = _source("grid61.cu").replace('#include "grid61.h"', _source("grid61.h"))
        module = cupy.RawModule(code=code, options=("-std=c++17", *options), backend="nvrtc")
        prepare, sums, finish = map(module.get_function, ("grid61_prepare", "grid61_sums", "grid61_finish"))
        for kernel in (prepare, sums, finish):
            kernel.compile()  # here, where a failure is caught, and not at the first launch
        return prepare, sums, finish
    except Exception as error:  # the compiler, its library or the driver: the reference serves instead
        raise ImportError(f"grid61.cu can't be compiled: {error}") from error


def _source(name: str) -> str:
    """A file of csrc/: in a wheel it lies beside this package, in a checkout one folder up."""
    packaged, checkout = (folder / "csrc" / name for folder in Path(__file__).parents[1:3])
    return (packaged if packaged.exists() else checkout).read_text()


class _CudaStream:
    """A stream's handle as CUDA's stream protocol has it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@cache  # for good: CuPy destroys the stream of an object that it sees collected
def _stream(handle: int, device: int) -> Any:
    """CuPy's object for a stream that torch owns on the current device; before CuPy 14 under its old name.

    device: its index. The default stream's handle is 0 on each device, and CuPy binds an object to one.
    """
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_CudaStream(handle))
    return cupy.cuda.ExternalStream(handle)
