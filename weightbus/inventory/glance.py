"""Whether what a module tree holds is still the same: cheap enough to ask before every update."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import MemberDescriptorType
from typing import Any

from torch import nn

MAX_GLANCED = 10_000
"""Of longer lists only a new length is seen between two walks."""

_MODULE_KEYS = frozenset(vars(nn.Module()))
_get: Callable[[dict[Any, Any], Any], Any] = dict.get


class Glance:
    """Sees, in a few loops in C, whether modules, objects and containers still hold the same objects.

    registered: dicts of parameters and modules, at which others look.
    """

    def __init__(self) -> None:
        self.dicts: list[dict[Any, Any]] = []
        self.empty: list[dict[Any, Any]] = []
        self.registered: list[dict[Any, Any]] = []
        self.rows: list[Collection[Any]] = []
        self.slots: list[tuple[MemberDescriptorType, object]] = []

    def keep(self) -> None:
        """What is held now is what ``changed`` compares with."""
        entries = [(held, key) for held in self.dicts for key in held if not _own_key(held, key)]
        self._columns = [held for held, _ in entries], [key for _, key in entries]
        self._before = self._now()

    def changed(self) -> bool:
        """Whether something has been put in, taken out or replaced."""
        return self._before != self._now()

    def _now(self) -> object:
        return (
            any(self.empty),
            list(map(len, self.dicts)),
            list(map(id, map(_get, *self._columns))),
            [list(map(id, row)) if len(row) <= MAX_GLANCED else len(row) for row in self.rows],
            [id(slot_of(descriptor, value)) for descriptor, value in self.slots],
        )


def slot_of(descriptor: MemberDescriptorType, value: object) -> object:
    """What an object's slot holds; None if nothing."""
    try:
        return descriptor.__get__(value, type(value))
    except AttributeError:
        return None


def _own_key(held: dict[Any, Any], key: object) -> bool:
    """Whether an entry of a module's ``__dict__`` is one that every module has."""
    return key in _MODULE_KEYS and "_parameters" in held
