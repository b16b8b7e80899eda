"""The CUDA kernels of csrc/: compiled at first use by NVRTC through CuPy, which caches them on disk."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import cupy  # type: ignore[import-untyped, import-not-found, unused-ignore]

_INCLUDE = re.compile(r'#include "(\w+\.h)"')


@cache
def kernels(source: str, names: tuple[str, ...]) -> list[Any]:
    """Kernels of a file of csrc/, which may include others there. Raises ImportError if they can't be had."""
    # One source, so that CuPy's cache key, which does not see included files, changes with them.
    try:
        code = _INCLUDE.sub(lambda found: _text(found[1]), _text(source))
        module = cupy.RawModule(code=code, options=("-std=c++17",), backend="nvrtc")
        found = [module.get_function(name) for name in names]
        for kernel in found:
            kernel.compile()  # here, where a failure is caught, and not at the first launch
        return found
    except Exception as error:  # the compiler, its library or the driver: torch serves instead
        raise ImportError(f"{source} can't be compiled: {error}") from error


def _text(name: str) -> str:
    """A file of csrc/: in a wheel it lies in this package, in a checkout beside it."""
    packaged, checkout = (folder / "csrc" / name for folder in Path(__file__).parents[1:3])
    return (packaged if packaged.exists() else checkout).read_text()


class _CudaStream:
    """A stream's handle as CUDA's stream protocol has it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@cache  # for good: CuPy destroys the stream of an object that it sees collected
def stream_of(handle: int, device: int) -> Any:
    """CuPy's object for a stream that torch owns on the current device; before CuPy 14 under its old name.

    device: its index. The default stream's handle is 0 on each device, and CuPy binds an object to one.
    """
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_CudaStream(handle))
    return cupy.cuda.ExternalStream(handle)
