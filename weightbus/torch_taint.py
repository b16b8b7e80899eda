"""Which wire tensors reach which parameters in loading code that computes: run on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightbus.torch_trace import _stand_in, _storage

_aten = torch.ops.aten


def reaches(
    run: Callable[[dict[str, Tensor]], object], wires: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, frozenset[str]] | None:
    """By parameter that ``run`` writes to, the wire tensors from which something reaches it.

    None where that can't be found out, as the code looks at values.
    """
    stand_ins = {name: _stand_in(name, parameter) for name, parameter in parameters.items()}
    taint = _Taint(wires)
    try:
        with torch.no_grad(), taint:
            run(stand_ins)
    except Exception:
        return None
    return {
        name: frozenset(taint.wires_of(tensor))
        for name, tensor in stand_ins.items()
        if taint.is_written(tensor)
    }


class _Taint(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows wire tensors through operations of any kind, storage by storage."""

    def __init__(self, wires: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, torch.UntypedStorage] = {}  # so that no address is used twice
        self._reached: dict[int, set[str]] = {}
        self._written: set[int] = set()
        for name, tensor in wires.items():
            self._reached[self._key(tensor)] = {name}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: see the tracing mode."""
        return False

    def wires_of(self, tensor: Tensor) -> set[str]:
        return self._reached.get(_storage(tensor), set())

    def is_written(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._written

    def _key(self, tensor: Tensor) -> int:
        self._alive.setdefault(_storage(tensor), tensor.untyped_storage())
        return _storage(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        reached = set().union(*(self._reached.get(self._key(tensor), set()) for tensor in given))
        if func is _aten._to_copy.default and args[0].is_meta:
            kwargs["device"] = torch.device("meta")
            kwargs.pop("pin_memory", None)
        result = func(*args, **kwargs)
        if func._schema.is_mutable and given:
            target = kwargs.get("out", args[0] if args and isinstance(args[0], Tensor) else given[0])
            for tensor in tree_leaves(target):
                self._written.add(self._key(tensor))
                self._reached.setdefault(self._key(tensor), set()).update(reached)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and reached:
                self._reached.setdefault(self._key(leaf), set()).update(reached)
        return result
