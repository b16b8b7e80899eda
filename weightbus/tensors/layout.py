"""Where a rank's tensors lie: each one's spec, and the local view behind each of its boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from weightbus.errors import SpecError
from weightbus.memory.shard import Part, spec_of
from weightbus.planning.box import Box
from weightbus.planning.spec import Spec
from weightbus.tensors.torch_dtensor import is_dtensor, local_parts, local_tensor
from weightbus.tensors.torch_module import (
    Elsewhere,
    Watch,
    named_pairs,
    own_tensors,
    reshard,
    stand_ins,
    tensors_of,
    walk,
)
from weightbus.tensors.torch_wrappers import beside, is_wrapper, kind_of

__all__ = ["Layout", "Part", "Source", "layout_of", "named_tensors"]

Source = nn.Module | Mapping[str, nn.Module] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What one rank holds of a source; everything by wire name is in canonical order, that of the names'
    UTF-8 bytes, so that it does not hang on the order in which a model was built.

    tensors: the live objects; where one is tied, any of them.
    specs: by wire name; the same on all ranks of a job whose ranks build the same model.
    parts: by wire name, this rank's parts; () where it holds none.
    aliases: each left-out name of a tied tensor, and the name it travels under: the least of its
        names by UTF-8 bytes.
    modules: names of a mapping's modules; () for other sources.
    owners: by wire name, the modules that hold the tensor under any of its names.
    watch: sees whether the tensors are still where the parts say.
    left_out: names of declared tensors that can't be moved, each with the reason.
    stand_ins: by the ``id`` of a module's own tensor, the live one, where ``weightbus_tensors`` gives another.
    beside: names of tensors that wrappers hold beside the model, such as adapters, each with the reason.
    """

    tensors: dict[str, Tensor]
    specs: dict[str, Spec]
    parts: dict[str, tuple[Part, ...]]
    aliases: dict[str, str]
    modules: tuple[str, ...]
    owners: dict[str, frozenset[str]]
    watch: Watch
    stand_ins: dict[int, Tensor]
    left_out: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)

    def boxes(self) -> dict[str, tuple[Box, ...]]:
        return {name: tuple(part.box for part in parts) for name, parts in self.parts.items()}

    @property
    def device(self) -> torch.device:
        """The GPU on which parts lie, others may lie in host memory; the CPU if all do, or there are none.

        Raises SpecError if they lie on several GPUs.
        """
        names = {part.tensor.device: name for name, parts in self.parts.items() for part in parts}
        names.pop(torch.device("cpu"), None)
        if len(names) > 1:
            (one, a), (two, b) = list(names.items())[:2]
            raise SpecError(f"{b}: expected a tensor on {one} like {a}, or on the CPU, got one on {two}")
        return next(iter(names), torch.device("cpu"))

    def select(self, modules: Sequence[str] | None) -> Layout:
        """The layout of these modules of a mapping; None selects all.

        A tensor that is tied across modules belongs to each of them, under its one wire name.
        Raises SpecError for a name that is not a module's, and for no name at all.
        """
        if modules is None:
            return self
        known = ", ".join(self.modules) or "none, as the source is not a mapping of modules"
        if isinstance(modules, str) or not modules:
            raise SpecError(f"modules: expected a list of names among {known}; got {modules!r}")
        for module in modules:
            if module not in self.modules:
                raise SpecError(f"{module}: expected a module among {known}; got {module!r}")
        names = {name for name, owners in self.owners.items() if not owners.isdisjoint(modules)}
        return replace(
            self,
            tensors={n: v for n, v in self.tensors.items() if n in names},
            specs={n: v for n, v in self.specs.items() if n in names},
            parts={n: v for n, v in self.parts.items() if n in names},
            aliases={alias: n for alias, n in self.aliases.items() if n in names},
            modules=tuple(m for m in self.modules if m in modules),
            owners={n: v for n, v in self.owners.items() if n in names},
        )

    def beside_of(self, modules: Sequence[str] | None) -> dict[str, str]:
        """``beside``, of these modules of a mapping; None selects all."""
        prefixes = ("",) if modules is None else tuple(f"{module}." for module in modules)
        return {name: why for name, why in self.beside.items() if name.startswith(prefixes)}

    def moved(self) -> str | None:
        """A name whose tensor is no longer where its parts say, of the whole source; None if all are.

        A few milliseconds for 20,000 tensors. Puts FSDP2 modules back to their sharded parameters.
        """
        return self.watch.moved()

    def changed(self) -> str | None:
        """As ``moved``, and a name whose tensor has another shape, strides or dtype at the same address."""
        return self.watch.changed()

    def overlapping(self) -> list[tuple[str, str]]:
        """Pairs of names that share some memory without being tied; a name with itself if its elements do.

        An error wherever the parts are to be written. n log n unless many tensors interleave.
        """
        spans = []
        for name, parts in self.parts.items():
            for tensor in (part.tensor for part in parts if part.tensor.numel()):
                reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
                low = tensor.data_ptr()
                spans.append((str(tensor.device), low, low + (reach + 1) * tensor.itemsize, name, tensor))
        spans.sort(key=lambda span: span[:4])
        pairs = {(name, name) for _, _, _, name, tensor in spans if _repeats(tensor)}
        active: list[tuple[str, int, int, str, Tensor]] = []
        for span in spans:
            device, low, _, name, tensor = span
            active = [other for other in active if other[0] == device and other[2] > low]
            for _, _, _, other, memory in active:
                if other != name and _share(tensor, memory):
                    pairs.add((min(name, other), max(name, other)))
            active.append(span)
        return sorted(pairs)


