"""The digest by csrc/grid61.cu: compiled at first use by NVRTC through CuPy, which caches it on disk.

A call is two kernels and a copy of keys before, of sums after; it waits for the stream once, at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cupy  # type: ignore[import-untyped, import-not-found, unused-ignore]
import numpy as np
import numpy.typing as npt
import torch

from weightbus.digest.grid61 import P, axis_keys
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
            self._table = torch.from_numpy(segments.table).to(device)
            self._owners = torch.from_numpy(owners).to(device)
            self._keys_host = torch.empty((2, self._axes), dtype=torch.int64, pin_memory=True)
            self._keys = torch.empty_like(self._keys_host, device=device)
            self._powers = torch.empty(2 * self._axes * _TABLE_PER_AXIS, dtype=torch.int64, device=device)
            self._steps = torch.empty(2 * self._count, dtype=torch.int64, device=device)
            self._sums = torch.empty((len(parts), 2, 2), dtype=torch.int64, device=device)
            self._sums_host = torch.empty(self._sums.shape, dtype=torch.int64, pin_memory=True)

    def sums(self, seed: bytes, stream: torch.cuda.Stream | None) -> npt.NDArray[np.uint64]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream() if stream is None else stream
            self._keys_host.numpy()[:] = axis_keys(seed, self._axes)
            with torch.cuda.stream(stream), _cupy_stream(stream):
                self._keys.copy_(self._keys_host, non_blocking=True)
                self._launch()
                self._sums_host.copy_(self._sums, non_blocking=True)
            stream.synchronize()
        halves = self._sums_host.numpy().astype(np.uint64)
        low, high = halves[..., 0], halves[..., 1]
        # high * 2**32 with 2**61 = 1 mod P; each term is below 2**61, low below 2**64 - 2**61.
        carried = ((high & np.uint64(2**29 - 1)) << np.uint64(32)) + (high >> np.uint64(29))
        total: npt.NDArray[np.uint64] = (carried % np.uint64(P) + low % np.uint64(P)) % np.uint64(P)
        return total

    def _launch(self) -> None:
        prepare, sums = self._kernels
        work = max(self._powers.numel(), self._steps.numel(), self._sums.numel())
        pointers = {
            name: getattr(self, name).data_ptr()
            for name in ("_keys", "_table", "_owners", "_powers", "_steps", "_sums")
        }
        prepare(
            (min(1024, -(-work // _BLOCK)),),
            (_BLOCK,),
            (
                pointers["_keys"], self._axes, pointers["_table"], self._count, self._sums.numel(),
                pointers["_powers"], pointers["_steps"], pointers["_sums"],
            ),
        )  # fmt: skip
        if self._tiles:
            sums(
                (-(-self._tiles * _WARP // _BLOCK),),
                (_BLOCK,),
                (
                    pointers["_table"], pointers["_owners"], self._tiles, pointers["_powers"], self._axes,
                    pointers["_steps"], pointers["_sums"],
                ),
            )  # fmt: skip


def _tiling(total: int, device: torch.device) -> Tiling:
    """Tiles small enough that every warp of the device gets several, large enough to amortise their ends."""
    warps = 32 * torch.cuda.get_device_properties(device).multi_processor_count
    tile = min(max(total // (4 * warps), _MIN_TILE_BYTES), _MAX_TILE_BYTES)
    return Tiling(strip_bytes=_WARP * VECTOR, tile_bytes=1 << (tile.bit_length() - 1), threads=_WARP)


@lru_cache(maxsize=1)
def _kernels(options: tuple[str, ...] = ()) -> tuple[Any, Any]:
    # One source, so that CuPy's cache key, which does not see included files, changes with the header.
    try:
        code = _source("grid61.cu").replace('#include "grid61.h"', _source("grid61.h"))
        module = cupy.RawModule(code=code, options=("-std=c++17", *options), backend="nvrtc")
        kernels = module.get_function("grid61_prepare"), module.get_function("grid61_sums")
        for kernel in kernels:
            kernel.compile()  # here, where the failure is caught, and not at the first launch
        return kernels
    except Exception as error:  # the compiler, its library or the driver: the reference serves instead
        raise ImportError(f"grid61.cu can't be compiled: {error}") from error


def _source(name: str) -> str:
    """A file of csrc/: in a wheel it lies beside this package, in a checkout one folder up."""
    packaged, checkout = (folder / "csrc" / name for folder in Path(__file__).parents[1:3])
    return (packaged if packaged.exists() else checkout).read_text()


def _cupy_stream(stream: torch.cuda.Stream) -> Any:
    return cupy.cuda.ExternalStream(stream.cuda_stream, stream.device_index)
