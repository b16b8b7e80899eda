"""The tensors of an nn.Module, and whether they moved. The only file that touches its private names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from weightbus.errors import SpecError
from weightbus.tensors.torch_addresses import Addresses
from weightbus.tensors.torch_dtensor import is_dtensor, local_tensor
from weightbus.tensors.torch_wrappers import differs, inside, is_wrapper, kind_of

HOOK = "weightbus_tensors"
"""The method by which a module says where its tensors live, if not in its parameters and buffers."""


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under ``module``, itself first, by each of its names; names end with a dot.

    What a wrapper wraps has the wrapper's name, and what it holds besides is left out (``torch_wrappers``).
    Raises SpecError for a wrapper of which nothing can be said, such as FSDP1.
    """
    yield prefix, module
    if (inner := inside(prefix, module)) is not None:
        yield from walk(inner, prefix)
        return
    for key, child in module._modules.items():
        if child is not None:
            yield from walk(child, f"{prefix}{key}.")


def tensors_of(prefix: str, module: nn.Module, *, persistent_only: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters and then buffers of this one module, in its own order; none of a wrapper."""
    if not is_wrapper(module):
        yield from own_tensors(prefix, module, persistent_only=persistent_only)


def own_tensors(prefix: str, module: nn.Module, *, persistent_only: bool) -> Iterator[tuple[str, Tensor]]:
    """The same, of a wrapper, too."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + key, parameter
    for key, buffer in module._buffers.items():
        if buffer is not None and not (persistent_only and key in module._non_persistent_buffers_set):
            yield prefix + key, buffer


def inner_tensors(tensor: Tensor) -> dict[str, Tensor]:
    """What a wrapper, such as a quantised tensor, or a sparse one is made of; nothing of a plain tensor."""
    if is_traceable_wrapper_subclass(tensor):
        held = {key: getattr(tensor, key) for key in tensor.__tensor_flatten__()[0]}
        return {key: one for key, one in held.items() if isinstance(one, Tensor)}
    if tensor.layout is torch.sparse_coo:
        return {"indices": tensor._indices(), "values": tensor._values()}
    return {}


def named_pairs(pairs: object, what: str) -> Iterator[tuple[str, Tensor]]:
    """The (name, tensor) pairs of an iterable. what: begins the error. Raises SpecError for anything else."""
    if not isinstance(pairs, Iterable):
        raise SpecError(f"{what}, got a {type(pairs).__name__}")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise SpecError(f"{what}, got a {type(pair).__name__}; at item {i}")
        name, tensor = pair
        if not isinstance(name, str) or not name:
            raise SpecError(f"{what}, got {name!r} as a name; at item {i}")
        if not isinstance(tensor, Tensor):
            raise SpecError(f"{name}: expected a tensor, got a {type(tensor).__name__}; at item {i}")
        yield name, tensor


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A module whose tensors, or some of them, live where its ``weightbus_tensors`` says (docs/offload.md)."""

    prefix: str
    module: nn.Module

    @classmethod
    def among(cls, modules: Iterable[tuple[str, nn.Module]]) -> list[Elsewhere]:
        # Wrappers offer what their inner module has by __getattr__: that would be asked twice.
        return [
            cls(prefix, module)
            for prefix, module in modules
            if HOOK in module.__dict__ or hasattr(type(module), HOOK)
        ]

    def tensors(self) -> dict[str, Tensor]:
        """What the module gives now, by wire name. Raises SpecError for a name that is given twice."""
        what = f"{self.prefix}{HOOK}: expected (name, tensor) pairs"
        found: dict[str, Tensor] = {}
        for key, tensor in named_pairs(getattr(self.module, HOOK)(), what):
            if found.setdefault(self.prefix + key, tensor) is not tensor:
                raise SpecError(f"{self.prefix}{key}: expected each name once, got it twice from {HOOK}")
        return found


def stand_ins(elsewhere: Sequence[Elsewhere]) -> dict[int, Tensor]:
    """By the ``id`` of a registered tensor, the one that a module gives for it, with the class and attributes
    of the registered one, by which loading code goes.

    Raises SpecError for a name that the module does not have, and for two places of one tensor.
    """
    found: dict[int, Tensor] = {}
    for one in elsewhere:
        given = one.tensors()
        own = {
            name: tensor
            for prefix, module in (walk(one.module, one.prefix) if given else ())
            for name, tensor in tensors_of(prefix, module, persistent_only=False)
        }
        for name, tensor in given.items():
            if name not in own:
                raise SpecError(f"{name}: expected {HOOK} to give names of the module's tensors, got another")
            other = found.setdefault(id(own[name]), _standing_for(name, own[name], tensor))
            if _where(other) != _where(tensor):
                raise SpecError(f"{name}: expected one place of a tied tensor, got two from {HOOK}")
    return found


def _standing_for(name: str, registered: Tensor, tensor: Tensor) -> Tensor:
    if is_dtensor(registered) != is_dtensor(tensor):
        kinds = [type(one).__name__ for one in (registered, tensor)]
        raise SpecError(f"{name}: expected a {kinds[0]} from {HOOK}, as the module has, got a {kinds[1]}")
    view = tensor.detach()
    if not is_dtensor(view):
        view = Tensor._make_subclass(type(registered), view)
    view.__dict__.update(registered.__dict__)
    return view


def _where(tensor: Tensor) -> tuple[object, ...]:
    """What must stay as it is for a tensor to be the same memory, read the same way."""
    local = local_tensor(tensor)
    return local.data_ptr(), local.dtype, tuple(local.shape), local.stride(), tuple(tensor.shape)


def reshard(modules: Sequence[nn.Module]) -> None:
    """Put FSDP2 modules back to their sharded parameters, as state_dict() does.

    A root module stays gathered after a forward pass without a backward; what is written to its gathered
    parameters would be lost at the next reshard.
    """
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


_get: Callable[[dict[str, Any], str], Any] = dict.get


@dataclass(frozen=True, slots=True)
class _Places:
    """Columns of tensors that are all DTensors (``sharded``), or all not."""

    sharded: bool
    names: tuple[str, ...]
    tensors: list[Tensor]
    views: tuple[Tensor, ...]

    @classmethod
    def of(cls, sharded: bool, tensors: Sequence[tuple[str, Tensor]]) -> _Places:
        rows = [(name, tensor) for name, tensor in tensors if is_dtensor(tensor) == sharded]
        views = tuple(local_tensor(tensor).detach() for _, tensor in rows)
        return cls(sharded, tuple(name for name, _ in rows), [tensor for _, tensor in rows], views)

    def now(self) -> list[Tensor]:
        """What lies on this rank of each tensor, as it is now."""
        return list(map(local_tensor, self.tensors)) if self.sharded else self.tensors


def _places(one: Elsewhere) -> dict[str, tuple[object, ...]]:
    return {name: _where(tensor) for name, tensor in one.tensors().items()}


class Watch:
    """Sees whether tensors are still the objects, at the addresses, that a layout was made of.

    In columns, so that the check of 20,000 tensors is two loops in C.
    """

    def __init__(
        self,
        modules: Sequence[tuple[str, nn.Module]],
        tensors: Sequence[tuple[str, Tensor]],
        elsewhere: Sequence[Elsewhere] = (),
        *,
        mapping: Mapping[str, nn.Module],
        persistent_only: bool,
    ) -> None:
        """modules: as ``walk`` gives them. tensors: all that the layout holds, under all their names.
        elsewhere: those of the modules whose tensors are not all their own. mapping: a source that is one."""
        self._mapping, self._tops = mapping, dict(mapping)
        slots: list[tuple[str, dict[str, Any], str, object]] = []
        self._dicts: list[tuple[str, dict[str, Any]]] = []
        for prefix, module in modules:
            # Models rebind their non-persistent buffers (rotary caches) as they go.
            skipped = module._non_persistent_buffers_set if persistent_only else ()
            for held in (module._modules, module._parameters, module._buffers):
                self._dicts.append((prefix, held))
                slots += [(prefix + key, held, key, value) for key, value in held.items() if key not in skipped]
        self._names = [name for name, _, _, _ in slots]
        self._held = [held for _, held, _, _ in slots]
        self._keys = [key for _, _, key, _ in slots]
        self._values = [value for _, _, _, value in slots]
        self._counts = [len(held) for _, held in self._dicts]
        self._elsewhere = [(one, _places(one)) for one in elsewhere]
        self._fsdp = [module for _, module in modules if isinstance(module, FSDPModule)]
        self._wrappers = [(p, module, inside(p, module)) for p, module in modules if is_wrapper(module)]
        self._places = [_Places.of(sharded, tensors) for sharded in (False, True)]
        self._addresses = [Addresses(places.now()) for places in self._places]
        self.tensors = [tensor for _, tensor in tensors]
        self.named = list(tensors)

    def check_wrappers(self) -> None:
        """Raise SpecError where the model now computes with other weights than those that are looked at."""
        found = [(prefix, module, why) for prefix, module, _ in self._wrappers if (why := differs(module))]
        if found:
            prefix, module, why = found[0]
            others = f"; the same for {len(found) - 1} more" if len(found) > 1 else ""
            raise SpecError(
                f"{prefix.rstrip('.') or 'model'}: expected the weights that the model computes with, got only "
                f"those that a {kind_of(module)} wraps: {why}{others}"
            )

    def changed(self) -> str | None:
        """Name of a tensor that has ``moved``, or that lies at the same address with another shape, strides or
        dtype. Three times as long as ``moved`` takes; a change of this kind is rare."""
        for places in self._places:
            for name, tensor, view in zip(places.names, places.now(), places.views, strict=True):
                if tensor.dtype != view.dtype or not tensor.is_set_to(view):
                    return name
        return self.moved()

    def moved(self) -> str | None:
        """Name of a tensor or module that was replaced, added, removed, resized or given other storage."""
        reshard(self._fsdp)
        for prefix, module, inner in self._wrappers:
            if inside(prefix, module) is not inner:
                return prefix.rstrip(".") or type(module).__name__
        for name in {**self._tops, **self._mapping}:
            if self._mapping.get(name) is not self._tops.get(name):
                return name
        if not all(map(is_, map(_get, self._held, self._keys), self._values)):
            slots = zip(self._names, self._held, self._keys, self._values, strict=True)
            return next(name for name, held, key, value in slots if held.get(key) is not value)
        if [len(held) for _, held in self._dicts] != self._counts:
            counts = zip(self._dicts, self._counts, strict=True)
            prefix, changed = next(entry for entry, count in counts if len(entry[1]) != count)
            known = {key for held, key in zip(self._held, self._keys, strict=True) if held is changed}
            return prefix + next(key for key in changed if key not in known)
        for places, addresses in zip(self._places, self._addresses, strict=True):
            if (index := addresses.moved(places.now())) is not None:
                return places.names[index]
        for one, before in self._elsewhere:
            if (now := _places(one)) != before:
                return next(name for name in {**before, **now} if now.get(name) != before.get(name))
        return None
