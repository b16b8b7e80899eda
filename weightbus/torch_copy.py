"""Many copies in few kernel launches. torch's private name here: ``_foreach_copy_``."""

from __future__ import annotations

import torch
from torch import Tensor

# Larger copies fill a GPU by themselves.
_BATCHED_BYTES = 8 << 20

_WORD = torch.int64
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Copies:
    """Pairs of views of equal shape, copied (and cast) together; no two destinations overlap.

    On CUDA, small contiguous pairs of equal dtypes go as words in one batch, casts in a batch for each pair
    of dtypes; the batched kernel takes no others.
    """

    def __init__(self) -> None:
        self._batches: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        self._single: list[tuple[Tensor, Tensor]] = []

    def add(self, dst: Tensor, src: Tensor) -> None:
        if dst.dtype == src.dtype and (one := _words(dst)) is not None and (two := _words(src)) is not None:
            dst, src = one, two
        floats = dst.dtype in _FLOATS and src.dtype in _FLOATS
        small = dst.is_cuda and src.device == dst.device and dst.nbytes <= _BATCHED_BYTES
        if small and (floats or dst.dtype == _WORD) and dst.is_contiguous() and src.is_contiguous():
            dsts, srcs = self._batches.setdefault((dst.dtype, src.dtype), ([], []))
            dsts.append(dst)
            srcs.append(src)
        else:
            self._single.append((dst, src))

    def __bool__(self) -> bool:
        return bool(self._batches or self._single)

    def run(self) -> None:
        """``dst.copy_(src)`` for all pairs, in the order of the current stream; records no grad."""
        with torch.no_grad():
            for dst, src in self._batches.values():
                torch._foreach_copy_(dst, src, non_blocking=True)
            for one, other in self._single:
                one.copy_(other, non_blocking=True)


def _words(tensor: Tensor) -> Tensor | None:
    """The same bytes as 8-byte words, or None where they can't be seen so."""
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    if tensor.data_ptr() % _WORD.itemsize or tensor.nbytes % _WORD.itemsize:
        return None
    flat = tensor.view(-1)
    return flat if flat.dtype == _WORD else flat.view(torch.uint8).view(_WORD)
