"""A copy of a module tree for loading code to run on, so that what it writes stays off the original."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from weightbus.tensors.loaders.trace import Fault

REPLACES = "it replaces a parameter, where what holds the old one would go on with it"


def twin(module: nn.Module, stand_ins: Mapping[int, Tensor]) -> nn.Module:
    """A copy of the module tree that shares all but the tensors whose ``id`` is in ``stand_ins``, and plain
    containers: loading code may keep lists of parameters, or of what it has loaded.

    Other objects, and what they hold, stay the originals.
    """
    copied: nn.Module = _Twins(module, stand_ins).copy(module)
    return copied


class _Twins:
    def __init__(self, module: nn.Module, stand_ins: Mapping[int, Tensor]) -> None:
        # By the id of an original, which the kept ones keep alive.
        self._made: dict[int, Any] = dict(stand_ins)
        self._kept: list[object] = []
        modules = list(module.modules())
        for one in modules:
            self._made[id(one)] = type(one).__new__(type(one))
        for one in modules:
            self._made[id(one)].__dict__.update({key: self.copy(value) for key, value in one.__dict__.items()})

    def copy(self, value: Any) -> Any:
        """What stands for a value in the copy."""
        if id(value) in self._made:
            return self._made[id(value)]
        kind = type(value)
        if kind in (dict, OrderedDict, defaultdict):
            held = self._note(value, kind(value.default_factory) if kind is defaultdict else kind())
            held.update((self.copy(key), self.copy(item)) for key, item in value.items())
            return held
        if kind in (list, set):
            held = self._note(value, kind())
            (held.extend if kind is list else held.update)(map(self.copy, value))
            return held
        if kind is tuple:
            return tuple(map(self.copy, value))
        return value

    def _note(self, value: object, copied: Any) -> Any:
        self._kept.append(value)
        self._made[id(value)] = copied
        return copied


@contextlib.contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Modules, parameters and buffers of the tree are what they were, whatever code has put in their places.

    Raises Fault if some were not.
    """
    held = [
        (own, dict(own))
        for one in module.modules()
        for own in (one._modules, one._parameters, one._buffers)
        if own
    ]
    try:
        yield
    finally:
        changed = [
            (own, before)
            for own, before in held
            if list(map(id, own.values())) != list(map(id, before.values()))
        ]
        for own, before in changed:
            own.clear()
            own.update(before)  # type: ignore[arg-type]
    if changed:
        raise Fault(REPLACES)
