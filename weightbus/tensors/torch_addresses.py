"""Whether tensors still lie where they did: asked before every update, of every tensor.

A call of ``data_ptr`` for each of 20,000 tensors takes some milliseconds, most of them spent in waiting for
memory. The extension fetches ahead. What it relies on, that a tensor's object holds its implementation at some
offset, is checked of each tensor first; where that does not hold, or there is no extension, Python asks one by
one.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from weightbus.tensors import _addresses as _extension
except ImportError:
    _extension: Any = None  # type: ignore[no-redef]

# Bytes of a Python object's head, with and without a flag behind it.
_OFFSETS = (16, 24)


@cache
def _data_ptr() -> int:
    """Address of the function in torch's library that gives a tensor's data pointer; 0 if there is none."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.aoti_torch_get_data_ptr, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


class Addresses:
    """The addresses of tensors. They are kept; the tensors are not."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._expected = array("Q", map(Tensor.data_ptr, tensors))
        self._implementations = array("Q", [tensor._cdata for tensor in tensors])
        self._offset = 0
        if _extension is not None and _data_ptr() and tensors:
            self._offset = next((n for n in _OFFSETS if self._holds(tensors, n)), 0)

    def _holds(self, tensors: Sequence[Tensor], offset: int) -> bool:
        return all(
            type(tensor).__basicsize__ >= offset + 8
            and ctypes.c_uint64.from_address(id(tensor) + offset).value == implementation
            for tensor, implementation in zip(tensors, self._implementations, strict=True)
        ) and self._ask(list(tensors), offset)

    def _ask(self, tensors: list[Tensor], offset: int) -> bool:
        return bool(_extension.unchanged(tensors, offset, self._implementations, self._expected, _data_ptr()))

    def moved(self, tensors: list[Tensor]) -> int | None:
        """The index of a tensor that lies elsewhere than at first; None if none does."""
        if self._offset and self._ask(tensors, self._offset):
            return None
        found = map(Tensor.data_ptr, tensors)
        return next((i for i, (a, b) in enumerate(zip(found, self._expected, strict=True)) if a != b), None)
