"""What callers give, checked before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import SupportsIndex

from weightbus.errors import SpecError
from weightbus.tensors.install import matches
from weightbus.tensors.torch_wrappers import check_renamed


def wire_names(
    exclude: Sequence[str] = (), rename: Mapping[str, str] | Callable[[str], str] | None = None
) -> Callable[[str], str | None] | None:
    """From a source's name to its wire name, or to None for what is excluded; None if all names stay."""
    if isinstance(exclude, str):
        raise SpecError(f"exclude: expected a list of patterns, got {exclude!r}")
    if not exclude and rename is None:
        return None

    def name_of(name: str) -> str | None:
        if matches(name, exclude):
            return None
        if rename is None:
            return name
        other = rename(name) if callable(rename) else rename.get(name, name)
        check_renamed(name, other)
        return other

    return name_of


def checked_version(version: SupportsIndex) -> int:
    """``version`` as an int. Raises SpecError for what is none, and for one that the wire can't carry."""
    try:
        if isinstance(version, bool):
            raise TypeError
        number = index(version)
    except TypeError:
        raise SpecError(f"version: expected an integer, got {version!r} ({type(version).__name__})") from None
    if not 0 <= number < 1 << 62:
        raise SpecError(f"version: expected 0 <= version < 2**62, got {number}")
    return number
