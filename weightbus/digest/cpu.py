"""The digest by the compiled extension, with threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from weightbus.digest import _grid61
from weightbus.digest.grid61 import axis_keys
from weightbus.digest.segments import Tiling, segments_of
from weightbus.memory.shard import Part

_TILING = Tiling(strip_bytes=1 << 16, tile_bytes=1 << 18, threads=1)


class CpuSums:
    """Sums of parts in host memory. It uses as many threads as torch does."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._keep = list(parts)
        self._segments = segments_of(parts, _TILING)
        assert self._segments.table[:1].nbytes in (0, _grid61.SEGMENT_BYTES)  # noqa: S101 - built together

    def launch(self, seed: bytes, stream: torch.cuda.Stream | None) -> Callable[[], npt.NDArray[np.uint64]]:
        segments = self._segments
        keys = np.array(axis_keys(seed, segments.axes), dtype=np.uint64)
        out = np.empty((len(self._keep), 2), dtype=np.uint64)
        _grid61.sums(segments.table, segments.tiles, keys, out, torch.get_num_threads())
        return lambda: out