def renamed_parts(
    parts: Mapping[str, Sequence[Part]], aliases: Mapping[str, str]
) -> dict[str, tuple[Part, ...]]:
    """The parts of each alias, whose tensor is another name's."""
    return {
        alias: tuple(replace(part, spec=replace(part.spec, name=alias)) for part in parts[name])
        for alias, name in aliases.items()
    }


@dataclass(slots=True)
class _Tied:
    """One tensor under all its names, in the order seen."""

    tensor: Tensor
    parts: list[Part]
    names: list[str] = field(default_factory=list)
    owners: set[str] = field(default_factory=set)


def layout_of(
    source: Source,
    *,
    persistent_only: bool = True,
    name_of: Callable[[str], str | None] | None = None,
    declared: Callable[[str], bool] = lambda name: False,
) -> Layout:
    """The layout of a module, a mapping of names to modules, or (name, tensor) pairs, which are used up.

    Parameters and buffers, of these the persistent ones unless told otherwise; tied tensors once; what a
    module's ``weightbus_tensors()`` gives, in place of its own of that name (docs/offload.md). Wire names of a
    mapping are ``module.tensor``. name_of: gives each tensor another name, or None to leave it out.
    declared: names for which a tensor that can't be moved is left out, and no error. Moves no data and talks to
    no other rank; puts FSDP2 modules back to their sharded parameters.
    Raises SpecError for a name that is given twice, and for a tensor or placement that can't be moved.
    """
    walked = _walked(source, persistent_only=persistent_only, name_of=name_of)
    left_out: dict[str, str] = {}
    groups: dict[object, _Tied] = {}  # by the tensor's identity, and by the place of its elements
    tied: list[_Tied] = []
    for top, name, tensor in walked.rows:
        group = groups.get(id(tensor))
        if group is None:
            try:
                parts = local_parts(name, tensor)
                spec_of(name, tensor)
            except SpecError as error:
                if not declared(name):
                    raise
                left_out[name] = str(error)
                continue
            place = _place(tensor)
            group = groups.get(place) if place else None
            if group is None:
                tied.append(group := _Tied(tensor, parts))
            groups[id(tensor)] = group
            if place:
                groups[place] = group
        group.names.append(name)
        group.owners.add(top)

    kept = {min(group.names, key=str.encode): group for group in tied}
    kept = {name: kept[name] for name in sorted(kept, key=str.encode)}
    specs = {name: spec_of(name, group.tensor) for name, group in kept.items()}
    return Layout(
        tensors={name: group.tensor for name, group in kept.items()},
        specs=specs,
        parts={n: tuple(replace(part, spec=specs[n]) for part in group.parts) for n, group in kept.items()},
        aliases={alias: name for name, group in kept.items() for alias in group.names if alias != name},
        modules=tuple(source) if isinstance(source, Mapping) else (),
        owners={name: frozenset(group.owners) for name, group in kept.items()},
        watch=Watch(
            walked.modules,
            [(name, tensor) for _, name, tensor in walked.rows if name not in left_out],
            walked.elsewhere,
            mapping=source if isinstance(source, Mapping) else {},
            persistent_only=persistent_only,
        ),
        stand_ins=walked.stand_ins,
        left_out=left_out,
        beside=walked.beside,
    )


def named_tensors(source: Source, *, persistent_only: bool = True) -> dict[str, Tensor]:
    """The live tensors as the source has them, in its own order, each tied one under all its names. Those that
    a module keeps elsewhere (``weightbus_tensors``) are new objects at each call, over the same memory.

    Names as in ``layout_of``; pairs are used up. Puts FSDP2 modules back to their sharded parameters.
    Raises SpecError for a name that is given twice.
    """
    return {name: tensor for _, name, tensor in _walked(source, persistent_only=persistent_only).rows}


