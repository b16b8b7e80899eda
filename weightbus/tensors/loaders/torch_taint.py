"""Which wire tensors reach which parameters in loading code that computes: run on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightbus.tensors.loaders.torch_stand_ins import live_storages, standing_in, storage_of
from weightbus.tensors.loaders.torch_trace import _EMPTIES, _view
from weightbus.tensors.loaders.trace import View

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Reach:
    """What is written to a parameter: the wire tensors from which something comes, and where."""

    wires: frozenset[str]
    views: tuple[View, ...]


def reaches(
    run: Callable[[dict[str, Tensor]], object], wires: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Reach] | None:
    """What reaches each parameter that ``run`` writes to.

    None where that can't be found out, as the code looks at values.
    """
    try:
        with standing_in(parameters) as stand_ins:
            taint = _Taint(wires, stand_ins, parameters)
            with torch.no_grad(), taint:
                run(stand_ins)
            return {name: reach for name, tensor in stand_ins.items() if (reach := taint.reach(tensor))}
    except Exception:
        return None


class _Taint(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows wire tensors through operations of any kind, storage by storage. Nothing live is written to."""

    def __init__(
        self, wires: Mapping[str, Tensor], stand_ins: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, torch.UntypedStorage] = {}  # so that no address is used twice
        self._reached: dict[int, set[str]] = {}
        self._views: dict[int, list[View]] = {}
        self._made: set[int] = set()
        self._same = {live: storage_of(stand_ins[name]) for live, name in live_storages(parameters).items()}
        for name, tensor in wires.items():
            self._reached[self._key(tensor)] = {name}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: see the tracing mode."""
        return False

    def reach(self, tensor: Tensor) -> Reach | None:
        views = self._views.get(storage_of(tensor))
        return Reach(frozenset(self._reached.get(storage_of(tensor), ())), tuple(views)) if views else None

    def _key(self, tensor: Tensor) -> int:
        storage = storage_of(tensor)
        self._alive.setdefault(storage, tensor.untyped_storage())
        return self._same.get(storage, storage)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        reached = set().union(*(self._reached.get(self._key(tensor), set()) for tensor in given))
        if func in _EMPTIES or (func is _aten._to_copy.default and args[0].is_meta):
            kwargs["device"] = torch.device("meta")
            kwargs.pop("pin_memory", None)
        written = writes(func, args, kwargs)
        dataless = any(tensor.is_meta for tensor in given)
        if any(not tensor.is_meta and (dataless or self._key(tensor) not in self._made) for tensor in written):
            result = written[0] if func._schema.returns else None
        else:
            result = func(*args, **kwargs)
        if (
            func is _aten.copy_.default
            and args[0].numel() * args[0].itemsize == args[0].untyped_storage().nbytes()
        ):
            self._reached.pop(self._key(args[0]), None)  # of scratch memory that is used again, the last counts
            reached = self._reached.get(self._key(args[1]), set())
        for tensor in written:  # after that: of an alias, the storage may be another now
            self._views.setdefault(self._key(tensor), []).append(_view(tensor))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._made |= {self._key(tensor) for tensor in made} - {self._key(tensor) for tensor in given}
        for tensor in (*written, *made) if reached else ():
            self._reached.setdefault(self._key(tensor), set()).update(reached)
        return result


def writes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among an operation's arguments that it writes to."""
    found: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found
