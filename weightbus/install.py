"""Writing arrived boxes into live parameters: plain tensors, DTensor shards, ``weight_loader`` hooks.

A *name map* says what a wire name means on this rank: a parameter's name, a tuple of the name and
further arguments for its ``weight_loader`` (``("qkv_proj.weight", "q")``), or None where another
rank of the replica takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from weightbus.box import Box
from weightbus.errors import SpecError, UpdateError
from weightbus.facts import Facts, Holding
from weightbus.layout import Layout, Part
from weightbus.part import plain_view
from weightbus.spec import Spec, castable
from weightbus.torch_trace import trace
from weightbus.trace import Effect, Untraceable

Mapped = str | tuple[Any, ...] | None
NameMap = Callable[[str], Mapped] | Mapping[str, Mapped]


# Effects of hooks, or why they have none that is known; kept by a rank, as tracing takes a while.
Traces = dict[Hashable, Effect | str]


@dataclass(slots=True, kw_only=True)
class Hook:
    """A ``weight_loader`` that installs one wire tensor, which it takes whole.

    effect: what it does to the parameter; or the reason why that is not known, so that no more can be
    digested than what it was given.
    """

    wire: str
    parameter: str
    tensor: Tensor
    arguments: tuple[Any, ...]
    effect: Effect | str

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


def _traced(
    tensor: Tensor, parameter: str, arguments: tuple[Any, ...], shape: tuple[int, ...], traces: Traces
) -> Effect | str:
    def hook(stand_ins: dict[str, Tensor], wire: Tensor) -> None:
        stand_in = stand_ins[parameter]
        stand_in.weight_loader(stand_in, wire, *arguments)  # type: ignore[attr-defined]

    key = (parameter, arguments, shape, tensor.data_ptr(), tensor.stride())
    try:
        if key not in traces:
            effects = trace(hook, shape, tensor.dtype, {parameter: tensor})
            traces[key] = effects.get(parameter, Effect())
    except Untraceable as reason:
        traces[key] = f"weight_loader of {parameter} can't be traced: {reason}"
    return traces[key]


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
        traces: Traces,
    ) -> None:
        """base: the server's layout, of which ``modules`` take part (None: all). manifest: the
        trainer's specs, by wire name. local: patterns of names that no update feeds, or feeds in part.
        traces: of hooks, looked up and added to.

        Raises SpecError, naming the tensor: wrong shape, a dtype that can't be cast to, a destination
        that is fed twice, in part or not at all.
        """
        self.base, self.manifest, self._traces = base, manifest, traces
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
        self._settle(local)
        for name in layout.specs:
            if name not in fed and not _matches(name, local):
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
            effect = _traced(tensor, name, arguments, spec.shape, self._traces)
            self.hooks[wire] = Hook(
                wire=wire, parameter=name, tensor=tensor, arguments=arguments, effect=effect
            )
        elif arguments:
            raise SpecError(f"{wire}: name_map gives arguments {arguments}, but {name} has no weight_loader")
        elif name in fed:
            raise SpecError(f"{wire}: writes {name}, which {fed[name]} writes already")
        elif spec.shape != own.shape:
            raise SpecError(f"{wire}: expected shape {list(own.shape)} of {name}, got {list(spec.shape)}")
        else:
            self.parts[wire] = self.layout.parts[name]
        fed[name] = wire

    def _settle(self, local: Sequence[str]) -> None:
        """Compare what the hooks of one parameter do, which is known once all are."""
        by_parameter: dict[str, list[Hook]] = {}
        for hook in self.hooks.values():
            by_parameter.setdefault(hook.parameter, []).append(hook)
        for name, hooks in by_parameter.items():
            effects = [hook.effect for hook in hooks if isinstance(hook.effect, Effect)]
            if len(effects) < len(hooks):
                continue
            for one, other in combinations(hooks, 2):
                if _meet(one.effect, other.effect):
                    one.effect = other.effect = f"weight_loaders of {name} overwrite each other's elements"
            if any(isinstance(hook.effect, str) for hook in hooks):
                continue
            written = sum(box.volume for effect in effects for box in effect.targets)
            shape = self.layout.specs[name].shape
            if written < Box.whole(shape).volume and not _matches(name, local):
                raise SpecError(
                    f"{name}: expected weight_loader to write all {Box.whole(shape).volume} elements of shape "
                    f"{list(shape)}, got {written} from {', '.join(hook.wire for hook in hooks)} "
                    f"(declare it with local=[...] if the others need no update)"
                )

    def arrived(self) -> dict[str, str]:
        """Tensors of which only the arrival can be digested, each with the reason."""
        return {wire: hook.effect for wire, hook in self.hooks.items() if isinstance(hook.effect, str)}

    def live(self, wire: str) -> list[tuple[Box, Tensor]]:
        """The boxes of a wire tensor that live here, each with its view; none behind an opaque hook."""
        if wire not in self.hooks:
            return [(part.box, part.tensor) for part in self.parts[wire]]
        hook = self.hooks[wire]
        if isinstance(hook.effect, str):
            return []
        parameter = plain_view(hook.tensor)
        return [(piece.box, piece.view.of(parameter)) for piece in hook.effect.pieces]

    def spoiled_fills(self) -> list[tuple[str, str]]:
        """Parameters whose constant elements, as a hook fills them, hold something else; each with a reason."""
        found = []
        for hook in self.hooks.values():
            for fill in hook.effect.fills if isinstance(hook.effect, Effect) else ():
                region = plain_view(hook.tensor)[fill.target.within(Box.whole(hook.tensor.shape))]
                if bool((region != fill.value).any()):
                    reason = f"expected {fill.value:g} in {fill.target}, where its weight_loader fills it"
                    found.append((hook.parameter, reason))
        return found

    def facts(self) -> Facts:
        """What this rank wants, by wire name."""
        opaque = self.arrived()
        return {
            wire: Holding(
                spec=spec,
                boxes=(Box.whole(spec.shape),) if wire in opaque else tuple(box for box, _ in self.live(wire)),
                in_place=all(part.tensor.is_contiguous() for part in self.parts.get(wire, ()))
                and wire not in self.hooks,
                why_arrived=opaque.get(wire, ""),
            )
            for wire, spec in self.specs.items()
        }

    def writes(self, wire: str, box: Box) -> list[tuple[Tensor, Box]]:
        """Where the elements of ``box`` live: views of the parameter, each with the box that it takes."""
        found = []
        for part in self.parts.get(wire, ()):
            if (inner := part.box.intersect(box)) is not None:
                found.append((part.tensor[inner.within(part.box)], inner))
        return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _meet(one: Effect | str, other: Effect | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return False
    return any(a.intersect(b) for a in one.targets for b in other.targets)


def _apply(name_map: NameMap | None, wire: str) -> Mapped:
    if name_map is None:
        return wire
    return name_map(wire) if callable(name_map) else name_map.get(wire, wire)
