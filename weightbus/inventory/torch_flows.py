"""Dispatch modes that see which storage torch's operations read and write."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightbus.errors import UpdateError
from weightbus.inventory.regions import Regions
from weightbus.memory.shard import plain_view
from weightbus.tensors.loaders.torch_taint import writes
from weightbus.tensors.torch_dtensor import local_tensor

_LARGE = 1 << 20  # elements; tensors of more are made without memory, as no constant is so large without need
_ESCAPES = {"numpy", "tolist", "item", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"}
_aten = torch.ops.aten
_FACTORIES = {
    _aten.empty.memory_format,
    _aten.zeros.default,
    _aten.ones.default,
    _aten.full.default,
    _aten.rand.default,
    _aten.randn.default,
}


class Unrepeatable(Exception):
    """Why a module is not made a second time."""


class Flows(TorchDispatchMode):
    """Records, for the storages of one constructor, which of them flowed into which."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, torch.UntypedStorage] = {}  # so that no address is used twice
        self._into: dict[int, set[int]] = {}
        self._made: set[int] = set()
        self._weights: set[int] = set()
        self._leaks: set[int] = set()
        self._thread = threading.get_ident()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d" or "c10d" in func.namespace:
            raise Unrepeatable("its constructor talks to other ranks")
        given = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if func is _aten.lift_fresh.default:
            self._made |= given  # values that Python code spelt out
        written = {self._key(tensor) for tensor in writes(func, args, kwargs)}
        if written - self._made:
            raise Unrepeatable("its constructor writes to tensors that it has not made")
        if func in _FACTORIES and _elements(args[0]) > _LARGE:
            kwargs = {**kwargs, "device": torch.device("meta")}
        result = func(*args, **kwargs)
        found = {self._key(t) for t in tree_leaves(result) if isinstance(t, Tensor)}
        self._made |= found - given
        for key in found | written:
            self._into.setdefault(key, set()).update(given - {key})
        if given and not found:
            self._leaks |= given  # a value has gone to Python, and from there anywhere
        return result

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._alive.setdefault(storage._cdata, storage)
        return int(storage._cdata)

    def registered(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """A parameter has been made, in whichever thread."""
        if parameter is None or threading.get_ident() != self._thread:
            return
        with torch._C.DisableTorchFunction():  # or this look would count as a leak
            self._weights.add(self._key(parameter))

    def leak(self, values: object) -> None:
        """What of these has gone to Python may be in anything."""
        self._leaks |= {self._key(value) for value in tree_leaves(values) if isinstance(value, Tensor)}

    def free(self, tensor: Tensor, fed: Sequence[Tensor]) -> bool:
        """Whether the tensor is made of what this constructor made, and nothing of it of ``fed``."""
        weights = self._weights | {self._key(one) for one in fed}
        sources = self._sources(self._key(tensor))
        leaked = set().union(*map(self._sources, self._leaks)) if self._leaks else set()
        return sources <= self._made and not (sources | leaked) & weights

    def _sources(self, key: int) -> set[int]:
        found, left = {key}, [key]
        while left:
            more = self._into.get(left.pop(), set()) - found
            found |= more
            left += more
        return found


@contextlib.contextmanager
def recorded() -> Iterator[Flows]:
    flows = Flows()
    handle = register_module_parameter_registration_hook(flows.registered)
    try:
        with flows, _Escapes(flows):
            yield flows
    finally:
        handle.remove()


class _Escapes(TorchFunctionMode):
    """Sees tensors whose values go where no dispatch mode does."""

    def __init__(self, flows: Flows) -> None:
        super().__init__()
        self._flows = flows

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _ESCAPES:
            self._flows.leak(args)
        return func(*args, **(kwargs or {}))


class ReadOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses writes to the storage of these tensors."""

    def __init__(self, tensors: Iterator[Tensor] | Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(tensor.untyped_storage()._cdata in self._storages for tensor in writes(func, args, kwargs)):
            raise UpdateError("it writes to live tensors; expected new ones")
        return func(*args, **kwargs)


class Reads(TorchDispatchMode):
    """Notes storage that operations read, and that neither they nor the caller made.

    known: storage that is accounted for. inputs: the caller's. found: by a name, what is read, and by what.
    """

    def __init__(self, known: Regions, inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, str] = {}
        self._known = known
        self._alive: dict[int, torch.UntypedStorage] = {}
        self._own = {self._key(tensor) for tensor in inputs}
        self._named: set[int] = set()
        self._made: set[int] = set()
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [local_tensor(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func is _aten.lift_fresh.default:
            self._own |= {self._key(tensor) for tensor in given}
        for tensor in given:
            if self._key(tensor) not in self._own and tensor.numel() and tensor.device.type != "meta":
                self._read(func, tensor)
        for tensor in writes(func, args, kwargs):
            self._save(local_tensor(tensor))
        keys = {self._key(tensor) for tensor in given}
        result = func(*args, **kwargs)
        made = {self._key(local_tensor(t)) for t in tree_leaves(result) if isinstance(t, Tensor)}
        self._own |= made - keys
        self._made |= made - keys
        return result

    def _read(self, func: Any, tensor: Tensor) -> None:
        if tensor.layout is torch.strided and self._known.cover(plain_view(tensor)):
            return
        key = self._key(tensor)
        name = f"storage read by {func}: {tensor.dtype} {list(tensor.shape)}"
        if key not in self._named:
            self._named.add(key)
            same = sum(other.startswith(name) for other in self.found)
            self.found[name + (f" ({same + 1})" if same else "")] = "held by no module that was looked at"

    def _save(self, tensor: Tensor) -> None:
        key = self._key(tensor)
        if key not in self._made and key not in self._saved:
            live = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            self._saved[key] = live, live.clone()

    def restore(self) -> None:
        """Put back what was written over."""
        with torch.inference_mode():
            for live, before in self._saved.values():
                live.copy_(before)

    def _key(self, tensor: Tensor) -> int:
        storage = local_tensor(tensor).untyped_storage()
        self._alive.setdefault(storage._cdata, storage)
        return int(storage._cdata)


def _elements(size: Sequence[int]) -> int:
    count = 1
    for one in size:
        count *= int(one)
    return count
