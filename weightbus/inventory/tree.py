"""Every tensor that a module tree holds: registered ones, and those in attributes and containers.

Followed are modules, mappings, lists, tuples, sets, dataclasses and other plain objects, by their attributes
and slots, also of methods that are kept. Functions and what they close over are not, nor torch's own objects.
"""

from __future__ import annotations

import enum
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, ValuesView
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from types import MappingProxyType, MemberDescriptorType, MethodType, ModuleType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from weightbus.inventory.glance import Glance, slot_of
from weightbus.memory.shard import plain_view
from weightbus.tensors.torch_dtensor import is_dtensor, local_tensor
from weightbus.tensors.torch_module import inner_tensors, walk
from weightbus.tensors.torch_wrappers import beside

MAX_DEPTH = 16
"""How deep containers and objects of one module are followed."""

MAX_OBJECTS = 1_000_000
"""How many objects are looked at in all."""

_LEAVES = (
    str,
    bytes,
    bytearray,
    int,
    float,
    complex,
    type,
    ModuleType,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.Generator,
)
_PLAIN = {type(None), bool, int, float, str}
_REGISTERED = ("_parameters", "_buffers", "_modules")

# Of the standard library only these hold what a model may compute with; loggers, locks and queues do not.
_HOLDERS = {"types", "functools", "collections", "argparse", "dataclasses", "__main__"}
_SKIPPED = (sys.stdlib_module_names - _HOLDERS) | {"torch", "weightbus", "numpy"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One tensor of a tree. name: its path. tensor: a plain view of its storage. owner: the innermost module
    that holds it, under ``prefix``. held: the object that was found, for its identity."""

    name: str
    tensor: Tensor
    owner: nn.Module
    prefix: str
    held: Tensor


@dataclass(slots=True)
class Tree:
    """found: in the order of modules, registered tensors first. unseen: what could not be looked at, and why.
    around: by the ``id`` of a module, itself and the modules around it, innermost first, with prefixes.
    glance: at all that was looked into.
    """

    found: list[Found] = field(default_factory=list)
    unseen: dict[str, str] = field(default_factory=dict)
    around: dict[int, tuple[tuple[str, nn.Module], ...]] = field(default_factory=dict)
    glance: Glance = field(default_factory=Glance)

    def changed(self) -> bool:
        """Whether something else is held now, or a tensor lies elsewhere."""
        moved = (local_tensor(one.held).data_ptr() != one.tensor.data_ptr() for one in self.found)
        return self.glance.changed() or any(moved)


def tree_of(tops: Mapping[str, nn.Module]) -> Tree:
    """The tensors of these modules, each under its prefix (``""``, or a name and a dot).

    A tensor object is listed once, a view of it again. Reads no tensor and calls no code of the modules.
    """
    walker = _Walker()
    for prefix, top in tops.items():
        walker.registered(prefix, top)
    for prefix, top in tops.items():
        walker.module(prefix, top)
    walker.tree.glance.keep()
    return walker.tree


class _Walker:
    def __init__(self) -> None:
        self.tree = Tree()
        self._seen: set[int] = set()
        self._tensors: set[int] = set()
        self._owner: nn.Module = nn.Module()
        self._prefix = ""

    def registered(self, prefix: str, top: nn.Module) -> None:
        """Parameters and buffers, so that these keep their names wherever else they are held."""
        holder = self.tree.around.get(id(self._owner), ())
        known: dict[str, nn.Module] = {}
        for path, module in _all(top, prefix):
            known[path] = module
            rows = [(p, known[p]) for p in _prefixes(path) if p in known]
            self.tree.around.setdefault(id(module), (*rows, *holder))
            self._owner, self._prefix = module, path
            for held in (module._parameters, module._buffers):
                for key, tensor in held.items():
                    if tensor is not None:
                        self._tensor(f"{path}{key}", tensor, 0)

    def module(self, prefix: str, top: nn.Module) -> None:
        """What the modules under ``top`` hold besides."""
        before = self._owner, self._prefix
        for path, module in _all(top, prefix):
            if id(module) not in self._seen:
                self._seen.add(id(module))
                glance = self.tree.glance
                glance.registered += [module._parameters, module._modules]
                (glance.dicts if module._buffers else glance.empty).append(module._buffers)
                self._owner, self._prefix = module, path
                self._attributes(path, module, 0)
        self._owner, self._prefix = before

    def _value(self, name: str, value: object, depth: int) -> None:
        if type(value) in _PLAIN:
            return
        before = self._owner, self._prefix
        try:
            self._look(name, value, depth)
        except Exception as error:  # of code of the object's own, which may be anything
            self._owner, self._prefix = before
            self.tree.unseen[name] = f"looking at it raised {type(error).__name__}"

    def _look(self, name: str, value: object, depth: int) -> None:
        if isinstance(value, _LEAVES):
            return
        if isinstance(value, Tensor):
            self._tensor(name, value, depth)
        elif isinstance(value, MethodType):
            self._value(f"{name}.__self__", value.__self__, depth + 1)
        elif isinstance(value, nn.Module):
            if id(value) not in self._seen and id(value) not in self.tree.around:  # its turn comes, by its name
                before = self._owner, self._prefix
                self.registered(f"{name}.", value)
                self._owner, self._prefix = before
                self.module(f"{name}.", value)
        elif type(value) in (dict, OrderedDict) and not value:
            self.tree.glance.empty.append(value)  # type: ignore[arg-type]
        elif id(value) not in self._seen:
            if depth >= MAX_DEPTH or len(self._seen) >= MAX_OBJECTS:
                limit = (
                    f"deeper than {MAX_DEPTH}" if depth >= MAX_DEPTH else f"one of over {MAX_OBJECTS} objects"
                )
                self.tree.unseen.setdefault(name, f"not looked at: {limit}")
                return
            self._seen.add(id(value))
            self._items(name, value, depth)
            self._attributes(f"{name}.", value, depth)

    def _items(self, name: str, value: object, depth: int) -> None:
        if isinstance(value, dict):
            self.tree.glance.dicts.append(value)
            for key, item in list(dict.items(value)):
                self._value(f"{name}[{_key(key)}]", item, depth + 1)
                self._value(f"{name}.keys[{_key(key)}]", key, depth + 1)
        elif isinstance(value, tuple) and (fields := getattr(type(value), "_fields", None)):
            for key, item in zip(fields, value, strict=False):
                self._value(f"{name}.{key}", item, depth + 1)
        elif isinstance(value, MappingProxyType):
            self.tree.glance.rows.append(value.values())
            for key, item in value.items():
                self._value(f"{name}[{_key(key)}]", item, depth + 1)
        elif isinstance(value, list | tuple | deque | AbstractSet | ValuesView):
            items = list(value)
            self.tree.glance.rows.append(value)
            for index, item in enumerate(items):
                self._value(f"{name}[{index}]", item, depth + 1)

    def _attributes(self, prefix: str, value: object, depth: int) -> None:
        """Of an object: its ``__dict__``, its slots, and tensors that its own classes hold for all of them."""
        kind = type(value)
        if kind.__module__.partition(".")[0] in _SKIPPED and not isinstance(value, nn.Module):
            return
        try:
            own = object.__getattribute__(value, "__dict__")
        except AttributeError:
            own = {}
        if isinstance(own, dict):
            self.tree.glance.dicts.append(own)
            skipped = _REGISTERED if isinstance(value, nn.Module) else ()
            for key, item in list(own.items()):
                if type(item) not in _PLAIN and key not in skipped:
                    self._value(f"{prefix}{key}", item, depth + 1)
        slots, shared = _of_class(kind)
        for key, slot in slots:
            self.tree.glance.slots.append((slot, value))
            self._value(f"{prefix}{key}", slot_of(slot, value), depth + 1)
        for key, item in shared:
            self._value(f"{prefix}{key}", item, depth + 1)

    def _tensor(self, name: str, tensor: Tensor, depth: int) -> None:
        if id(tensor) in self._tensors or is_lazy(tensor):
            return
        self._tensors.add(id(tensor))
        if is_dtensor(tensor):
            self._plain(name, local_tensor(tensor), tensor)
        elif inner := inner_tensors(tensor):
            for key, one in inner.items():
                self._tensor(f"{name}.{key}", one, depth)
        else:
            self._plain(name, tensor, tensor)
        own = getattr(tensor, "__dict__", None)
        if isinstance(own, dict) and depth < MAX_DEPTH:
            (self.tree.glance.dicts if own else self.tree.glance.empty).append(own)
            for key, item in list(own.items()):
                self._value(f"{name}.{key}", item, depth + 1)

    def _plain(self, name: str, tensor: Tensor, held: Tensor) -> None:
        if tensor.device.type == "meta" or not tensor.numel():
            return  # nothing that anybody could read
        if reason := _unlookable(tensor):
            self.tree.unseen[name] = reason
            return
        self.tree.found.append(
            Found(name=name, tensor=plain_view(tensor), owner=self._owner, prefix=self._prefix, held=held)
        )


def _of_class(kind: type) -> tuple[list[tuple[str, MemberDescriptorType]], list[tuple[str, object]]]:
    """The slots of a class's objects, and what its own classes hold for all of them."""
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in _SKIPPED]
    rows = [(key, item) for base in bases for key, item in list(vars(base).items())]
    rows = [(key, item) for key, item in rows if not key.startswith("__pydantic_")]  # schemas of settings
    slots = [(key, item) for key, item in rows if isinstance(item, MemberDescriptorType)]
    return slots, [row for row in rows if isinstance(row[1], Tensor | list | dict | tuple | set)]


