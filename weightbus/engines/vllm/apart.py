"""Modules that are made a second time, to find constants (docs/tree.md), enter themselves nowhere.

vLLM's layers enter themselves by name into the configuration that they are made under. A second one would be
refused there, or would stand in the first one's place; and a copy of the configuration would copy them all,
with their caches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class _NoNames(dict[str, Any]):
    def __setitem__(self, name: str, layer: Any) -> None:
        pass


class _NoRows(list[Any]):
    def append(self, name: Any) -> None:
        pass


REGISTRIES: dict[str, dict[str, Any] | list[Any]] = {
    "static_forward_context": _NoNames(),
    "static_all_moe_layers": _NoRows(),
}
"""Where layers enter themselves, by attribute of the compilation's configuration; and what takes none. The same
objects each time: others would be a change of the model's tree, and all of it would be looked into again."""


@contextlib.contextmanager
def apart(vllm_config: Any) -> Iterator[None]:
    """The registries of layers take none, and at the end are what they were. No forward pass runs meanwhile."""
    compilation = vllm_config.compilation_config
    own = {name: getattr(compilation, name) for name in REGISTRIES}
    try:
        for name, empty in REGISTRIES.items():
            setattr(compilation, name, empty)
        yield
    finally:
        for name, value in own.items():
            setattr(compilation, name, value)
            REGISTRIES[name].clear()  # of what was put in otherwise
