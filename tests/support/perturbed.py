"""Tensors of every dtype, and that ``perturb`` changes each of their elements."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from weightbus import perturb
from weightbus.planning.spec import ITEMSIZE

SHAPES = [(), (1,), (70,), (5, 7), (0, 3), (2, 3, 4)]


def everything(device: str = "cpu") -> dict[str, Tensor]:
    """Each dtype in several shapes, also strided; zeros and ones."""
    tensors = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that complex32 is young
        for name in ITEMSIZE:
            dtype = getattr(torch, name)
            for shape in SHAPES:
                tensors[f"{name}{list(shape)}"] = torch.zeros(shape, dtype=dtype, device=device)
            wide = torch.zeros(6, 10, dtype=dtype, device=device)
            tensors[f"{name} strided"] = wide.t()[::3, 1:4]
            tensors[f"{name} ones"] = torch.zeros(4, device=device).exp().to(dtype)
    return tensors


def bits(tensor: Tensor) -> Tensor:
    """Bytes of each element along a last axis."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(
        tensor.itemsize, tensor.dtype
    )
    flat = tensor.detach().view(integers).cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).reshape(flat.numel(), flat.itemsize)


def check_every_element_changes(device: str) -> None:
    tensors = everything(device)
    for _ in range(3):  # the same draw again must be told from what it left
        before = {name: bits(tensor) for name, tensor in tensors.items()}
        places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        perturb(tensors.items(), seed=5)
        for name, tensor in tensors.items():
            same = (bits(tensor) == before[name]).all(1)
            assert not same.any(), name
            assert tensor.data_ptr() == places[name]
            if tensor.dtype.is_floating_point and tensor.numel():
                size = tensor.cpu().double().abs()
                assert size.isfinite().all(), name
                assert size.ge(0.0078).all(), name
                assert size.le(256).all(), name
