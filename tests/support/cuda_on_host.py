"""csrc/grid61.cu, compiled for the host: the same arithmetic and indexing where there is no GPU."""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from weightbus.digest.grid61 import axis_keys
from weightbus.digest.segments import BoxCopy, Tiling, segments_of
from weightbus.memory.shard import Part

TABLE_PER_AXIS = 7 * 64
COMPILER = shutil.which("g++") or shutil.which("c++")


def compiled(source: Path, *flags: str) -> Path:
    """A shared object; removed when the interpreter ends."""
    assert COMPILER is not None
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    out = Path(folder) / f"{source.stem}.so"
    common = ["-std=c++17", "-O2", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command = [COMPILER, *common, *flags, str(source), "-o", str(out)]
    subprocess.run(command, check=True)  # noqa: S603 - the compiler found, on our own source
    return out


@cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(compiled(Path(__file__).with_suffix(".cpp"))))


class CudaOnHost:
    """As CudaSums, over host memory."""

    def __init__(
        self, parts: Sequence[Part], tile_bytes: int = 1 << 13, copies: Sequence[Sequence[BoxCopy]] = ()
    ) -> None:
        self.parts = list(parts)
        self.copies = bool(copies)
        self.segments = segments_of(parts, Tiling(strip_bytes=512, tile_bytes=tile_bytes, threads=32), copies)

    def launch(self, seed: bytes, stream: None = None) -> Callable[[], np.ndarray]:
        segments, count = self.segments, len(self.segments.table)
        bounds = np.append(segments.first_tiles, segments.tiles)
        owners = np.repeat(np.arange(count, dtype=np.uint32), np.diff(bounds))
        keys = np.array(axis_keys(seed, segments.axes), dtype=np.uint64)
        powers = np.zeros(2 * segments.axes * TABLE_PER_AXIS, dtype=np.uint64)
        steps = np.zeros(2 * count, dtype=np.uint64)
        halves = np.full((len(self.parts), 2, 2), 0xAA, dtype=np.uint64)
        sums = np.full((len(self.parts), 2), 0xAA, dtype=np.uint64)
        numbers = (segments.axes, count, segments.tiles, halves.size)
        axes, count_, tiles, sum_count = map(ctypes.c_longlong, numbers)
        pointer = {k: ctypes.c_void_p(v.ctypes.data) for k, v in locals().items() if isinstance(v, np.ndarray)}
        table = ctypes.c_void_p(segments.table.ctypes.data)
        stores = ctypes.c_void_p(segments.stores.ctypes.data if self.copies else None)
        library().grid61_on_host(
            pointer["keys"], axes, table, count_, stores, pointer["owners"], tiles, sum_count,
            pointer["powers"], pointer["steps"], pointer["halves"], pointer["sums"],
        )  # fmt: skip
        return lambda: sums