@dataclass(frozen=True, slots=True)
class _Walked:
    """modules: with their prefixes. rows: each tensor with its top module's name and its wire name.
    elsewhere: the modules that keep tensors elsewhere. stand_ins, beside: as in ``Layout``."""

    modules: list[tuple[str, nn.Module]]
    rows: list[tuple[str, str, Tensor]]
    elsewhere: list[Elsewhere]
    stand_ins: dict[int, Tensor]
    beside: dict[str, str]


def _walked(
    source: Source, *, persistent_only: bool, name_of: Callable[[str], str | None] | None = None
) -> _Walked:
    visits = [(top, *visit) for top, prefix, module in _modules_of(source) for visit in walk(module, prefix)]
    modules = [(prefix, module) for _, prefix, module in visits]
    reshard([module for _, module in modules])
    elsewhere = Elsewhere.among(modules)
    live = stand_ins(elsewhere)
    rows = [
        (top, name, live.get(id(tensor), tensor))
        for top, prefix, module in visits
        for name, tensor in tensors_of(prefix, module, persistent_only=persistent_only)
    ]
    seen_tensors = {id(tensor) for _, _, tensor in rows}
    besides: dict[str, str] = {}
    for prefix, wrapper in reversed(modules):  # the inner ones first: those around them hold the same
        for path, one in [(prefix, wrapper), *beside(prefix, wrapper)] if is_wrapper(wrapper) else ():
            for name, tensor in own_tensors(path, one, persistent_only=persistent_only):
                if id(tensor) not in seen_tensors and (name_of is None or name_of(name) is not None):
                    seen_tensors.add(id(tensor))
                    besides[name] = f"a {kind_of(wrapper)} holds it beside the model's weights"
    if not isinstance(source, nn.Module | Mapping):
        what = "source: expected an nn.Module, a mapping of modules or (name, tensor) pairs"
        rows = [("", name, tensor) for name, tensor in named_pairs(source, what)]
    if name_of is not None:
        renamed = [(top, name_of(name), tensor) for top, name, tensor in rows]
        rows = [(top, name, tensor) for top, name, tensor in renamed if name is not None]
    seen: set[str] = set()
    for _, name, _ in rows:
        if name in seen:
            raise SpecError(f"{name}: expected each name once, got it twice")
        seen.add(name)
    return _Walked(modules, rows, elsewhere, live, besides)


def _modules_of(source: Source) -> list[tuple[str, str, nn.Module]]:
    """Each top module's name and the prefix of its wire names; none for an iterable of pairs."""
    if isinstance(source, nn.Module):
        return [("", "", source)]
    if not isinstance(source, Mapping):
        return []
    for name, module in source.items():
        if not isinstance(name, str) or not name:
            raise SpecError(f"source: expected a mapping by module names, got the key {name!r}")
        if not isinstance(module, nn.Module):
            hint = "; pass .items() for a mapping of tensors" if isinstance(module, Tensor) else ""
            raise SpecError(f"{name}: expected an nn.Module, got a {type(module).__name__}{hint}")
    return [(name, f"{name}.", module) for name, module in source.items()]


def _place(tensor: Tensor) -> tuple[object, ...] | None:
    """Equal for tensors that are tied through different objects, as those of a state_dict; None for an
    empty shard, which lies nowhere and is tied by identity only."""
    local = local_tensor(tensor)
    if not local.numel():
        return None
    shapes = tuple(tensor.shape), tuple(local.shape), local.stride()
    placements = repr(tensor.placements) if is_dtensor(tensor) else ""
    return "place", local.device, local.data_ptr(), local.dtype, shapes, placements


def _repeats(tensor: Tensor) -> bool:
    """Whether elements of one tensor may share memory: not if each stride steps over all smaller ones."""
    reach = 0
    for stride, n in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += (n - 1) * stride
    return False


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose extents overlap have bytes in common. Solved by numpy from addresses and
    strides alone: neither tensor's memory is read, so it may be a GPU's."""
    return np.shares_memory(_addresses(a), _addresses(b))


def _addresses(tensor: Tensor) -> np.ndarray[Any, Any]:
    class Addresses:
        __array_interface__: ClassVar = {
            "version": 3,
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.itemsize for stride in tensor.stride()),
            "typestr": f"|V{tensor.itemsize}",
        }

    return np.asarray(Addresses())
