"""Writing arrived boxes into live parameters: plain tensors, DTensor shards, and through loading code.

A *name map* says what a wire name means on this rank: a parameter's name (or, for a module with
``load_weights``, the name that this is told), a tuple of the name and further arguments for its
``weight_loader`` (``("qkv_proj.weight", "q")``), or None where another rank of the replica takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from weightbus.errors import SpecError
from weightbus.memory.shard import plain_view
from weightbus.planning.box import Box, less, overlap
from weightbus.planning.facts import Facts, Holding
from weightbus.planning.spec import Spec, castable
from weightbus.tensors.layout import Layout, Part
from weightbus.tensors.loaders.hook import Hook, Traces, load_weights_hooks, weight_loader_hook
from weightbus.tensors.loaders.loading import NotALoader
from weightbus.tensors.loaders.trace import Effect, Fill
from weightbus.tensors.loaders.twin import twin
from weightbus.tensors.torch_module import HOOK
from weightbus.tensors.torch_wrappers import UNDO, check_renamed, weight_of

Mapped = str | tuple[Any, ...] | None
# How many names of many an error tells.
SHOWN = 4

NameMap = Callable[[str], Mapped] | Mapping[str, Mapped]


class Target:
    """One server rank's destinations for the tensors of a manifest.

    specs: by wire name, what this rank takes, in its own dtypes. parts: those that are copied as they are.
    hooks: those of which loading code is called with the whole tensor. exempt: this rank's names that an
    update does not feed in full, each with the reason why that is no error. skipped: wire names of which this
    rank takes nothing by its own decision, each with the reason. unfed: names without
    elements that nothing feeds.
    """

    def __init__(
        self,
        base: Layout,
        modules: Sequence[str] | None,
        manifest: Mapping[str, Spec],
        *,
        ties: Mapping[str, str] | None = None,
        name_map: NameMap | None,
        local: Sequence[str],
        derived: Sequence[str] = (),
        loaders: Mapping[str, nn.Module] | None = None,
        trust_traces: bool = False,
        device: torch.device | None = None,
        traces: Traces,
    ) -> None:
        """base: the server's layout, of which ``modules`` take part (None: all). manifest: the
        trainer's specs, by wire name. ties: names of the manifest that are one tensor, each with the least of
        them; what one of them has fed needs no other. local, derived: patterns of names that no update feeds,
        or feeds in part. loaders: modules with ``load_weights``, by the prefix of names. trust_traces: write
        what traced ``weight_loader`` hooks would, without calling them. device: where bytes arrive; the
        layout's by default. traces: looked up and added to.

        Raises SpecError, naming the tensor: wrong shape, a dtype that can't be cast to, a destination
        that is fed twice, in part or not at all.
        """
        self.base, self.manifest, self._traces, self._trust_traces = base, manifest, traces, trust_traces
        self.modules, self.layout = modules, base.select(modules)
        self._device = base.device if device is None else device
        self.specs: dict[str, Spec] = {}
        self.parts: dict[str, tuple[Part, ...]] = {}
        self.ties: Mapping[str, str] = ties or {}
        self.exempt: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.unfed: dict[str, str] = {}
        self._hooks: dict[str, Hook] = {}
        self._fills: list[tuple[str, Fill]] = []  # of load_weights, which writes them once for all tensors
        # Prefixes of modules with load_weights, why, and which parameters it writes to, if that is known.
        self._untraced: dict[str, tuple[str, frozenset[str] | None]] = {}
        self._covered: set[str] = set()  # names that hooks write in full
        self._declared = {"local": tuple(local), "derived": tuple(derived)}
        fed: dict[str, str] = {}
        given: dict[str, dict[str, tuple[str, Spec]]] = {}
        for wire, spec in manifest.items():
            mapped = _apply(name_map, wire)
            if mapped is None:
                self.skipped[wire] = "name_map gives None"
                continue
            name, arguments = (mapped, ()) if isinstance(mapped, str) else (mapped[0], tuple(mapped[1:]))
            prefix = next((p for p in loaders or () if name.startswith(p)), None)
            if isinstance(mapped, str) and prefix is not None:
                given.setdefault(prefix, {})[wire] = name.removeprefix(prefix), spec
                continue
            self._feed(wire, spec, name, arguments, fed)
        for prefix, wires in given.items():
            self._load(prefix, (loaders or {})[prefix], wires, fed)
        self._settle()
        self._cover(fed)
        self.hooks = {wire: hook for wire, hook in self._hooks.items() if hook.opaque or not hook.direct}

    def _feed(self, wire: str, spec: Spec, name: str, arguments: tuple[Any, ...], fed: dict[str, str]) -> None:
        check_renamed(wire, name)
        name = self.layout.aliases.get(name, name)
        if name in fed and self._are_tied(wire, fed[name]) and not arguments:
            return
        if name not in self.layout.specs:
            if name != wire or arguments:
                raise SpecError(f"{wire}: name_map gives {name!r}, which this rank's model does not have")
            return
        own = self.layout.specs[name]
        tensor = self.layout.tensors[name]
        if not castable(spec.dtype, own.dtype):
            raise SpecError(f"{wire}: expected a dtype that casts to {own.dtype} of {name}, got {spec.dtype}")
        self.specs[wire] = Spec(name=wire, dtype=own.dtype, shape=spec.shape)
        if getattr(tensor, "weight_loader", None) is not None:
            self._hooks[wire] = weight_loader_hook(
                self.specs[wire], name, tensor, arguments, traces=self._traces, direct=self._trust_traces
            )
        elif arguments:
            raise SpecError(f"{wire}: name_map gives arguments {arguments}, but {name} has no weight_loader")
        elif name in fed:
            raise SpecError(
                f"{wire}: writes {name}, which {fed[name]} writes already; if this rank ties what the trainer "
                f"does not, tie them there too, or give one of them no destination (name_map to None)"
            )
        elif spec.shape != own.shape:
            cure = (
                f"; if this one only holds the place, {HOOK}() gives the live one" if own.elements < 2 else ""
            )
            raise SpecError(f"{wire}: expected shape {list(own.shape)} of {name}, got {list(spec.shape)}{cure}")
        else:
            self.parts[wire] = self.layout.parts[name]
        fed[name] = wire

    def _load(
        self, prefix: str, module: nn.Module, given: Mapping[str, tuple[str, Spec]], fed: dict[str, str]
    ) -> None:
        """The tensors that a module's ``load_weights`` takes."""
        label = f"load_weights of {prefix.rstrip('.') or type(module).__name__}"
        own = {name: tensor for name, tensor in self.layout.tensors.items() if name.startswith(prefix)}
        if self.layout.stand_ins:
            module = twin(module, self.layout.stand_ins)  # which loads into them
        try:
            hooks, loading = load_weights_hooks(label, module, given, own, ties=self.ties, traces=self._traces)
        except NotALoader:
            for wire, (name, spec) in given.items():
                self._feed(wire, spec, f"{prefix}{name}", (), fed)
            return
        for wire in given.keys() - hooks.keys():
            self.skipped[wire] = f"{label} takes nothing of it"
        for wire, hook in hooks.items():
            self.specs[wire] = Spec(name=wire, dtype=loading.dtypes[wire], shape=given[wire][1].shape)
            for name in hook.known:
                if name in fed and fed[name] not in hooks:
                    raise SpecError(f"{wire}: writes {name}, which {fed[name]} writes already")
                fed[name] = wire
        self._hooks |= hooks
        self._fills += [(name, fill) for name, effect in loading.effects.items() for fill in effect.fills]
        if loading.opaque:
            self._untraced[prefix] = next(iter(loading.opaque.values())), loading.written

    def begin(self) -> None:
        """An update of these destinations starts."""
        for hook in self.hooks.values():
            hook.begin()

    def _are_tied(self, one: str, other: str) -> bool:
        return one in self.ties and self.ties[one] == self.ties.get(other)

    def _settle(self) -> None:
        """Compare what the hooks of one parameter do, which is known once all are."""
        for name, hooks in self._by_parameter().items():
            for one, other in combinations(hooks, 2):
                if _meet(one.known.get(name), other.known.get(name)):
                    one.effects = other.effects = f"weight_loaders of {name} overwrite each other's elements"

    def _by_parameter(self) -> dict[str, list[Hook]]:
        """Hooks by the parameters that they write, as far as is known."""
        found: dict[str, list[Hook]] = {}
        for hook in self._hooks.values():
            for name in hook.parameters if hook.opaque and len(hook.parameters) == 1 else hook.known:
                found.setdefault(name, []).append(hook)
        return found

    def _cover(self, fed: Mapping[str, str]) -> None:
        """Raise SpecError unless each element of this rank's is fed, or its name is declared."""
        hooks = self._by_parameter()
        missing = []
        self.exempt |= {name: self._declaration(name) or "" for name in self.layout.left_out}
        for name, spec in self.layout.specs.items():
            writers, whole = hooks.get(name, []), Box.whole(spec.shape)
            if any(hook.opaque for hook in writers) or (name in fed and not writers):
                continue
            if not whole.volume:
                # An engine that computes from something else may have given up the storage of this.
                if name not in fed and (word := self._declaration(name)) is not None:
                    self.exempt[name] = word
                elif name not in fed:
                    self.unfed[name] = f"has no elements, {list(spec.shape)}, and no tensor of the trainer's"
                continue
            boxes = [fill.target for other, fill in self._fills if other == name]
            boxes += [box for hook in writers for box in hook.known[name].targets]
            written = sum(box.volume for box in boxes)
            if written == whole.volume:
                self._covered.add(name)
                continue
            untraced = next(
                (
                    why
                    for p, (why, written) in self._untraced.items()
                    if name.startswith(p) and (written is None or name in written)
                ),
                None,
            )
            if (word := self._declaration(name)) is not None:
                self.exempt[name] = word
            elif untraced is not None:
                self.exempt[name] = untraced
            elif boxes:
                code = writers[0].code if writers else "load_weights"
                raise SpecError(
                    f"{name}: expected {code} to write all {whole.volume} elements of shape "
                    f"{list(spec.shape)}, got {written} from {', '.join(hook.wire for hook in writers)}; "
                    f"{_gap(whole, boxes)} is left out "
                    f"(declare it with local=[...] if the others need no update)"
                )
            else:
                missing.append(name)
        if missing:
            others = f"; the same for {_some(missing[1:])}" if len(missing) > 1 else ""
            spare = [wire for wire in self.manifest if wire not in self.specs and wire not in self.ties]
            if spare:
                made = [(one, weight_of(one)) for names in (spare, missing) for one in names]
                known = {*missing, *spare}
                if computed := next(((one, weight) for one, weight in made if weight in known), None):
                    others += f"; one end computes {computed[1]} from {computed[0]}: {UNDO}"
                others += (
                    f"; {len(missing)} of this rank's {len(self.layout.specs)} tensors get nothing, it has no "
                    f"use for {len(spare)} of the trainer's {len(self.manifest)}: {_some(spare)}; is there "
                    f"another prefix, for a name_map?"
                )
            raise SpecError(
                f"{missing[0]}: missing name: expected a tensor of the trainer for this destination, got none "
                f"(declare it with local=[...] if no update feeds it, with derived=[...] if the engine "
                f"computes it){others}"
            )

    def _declaration(self, name: str) -> str | None:
        return next((word for word, patterns in self._declared.items() if matches(name, patterns)), None)

    def arrived(self) -> dict[str, str]:
        """Tensors of which only the arrival can be digested, each with the reason."""
        return {wire: hook.opaque for wire, hook in self._hooks.items() if hook.opaque}

    @property
    def has_hooks(self) -> bool:
        """Whether loading code is asked, or was."""
        return bool(self._hooks)

    def writes_like(self, other: Target) -> bool:
        """Whether the loading code of both does the same."""
        mine, others = (
            ({wire: hook.effects for wire, hook in one._hooks.items()}, one.specs, one._fills, one.skipped)
            for one in (self, other)
        )
        return mine == others

    def overwritable(self) -> set[str]:
        """Wire names whose places an opaque hook may write to, once they have been filled."""
        open_to = {name for hook in self._hooks.values() if hook.opaque for name in hook.parameters}
        return {wire for wire, hook in self._hooks.items() if not hook.opaque and open_to & hook.known.keys()}

    def hidden(self) -> list[Part]:
        """This rank's own parameters of which no wire tensor's digest tells all, under their own names."""
        names = {name for hook in self._hooks.values() if hook.opaque for name in hook.parameters}
        return [
            part
            for name in sorted(names - self._covered, key=str.encode)
            if self._declaration(name) is None
            for part in self.layout.parts[name]
        ]

    def live(self, wire: str) -> list[tuple[Box, Tensor]]:
        """The boxes of a wire tensor that live here, each with its view; none behind an opaque hook."""
        if wire not in self._hooks:
            return [(part.box, part.tensor) for part in self.parts.get(wire, ())]
        return [
            (piece.box, piece.view.of(plain_view(self.layout.tensors[name])))
            for name, effect in self._hooks[wire].known.items()
            for piece in effect.pieces
        ]

    def fills(self, *, direct_only: bool = False) -> list[tuple[str, str, Tensor, Fill]]:
        """Regions that loading code sets to constants, each after its parameter's and the code's name."""
        found = [
            (name, hook.code, fill)
            for hook in self._hooks.values()
            if hook.direct or not direct_only
            for name, effect in hook.known.items()
            for fill in effect.fills
        ]
        found += [(name, "load_weights", fill) for name, fill in self._fills]
        return [
            (name, code, parameter[fill.target.within(Box.whole(parameter.shape))], fill)
            for name, code, fill in found
            for parameter in [plain_view(self.layout.tensors[name])]
        ]

    def fill(self) -> None:
        """Write the constants that no called hook writes."""
        for _, _, region, fill in self.fills(direct_only=True):
            region.fill_(fill.value)

    def spoiled_fills(self) -> list[tuple[str, Box, str]]:
        """Parameters whose constant elements hold something else: name, the box that does, and a reason."""
        found = []
        for name, code, region, fill in self.fills():
            wrong = region != region.new_full((), fill.value)
            if bool(wrong.any()):
                spots = wrong.nonzero()
                low, high = spots.amin(0).tolist(), spots.amax(0).tolist()
                offsets = [base + first for base, first in zip(fill.target.offsets, low, strict=True)]
                sizes = [last - first + 1 for first, last in zip(low, high, strict=True)]
                reason = f"expected {fill.value} in {fill.target}, where its {code} fills it"
                found.append((name, Box(tuple(offsets), tuple(sizes)), reason))
        return found

    def facts(self) -> Facts:
        """What this rank wants, by wire name, and what it has no use for."""
        opaque = self.arrived()
        skipped = {
            wire: Holding(spec=self.manifest[wire], boxes=(), skipped=why) for wire, why in self.skipped.items()
        }
        return skipped | {
            wire: Holding(
                spec=spec,
                boxes=(Box.whole(spec.shape),) if wire in opaque else tuple(box for box, _ in self.live(wire)),
                in_place=wire not in self.hooks
                and all(view.is_contiguous() and view.device == self._device for _, view in self.live(wire)),
                why_arrived=opaque.get(wire, ""),
            )
            for wire, spec in self.specs.items()
        }

    def writes(self, wire: str, box: Box) -> list[tuple[Tensor, Box]]:
        """Where the elements of ``box`` live: views of the parameter, each with the box that it takes.

        None for a tensor that a hook takes whole.
        """
        if wire in self.hooks:
            return []
        return [
            (view[inner.within(own)], inner)
            for own, view in self.live(wire)
            if (inner := own.intersect(box)) is not None
        ]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is the name itself, such as ``cache[1]``, or fits it as in a shell."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _meet(one: Effect | None, other: Effect | None) -> bool:
    return bool(one and other and overlap(one.targets, other.targets))


def _gap(whole: Box, boxes: Sequence[Box]) -> Box:
    """A box of ``whole`` that none of ``boxes`` touches."""
    left = [whole]
    for box in boxes:
        left = [rest for one in left for rest in less(one, box)]
    return left[0]


def _apply(name_map: NameMap | None, wire: str) -> Mapped:
    if name_map is None:
        return wire
    return name_map(wire) if callable(name_map) else name_map.get(wire, wire)