def _unlookable(tensor: Tensor) -> str:
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__}, whose data lies elsewhere"
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}"
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return "its bytes are not its values"
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if (tensor.storage_offset() + last + 1) * tensor.itemsize > tensor.untyped_storage().nbytes():
        return "its storage is freed"
    return ""


def _all(top: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules, and then those that wrappers hold beside it."""
    walked = list(walk(top, prefix))
    yield from walked
    for path, module in walked:
        yield from beside(path, module)


def _prefixes(path: str) -> list[str]:
    """A prefix and those around it, innermost first: ``a.b.`` gives itself, ``a.`` and the empty one."""
    keys = path.split(".")[:-1]
    return ["".join(f"{key}." for key in keys[:count]) for count in range(len(keys), -1, -1)]


def tensors_in(value: object) -> list[Tensor]:
    """Tensors that are followed from any value."""
    walker = _Walker()
    walker._value("", value, 0)
    return [one.tensor for one in walker.tree.found]


def plain(value: object) -> bool:
    """Whether nothing that is followed from ``value`` is a tensor or a module."""
    walker = _Walker()
    walker._value("", value, 0)
    return not (walker.tree.found or walker.tree.unseen or walker.tree.around)


def _key(key: object) -> str:
    return repr(key) if isinstance(key, str | int) else f"<{type(key).__name__}>"
