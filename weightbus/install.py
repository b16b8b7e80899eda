"""Writing arrived boxes into live parameters: plain tensors, DTensor shards, ``weight_loader`` hooks.

A *name map* says what a wire name means on this rank: a parameter's name, a tuple of the name and
further arguments for its ``weight_loader`` (``("qkv_proj.weight", "q")``), or None where another
rank of the replica takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from weightbus.box import Box
from weightbus.errors import SpecError, UpdateError
from weightbus.facts import Facts, Holding
from weightbus.layout import Layout, Part
from weightbus.spec import Spec, castable

Mapped = str | tuple[Any, ...] | None
NameMap = Callable[[str], Mapped] | Mapping[str, Mapped]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """A ``weight_loader`` that installs one wire tensor, which it takes whole."""

    wire: str
    parameter: str
    tensor: Tensor
    arguments: tuple[Any, ...]

    def run(self, arrived: Tensor) -> None:
        """Call ``weight_loader(param, arrived, *arguments)``. Raises UpdateError with its own error."""
        before = self.tensor.data_ptr()
        try:
            with torch.no_grad():
                self.tensor.weight_loader(self.tensor, arrived, *self.arguments)  # type: ignore[attr-defined]
        except Exception as error:
            what = f"weight_loader of {self.parameter} raised {type(error).__name__}: {error}"
            raise UpdateError(f"{self.wire}: {what}") from error
        if self.tensor.data_ptr() != before:
            raise UpdateError(f"{self.wire}: weight_loader of {self.parameter} rebound its storage")


class Target:
    """One server rank's destinations for the tensors of a manifest."""

    def __init__(
        self,
        base: Layout,
        modules: Sequence[str] | None,
        manifest: Mapping[str, Spec],
        *,
        name_map: NameMap | None,
        local: Sequence[str],
    ) -> None:
        """base: the server's layout, of which ``modules`` take part (None: all). manifest: the
        trainer's specs, by wire name. local: patterns of names that no update feeds.

        Raises SpecError, naming the tensor: wrong shape, a dtype that can't be cast to, a destination
        that is fed twice or not at all.
        """
        self.base, self.manifest = base, manifest
        self.layout = layout = base.select(modules)
        self.specs: dict[str, Spec] = {}
        self.parts: dict[str, tuple[Part, ...]] = {}
        self.hooks: dict[str, Hook] = {}
        fed: dict[str, str] = {}
        for wire, spec in manifest.items():
            mapped = _apply(name_map, wire)
            if mapped is None:
                continue
            name, arguments = (mapped, ()) if isinstance(mapped, str) else (mapped[0], tuple(mapped[1:]))
            name = layout.aliases.get(name, name)
            if name not in layout.specs:
                if name_map is not None and (isinstance(mapped, tuple) or mapped != wire):
                    raise SpecError(f"{wire}: name_map gives {name!r}, which this rank's model does not have")
                continue
            self._feed(wire, spec, name, arguments, fed)
        for name in layout.specs:
            if name not in fed and not any(fnmatchcase(name, pattern) for pattern in local):
                raise SpecError(
                    f"{name}: missing name: expected a tensor of the trainer for this destination, got none "
                    f"(declare it with local=[...] if no update feeds it)"
                )

    def _feed(self, wire: str, spec: Spec, name: str, arguments: tuple[Any, ...], fed: dict[str, str]) -> None:
        own = self.layout.specs[name]
        tensor = self.layout.tensors[name]
        if not castable(spec.dtype, own.dtype):
            raise SpecError(f"{wire}: expected a dtype that casts to {own.dtype} of {name}, got {spec.dtype}")
        self.specs[wire] = Spec(name=wire, dtype=own.dtype, shape=spec.shape)
        if getattr(tensor, "weight_loader", None) is not None:
            self.hooks[wire] = Hook(wire=wire, parameter=name, tensor=tensor, arguments=arguments)
        elif arguments:
            raise SpecError(f"{wire}: name_map gives arguments {arguments}, but {name} has no weight_loader")
        elif name in fed:
            raise SpecError(f"{wire}: writes {name}, which {fed[name]} writes already")
        elif spec.shape != own.shape:
            raise SpecError(f"{wire}: expected shape {list(own.shape)} of {name}, got {list(spec.shape)}")
        else:
            self.parts[wire] = self.layout.parts[name]
        fed[name] = wire

    def facts(self) -> Facts:
        """What this rank wants, by wire name."""
        facts = {}
        for wire, spec in self.specs.items():
            if wire in self.hooks:
                why = f"weight_loader of {self.hooks[wire].parameter} takes it whole"
                facts[wire] = Holding(spec=spec, boxes=(Box.whole(spec.shape),), why_arrived=why)
            else:
                facts[wire] = Holding(spec=spec, boxes=tuple(part.box for part in self.parts[wire]))
        return facts

    def writes(self, wire: str, box: Box) -> list[tuple[Tensor, Box]]:
        """Where the elements of ``box`` live: views of the parameter, each with the box that it takes."""
        found = []
        for part in self.parts.get(wire, ()):
            if (inner := part.box.intersect(box)) is not None:
                found.append((part.tensor[inner.within(part.box)], inner))
        return found


def _apply(name_map: NameMap | None, wire: str) -> Mapped:
    if name_map is None:
        return wire
    return name_map(wire) if callable(name_map) else name_map.get(wire, wire)
