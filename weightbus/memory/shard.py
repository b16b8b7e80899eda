"""A piece of a tensor where it lies, and which tensors can be moved at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from weightbus.errors import SpecError
from weightbus.planning.box import Box
from weightbus.planning.spec import ITEMSIZE, Spec

# Casts that kernels do on the way, by their numbers in csrc/narrow.h.
NARROWED = {("float32", "bfloat16"): 1, ("float32", "float16"): 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One box of a tensor, where it lies on this rank.

    tensor: plain view of the local storage, any strides, ``tensor.shape == box.sizes``; its dtype is
    ``spec.dtype``, or one that is cast to it on the way (``NARROWED``). ``spec.shape`` is the global shape.
    """

    spec: Spec
    box: Box
    tensor: Tensor

    @property
    def nbytes(self) -> int:
        """In ``spec.dtype``."""
        return self.box.volume * ITEMSIZE[self.spec.dtype]

    @property
    def narrowed(self) -> int:
        """Which of ``NARROWED`` it is; 0 if it lies as it travels."""
        return NARROWED.get((str(self.tensor.dtype).removeprefix("torch."), self.spec.dtype), 0)


def spec_of(name: str, tensor: Tensor) -> Spec:
    """Spec of a tensor or DTensor (whose shape is the global one). Raises SpecError as check_plain does."""
    if is_lazy(tensor):
        raise SpecError(
            f"{name}: expected a tensor with a shape, got {type(tensor).__name__}; run the model once"
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEMSIZE:
        raise SpecError(f"{name}: expected a dtype among {', '.join(ITEMSIZE)}, got {dtype}")
    return Spec(name=name, dtype=dtype, shape=tuple(tensor.shape))


def check_plain(name: str, tensor: Tensor) -> None:
    """Raise SpecError unless the tensor's elements lie in storage of its own as its strides say.

    Refused: meta, sparse, lazily conjugated or negated tensors, and subclasses with their own
    ``__torch_dispatch__`` (fake and quantised wrappers), whose data is somewhere else. A subclass without
    one, as engines make of Parameter, is plain, unless it says that it is partitioned or quantised.
    """
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise SpecError(
            f"{name}: expected a plain tensor or a DTensor, got a {type(tensor).__name__}; if it is "
            f"quantised, give the weights that it was made of, or its dequantize()"
        )
    shape = getattr(tensor, "ds_shape", None)  # of DeepSpeed's ZeRO-3
    if shape is not None and tuple(shape) != tuple(tensor.shape):
        raise SpecError(
            f"{name}: expected the whole tensor of {list(shape)}, got {list(tensor.shape)}: ZeRO-3 has "
            f"partitioned it; make the publisher, and update, within deepspeed.zero.GatheredParameters"
        )
    if getattr(tensor, "quant_state", None) is not None or getattr(tensor, "SCB", None) is not None:
        raise SpecError(
            f"{name}: expected a tensor of values, got codes of them in a {type(tensor).__name__}, "
            f"whose scales are elsewhere; give the weights that it was made of"
        )
    if tensor.device.type == "meta":
        raise SpecError(f"{name}: expected a tensor with storage, got one on the meta device")
    if tensor.layout != torch.strided:
        raise SpecError(f"{name}: expected a strided tensor, got layout {tensor.layout}")
    if tensor.is_conj() or tensor.is_neg():
        # Their bytes are not their values.
        raise SpecError(f"{name}: expected a materialised tensor, got a lazy conjugate or negative view")
    if tensor.numel():
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + last + 1) * tensor.itemsize
        if (held := tensor.untyped_storage().nbytes()) < needed:
            raise SpecError(
                f"{name}: expected storage of at least {needed} bytes, got one of {held}: it was given up, as "
                f"FSDP2 gives up what it gathered; pass the module itself, or its tensors as they are now"
            )


def plain_view(tensor: Tensor) -> Tensor:
    """The same storage as a base-class tensor without autograd, that may be written in any mode."""
    if tensor.is_inference():
        # Its views may be written in inference mode only; what has the same storage may always.
        with torch.inference_mode(False):
            view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            return view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    view = tensor.detach()
    return view if type(view) is Tensor else view.as_subclass(Tensor)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: Tensor) -> Tensor:
    """The same elements, shape, strides and storage, as integers; complex128 stays, as none is so wide.

    Copying and comparing integers is exact for every dtype, NaNs and odd bytes of a bool included.
    """
    return tensor.view(_INTEGERS.get(tensor.itemsize, tensor.dtype))
