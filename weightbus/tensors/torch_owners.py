"""Modules from which (name, tensor) pairs were taken: whether they still hold the memory that the pairs have.

``state_dict()`` gives tensors that share memory with parameters. If a parameter is given other memory later, as
by ``model.to(dtype)``, the pair keeps the old weights, and nothing that trains changes them any more.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from weightbus.tensors.torch_dtensor import local_tensor


@dataclass(frozen=True, slots=True)
class _Slot:
    """name: the pair's. held: ``_parameters`` or ``_buffers`` of the module, key: in it."""

    name: str
    module: weakref.ref[nn.Module]
    held: str
    key: str
    address: int


class Owners:
    """Found once, among all modules of this process; a module that is gone later owns nothing."""

    def __init__(self, pairs: Sequence[tuple[str, Tensor]]) -> None:
        names = {_address(local_tensor(tensor)): name for name, tensor in pairs}
        names.pop(0, None)
        self._slots = [
            _Slot(names[address], weakref.ref(module), held, key, address)
            for module in gc.get_objects()
            if names and issubclass(type(module), nn.Module)
            for held in ("_parameters", "_buffers")
            for key, tensor in module.__dict__.get(held, {}).items()
            if tensor is not None and (address := _address(local_tensor(tensor))) in names
        ]

    def moved(self) -> tuple[str, str] | None:
        """A pair's name, and the module's class and name of the tensor that has other memory now."""
        for slot in self._slots:
            module = slot.module()
            if module is None:
                continue
            tensor = module.__dict__[slot.held].get(slot.key)
            if tensor is None or _address(local_tensor(tensor)) != slot.address:
                return slot.name, f"{type(module).__name__}.{slot.key}"
        return None


def _address(tensor: Tensor) -> int:
    """0 for what has none, as a sparse tensor."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
