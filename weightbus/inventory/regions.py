"""Memory that is accounted for, as address ranges; whether all bytes of another tensor lie in it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Flags = npt.NDArray[np.bool_]

MAX_SPAN_BYTES = 64 << 20
"""A tensor with gaps is compared byte by byte if it spans no more than this."""


class Regions:
    """Bytes of local tensors, of any strides, added once."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        spans: dict[torch.device, list[tuple[int, int]]] = {}
        self._gapped: dict[torch.device, list[Tensor]] = {}
        self._places: set[tuple[object, ...]] = set()
        self.tensors = list(tensors)
        for tensor in self.tensors:
            if not tensor.numel():
                continue
            self._places.add(_place(tensor))
            low, high = _span(tensor)
            if high - low == tensor.numel() * tensor.itemsize:
                spans.setdefault(tensor.device, []).append((low, high))
            else:
                self._gapped.setdefault(tensor.device, []).append(tensor)
        self._spans = {device: _merged(rows) for device, rows in spans.items()}

    def cover(self, tensor: Tensor) -> bool:
        """Whether every byte of the tensor's elements is in here. Reads no memory.

        False also where a tensor with gaps spans more than ``MAX_SPAN_BYTES``.
        """
        if not tensor.numel() or _place(tensor) in self._places:
            return True
        low, high = _span(tensor)
        lows, highs = self._spans.get(tensor.device, ([], []))
        index = bisect_right(lows, low) - 1
        if index >= 0 and highs[index] >= high:
            return True
        if high - low > MAX_SPAN_BYTES:
            return False
        inside = np.zeros(high - low, dtype=bool)
        for start, end in zip(lows, highs, strict=True):
            inside[max(0, start - low) : max(0, end - low)] = True
        for other in self._gapped.get(tensor.device, ()):
            first, last = _span(other)
            if first < high and last > low and last - first <= MAX_SPAN_BYTES:
                _mark(inside, low, other, first, last)
        return bool(_elements(inside, tensor).all())


def _mark(inside: Flags, low: int, tensor: Tensor, first: int, last: int) -> None:
    """Set the bytes of a tensor with gaps, as far as they lie in ``inside``, which begins at ``low``."""
    own = np.zeros(last - first, dtype=bool)
    _elements(own, tensor)[...] = True
    start, end = max(first, low), min(last, low + len(inside))
    inside[start - low : end - low] |= own[start - first : end - first]


def _elements(data: Flags, tensor: Tensor) -> Flags:
    """The bytes of a tensor's elements, in an array of one flag for each byte of its span."""
    shape = (*tensor.shape, tensor.itemsize)
    strides = (*(stride * tensor.itemsize for stride in tensor.stride()), 1)
    return np.lib.stride_tricks.as_strided(data, shape=shape, strides=strides)


def _span(tensor: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    low = tensor.data_ptr()
    return low, low + (reach + 1) * tensor.itemsize


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.data_ptr(), tensor.itemsize, tuple(tensor.shape), tensor.stride()


def _merged(spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Starts and ends of what the ranges come to, in order."""
    lows: list[int] = []
    highs: list[int] = []
    for low, high in sorted(spans):
        if highs and low <= highs[-1]:
            highs[-1] = max(highs[-1], high)
        else:
            lows.append(low)
            highs.append(high)
    return lows, highs
