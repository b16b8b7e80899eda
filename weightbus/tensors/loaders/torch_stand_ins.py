"""Tensors without data that stand for parameters while loading code is looked at."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from weightbus.tensors.loaders.trace import Untraceable


@contextlib.contextmanager
def standing_in(parameters: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors without data, by name, with the classes and attributes of the parameters.

    Where one has been kept, in a cache of loading code's, it is the parameter's own memory afterwards.
    """
    stand_ins: dict[str, Tensor] = {}
    try:
        for name, live in parameters.items():
            if isinstance(live, DTensor):
                raise Untraceable(f"{name} is a DTensor")
            meta = torch.empty_strided(live.shape, live.stride(), dtype=live.dtype, device="meta")
            stand_ins[name] = _like(live, meta)
        yield stand_ins
    finally:
        for name, stand_in in stand_ins.items():
            with contextlib.suppress(RuntimeError):  # views of it have been kept
                own = _like(parameters[name], parameters[name].detach())
                torch.utils.swap_tensors(stand_in, own)  # type: ignore[no-untyped-call]


def _like(tensor: Tensor, data: Tensor) -> Tensor:
    other = torch.Tensor._make_subclass(type(tensor), data)
    other.__dict__.update(tensor.__dict__)
    return other


def live_storages(parameters: Mapping[str, Tensor]) -> dict[int, str]:
    """The names of parameters by their storage, where one begins with it and has it for itself: loading code
    may have kept them."""
    counts = Counter(map(storage_of, parameters.values()))
    return {
        storage: name
        for name, tensor in parameters.items()
        if counts[storage := storage_of(tensor)] == 1 and not tensor.storage_offset() and not tensor.is_meta
    }


def storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
