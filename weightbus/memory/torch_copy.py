"""Many copies in few kernel launches. torch's private name here: ``_foreach_copy_``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weightbus.memory.copy_descriptors import CASTS, Pair, piece_of
from weightbus.memory.cuda_copy import CudaCopies
from weightbus.memory.warn_once import say_once


class Copies:
    """Pairs of views of equal shape, copied (and cast) together; no two destinations overlap.

    to_host: whether some leave a GPU for the host, which knows no streams: what reads them there waits first.
    """

    def __init__(self) -> None:
        self.to_host = False
        self._pairs: list[Pair] = []
        self._launches: list[Callable[[], None]] | None = None

    def add(self, dst: Tensor, src: Tensor) -> None:
        self._pairs.append((dst, src))
        self._launches = None
        self.to_host |= src.is_cuda and dst.device.type == "cpu"

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def run(self) -> None:
        """``dst.copy_(src)`` for all pairs, in the order of the current stream; records no grad."""
        if self._launches is None:
            self._launches = _prepared(self._pairs)
        with torch.no_grad():
            for launch in self._launches:
                launch()


def _prepared(pairs: Sequence[Pair]) -> list[Callable[[], None]]:
    """What to launch: on CUDA our kernel for all that it can do, else torch's batched one."""
    alike = [pair for pair in pairs if pair[0].is_cuda and pair[0].device == pair[1].device]
    launches: list[Callable[[], None]] = []
    done: set[int] = set()
    if alike:
        try:
            fit = {id(pair): piece for pair in alike if (piece := piece_of(*pair)) is not None}
            if fit:
                launches.append(CudaCopies(list(fit.values()), alike[0][0].device).run)
                done = set(fit)
        except ImportError as error:
            say_once(f"weightbus copies with torch operations, which slow a transfer down: {error}")
            for batch in _batches(alike):
                launches.append(_foreach(batch))
                done |= {id(pair) for pair in batch}
    rest = [pair for pair in pairs if id(pair) not in done]
    if rest:
        launches.append(lambda: _one_by_one(rest))
    return launches


def _batches(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """What torch's batched kernel takes: contiguous floats, of one dtype at each end."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    found: dict[tuple[torch.dtype, torch.dtype], list[Pair]] = {}
    for pair in pairs:
        dst, src = pair
        if dst.dtype in floats and src.dtype in floats and dst.is_contiguous() and src.is_contiguous():
            found.setdefault((dst.dtype, src.dtype), []).append(pair)
    return list(found.values())


def _foreach(pairs: Sequence[Pair]) -> Callable[[], None]:
    dst, src = ([pair[i] for pair in pairs] for i in (0, 1))
    return lambda: torch._foreach_copy_(dst, src, non_blocking=True)


def cast_on_host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)`` of host memory, where equal NaNs give equal bits however they lie.

    torch casts a NaN to other bits one by one than in vectors, as it does with rows of adjacent elements.
    """
    return (tensor if _has_rows(tensor) else tensor.contiguous()).to(dtype)


def _has_rows(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.stride(-1) == 1 and tensor.shape[-1] > 1)


def _one_by_one(pairs: Sequence[Pair]) -> None:
    for dst, src in pairs:
        if (src.dtype, dst.dtype) in CASTS and src.device.type == "cpu":
            in_place = dst.device == src.device and _has_rows(dst) and _has_rows(src)
            # A source's digest is of another cast of it, and both have to have the same bits.
            src = src if in_place else cast_on_host(src, dst.dtype)
        # Into strided host memory torch copies twice: on the host, once what has left the GPU is there.
        dst.copy_(src, non_blocking=dst.is_cuda or (dst.is_contiguous() and dst.dtype == src.dtype))
