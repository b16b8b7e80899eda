"""The engine's own loading code: ``weight_loader`` of a parameter, ``load_weights`` of a module.

Both are traced once (``torch_trace``), so that what they write is known, as boxes. Where that fails, the
code is called with whole tensors, and no more can be digested than what it was given.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from weightbus.errors import SpecError, UpdateError
from weightbus.spec import Spec, castable
from weightbus.torch_dtensor import is_dtensor
from weightbus.torch_module import twin
from weightbus.torch_taint import reaches
from weightbus.torch_trace import Traced, trace, trace_many
from weightbus.trace import Effect, Fault, Overwritten, Piece, Untraceable

# A module whose load_weights fails on more tensors than this is not tried without them any further.
MAX_FAILURES = 16


@dataclass(slots=True, kw_only=True)
class Hook:
    """Code that installs one wire tensor.

    call: takes the tensor whole. parameters: those that it may write. effects: what it does to each; or
    the reason why that is not known. direct: what is known to be written may be written without a call. begin:
    is called when an update starts.
    """

    wire: str
    what: str
    call: Callable[[Tensor], object]
    parameters: Mapping[str, Tensor]
    effects: Mapping[str, Effect] | str
    direct: bool
    begin: Callable[[], None] = lambda: None

    @property
    def opaque(self) -> str:
        """Why its effects are not known; empty if they are."""
        return self.effects if isinstance(self.effects, str) else ""

    @property
    def known(self) -> Mapping[str, Effect]:
        return {} if isinstance(self.effects, str) else self.effects

    @property
    def to_host(self) -> bool:
        """Whether it may write to host memory, for which a stream's work has to be waited for."""
        return any(tensor.device.type == "cpu" for tensor in self.parameters.values())

    @property
    def code(self) -> str:
        """``weight_loader`` or ``load_weights``."""
        return self.what.split(" of ", 1)[0]

    def run(self, arrived: Tensor) -> None:
        """Call it with the whole tensor. Raises UpdateError with its own error."""
        before = [tensor.data_ptr() for tensor in self.parameters.values()]
        # What was made in inference mode is written in it only.
        inference = any(tensor.is_inference() for tensor in self.parameters.values())
        try:
            with torch.inference_mode(inference), torch.no_grad():
                self.call(arrived)
        except Exception as error:
            raise UpdateError(f"{self.wire}: {self.what} raised {type(error).__name__}: {error}") from error
        for (name, tensor), address in zip(self.parameters.items(), before, strict=True):
            if tensor.data_ptr() != address:
                raise UpdateError(f"{self.wire}: {self.what} rebound the storage of {name}")


@dataclass(frozen=True, slots=True)
class Loading:
    """What a module's ``load_weights`` does. effects: by parameter; pieces name their wire tensors.

    dtypes: those in which it writes wire tensors. opaque: tensors that it can't be traced with, and why.
    written: all parameters that it writes to; None where that is not known. together: sets of opaque tensors
    that it takes in one call, as it makes something of all of them.
    """

    effects: Mapping[str, Effect]
    dtypes: Mapping[str, str]
    opaque: Mapping[str, str]
    written: frozenset[str] | None = None
    together: tuple[tuple[str, ...], ...] = ()

    def by_wire(self) -> dict[str, dict[str, Effect]]:
        """Effects by wire tensor and parameter, without fills."""
        pieces: dict[str, dict[str, list[Piece]]] = {}
        for name, effect in self.effects.items():
            for piece in effect.pieces:
                pieces.setdefault(piece.wire, {}).setdefault(name, []).append(piece)
        return {
            wire: {name: Effect(tuple(found)) for name, found in by_name.items()}
            for wire, by_name in pieces.items()
        }


class Together:
    """Calls ``load_weights`` once for several wire tensors, which it needs at the same time.

    Keeps a copy of each until the last one has come, in memory that is allocated once. names: what
    ``load_weights`` is told, by wire name.
    """

    def __init__(self, module: nn.Module, names: Mapping[str, str]) -> None:
        self._module, self._names = module, names
        self._kept: dict[str, Tensor] = {}
        self._came: set[str] = set()

    def begin(self) -> None:
        """An update starts: what an earlier one has left half done does not count."""
        self._came.clear()

    def give(self, wire: str, arrived: Tensor) -> None:
        if wire not in self._kept:
            self._kept[wire] = torch.empty_like(arrived)
        self._kept[wire].copy_(arrived)
        self._came.add(wire)
        if len(self._came) == len(self._names):
            self._came.clear()
            self._module.load_weights([(name, self._kept[w]) for w, name in self._names.items()])  # type: ignore


class Threaded(Untraceable):
    """Threads of the loading code's own do work that is not followed."""


class NotALoader(Untraceable):
    """A ``load_weights`` that does not read from an iterable of (name, tensor), so takes something else."""


# What was found out about hooks and modules; kept by a rank, as tracing takes a while.
Traces = dict[Hashable, Effect | Loading | str]


def weight_loader_hook(
    wire: Spec, parameter: str, tensor: Tensor, arguments: tuple[object, ...], *, traces: Traces, direct: bool
) -> Hook:
    """Of a parameter with a ``weight_loader``, called as ``weight_loader(parameter, wire, *arguments)``."""
    what = f"weight_loader of {parameter}"

    def load(into: Tensor, loaded: Tensor) -> None:
        into.weight_loader(into, loaded, *arguments)  # type: ignore[attr-defined]

    key = ("weight_loader", parameter, arguments, wire.shape, tensor.data_ptr(), tensor.stride())
    if key not in traces:
        try:
            found = trace(
                lambda stand_ins, loaded: load(stand_ins[parameter], loaded),
                wire.shape,
                tensor.dtype,
                {parameter: tensor},
            )
            traces[key] = found.get(parameter, Effect())
        except Fault as reason:
            raise SpecError(f"{wire.name}: {what}: {reason}") from reason
        except Untraceable as reason:
            _check_written(wire, tensor, parameter, load, f"{what}: {reason}")
            traces[key] = f"{what} can't be traced: {reason}"
    effect = traces[key]
    return Hook(
        wire=wire.name,
        what=what,
        call=lambda loaded: load(tensor, loaded),
        parameters={parameter: tensor},
        effects=effect if isinstance(effect, str) else {parameter: effect},  # type: ignore[dict-item]
        direct=direct,
    )


def _check_written(
    wire: Spec, tensor: Tensor, parameter: str, load: Callable[[Tensor, Tensor], object], what: str
) -> None:
    """Raise SpecError where a hook that can't be traced is seen to write nothing."""
    loaded = torch.empty(wire.shape, dtype=tensor.dtype, device="meta")
    found = reaches(lambda own: load(own[parameter], loaded), {wire.name: loaded}, {parameter: tensor})
    if found is not None and wire.elements and parameter not in found:
        raise SpecError(f"{wire.name}: {what}, and it writes nothing to {parameter}")


def load_weights_hooks(
    label: str,
    module: nn.Module,
    given: Mapping[str, tuple[str, Spec]],
    tensors: Mapping[str, Tensor],
    *,
    ties: Mapping[str, str] | None = None,
    traces: Traces,
) -> tuple[dict[str, Hook], Loading]:
    """Of a module with ``load_weights``: a hook for each wire tensor that it takes.

    given: by wire name, the name that ``load_weights`` is told, and the trainer's spec. tensors: the
    module's, by name. ties: wire names that are one tensor.
    A tensor of which it writes nothing is not taken. Raises NotALoader.
    """
    parameters = {name: tensor for name, tensor in tensors.items() if not is_dtensor(tensor)}
    addresses = tuple((name, tensor.data_ptr(), tensor.stride()) for name, tensor in parameters.items())
    tied = {wire: tie for wire, tie in (ties or {}).items() if wire in given}
    named = tuple((wire, *named) for wire, named in given.items())
    key = ("load_weights", label, named, addresses, tuple(tied.items()))
    if key not in traces:
        traces[key] = _trace_module(label, module, given, parameters, tied)
    loading = traces[key]
    assert isinstance(loading, Loading)
    hooks, known = {}, loading.by_wire()
    together: dict[str, Together] = {}
    for wires in loading.together:
        together |= dict.fromkeys(wires, Together(module, {wire: given[wire][0] for wire in wires}))
    for wire, (name, spec) in given.items():
        group = together.get(wire)
        effects = loading.opaque.get(wire) or known.get(wire, {})
        if effects or not spec.elements:
            hooks[wire] = Hook(
                wire=wire,
                what=label,
                call=_giving(group, wire) if group else _loading(module, name),
                begin=group.begin if group else _nothing,
                parameters=parameters,
                effects=effects,
                direct=True,
            )
    return hooks, loading


def _nothing() -> None:
    """What most hooks do when an update starts."""


def _loading(module: nn.Module, name: str) -> Callable[[Tensor], object]:
    return lambda loaded: module.load_weights([(name, loaded)])  # type: ignore[operator]


def _giving(group: Together, wire: str) -> Callable[[Tensor], object]:
    return lambda loaded: group.give(wire, loaded)


def _trace_module(
    label: str,
    module: nn.Module,
    given: Mapping[str, tuple[str, Spec]],
    parameters: Mapping[str, Tensor],
    ties: Mapping[str, str],
) -> Loading:
    """Runs ``load_weights`` with all tensors; if one is more than it can be traced with, without that one."""
    opaque: dict[str, str] = {}
    dtypes = {wire: spec.dtype for wire, (_, spec) in given.items()}
    while True:
        left = {wire: name for wire, (name, _) in given.items() if wire not in opaque}
        asked: list[str] = []
        try:
            # Casts of the loader's show which dtype a tensor must arrive in: the sender casts.
            casts = _run(module, left, given, dtypes, parameters, asked, ties, allow_casts=True).casts
            written = {wire: str(dtype).removeprefix("torch.") for wire, dtype in casts.items()}
            bad = {wire: own for wire, own in written.items() if not castable(dtypes[wire], own)}
            opaque |= {w: f"{label} can't be traced: it casts {given[w][1]} to {own}" for w, own in bad.items()}
            if not bad:
                dtypes |= written
                effects = _run(module, left, given, dtypes, parameters, asked, ties).effects
                return _with_reach(module, given, dtypes, parameters, Loading(effects, dtypes, opaque))
        except NotALoader:
            raise
        except Overwritten as reason:
            raise SpecError(
                f"{asked[-1] or 'after the last tensor'}: {label}: {reason}; expected one for each destination "
                f"(tie them on the trainer too, or let name_map give None for one of them)"
            ) from reason
        except Fault as reason:
            if opaque:  # it misses those that it was tried without
                text = next(iter(opaque.values()))
                loading = Loading({}, dtypes, dict.fromkeys(given, text))
                return _with_reach(module, given, dtypes, parameters, loading)
            tensor = f"{asked[-1]}: " if asked and asked[-1] else ""
            raise SpecError(f"{tensor}{label}: {reason}") from reason
        except Threaded as reason:
            return Loading({}, dtypes, dict.fromkeys(given, f"{label} can't be traced: {reason}"))
        except Untraceable as reason:
            text = f"{label} can't be traced: {reason}"
            if not asked or len(asked) > len(left) or len(opaque) == MAX_FAILURES:
                # It failed after the last one, or too often: nothing is known of any.
                loading = Loading({}, dtypes, dict.fromkeys(given, text))
                return _with_reach(module, given, dtypes, parameters, loading)
            opaque[asked[-1]] = text


def _run(
    module: nn.Module,
    left: Mapping[str, str],
    given: Mapping[str, tuple[str, Spec]],
    dtypes: Mapping[str, str],
    parameters: Mapping[str, Tensor],
    asked: list[str],
    ties: Mapping[str, str],
    *,
    allow_casts: bool = False,
) -> Traced:
    """asked: filled with the names that were taken from the iterable, and a last one at its end."""
    wires = {
        wire: torch.empty(given[wire][1].shape, dtype=getattr(torch, dtypes[wire]), device="meta")
        for wire in left
    }
    asked.clear()
    threads = set(threading.enumerate())

    def weights() -> Iterator[tuple[str, Tensor]]:
        for wire, tensor in wires.items():
            asked.append(wire)
            yield left[wire], tensor
            look_at_threads()
        asked.append("")

    def look_at_threads() -> None:
        # What another thread does is not followed; it writes to stand-ins, not to what is live.
        if started := set(threading.enumerate()) - threads:
            raise Threaded(f"it works in threads ({min(one.name for one in started)})")

    def run(stand_ins: dict[str, Tensor]) -> None:
        copy = twin(module, {id(parameters[name]): tensor for name, tensor in stand_ins.items()})
        before = [id(tensor) for tensor in _held(copy)]
        try:
            copy.load_weights(weights())  # type: ignore[operator]
        except Exception as error:
            if not asked:
                raise NotALoader(f"it raised {type(error).__name__}: {error}") from error
            raise
        if not asked:
            raise NotALoader("it read no tensor")
        look_at_threads()
        if [id(tensor) for tensor in _held(copy)] != before:
            raise Fault("it replaces a parameter, where what holds the old one would go on with it")

    return trace_many(run, wires, parameters, ties=ties, allow_casts=allow_casts)


# A loader that is tried with each of more tensors alone would take too long to look at.
MAX_ALONE = 4096


def _with_reach(
    module: nn.Module,
    given: Mapping[str, tuple[str, Spec]],
    dtypes: Mapping[str, str],
    parameters: Mapping[str, Tensor],
    loading: Loading,
) -> Loading:
    """With what is known of its opaque tensors: where they go, and which of them it needs together."""
    if not loading.opaque:
        return replace(loading, written=frozenset(loading.effects))

    def reach(wires: Iterable[str]) -> dict[str, frozenset[str]] | None:
        tensors = {
            wire: torch.empty(given[wire][1].shape, dtype=getattr(torch, dtypes[wire]), device="meta")
            for wire in wires
        }

        def run(stand_ins: dict[str, Tensor]) -> None:
            copy = twin(module, {id(parameters[name]): tensor for name, tensor in stand_ins.items()})
            copy.load_weights((given[wire][0], tensor) for wire, tensor in tensors.items())  # type: ignore

        return reaches(run, tensors, parameters)

    together = reach(given)
    if together is None or len(loading.opaque) > MAX_ALONE:
        return loading
    alone: dict[str, set[str]] = {}
    for wire in loading.opaque:
        for name, found in (reach([wire]) or {}).items():
            alone.setdefault(name, set()).update(found)
    groups: list[set[str]] = []
    for name, wires in together.items():
        needed = wires & loading.opaque.keys()
        if needed <= alone.get(name, set()):
            continue
        if needed != wires:
            traced = min(wires - loading.opaque.keys())
            raise SpecError(
                f"{name}: expected loading code that can be traced, or that takes all of {traced} and "
                f"{min(needed, default=traced)} at once, got one that makes something of both"
            )
        meeting = [group for group in groups if group & needed]
        groups = [group for group in groups if not group & needed]
        groups.append(set(needed).union(*meeting))
    if any(reach(group) is None for group in groups):
        groups = [set(loading.opaque)]  # it asks for more than it makes something of
        if reach(loading.opaque) is None:
            traced = ", ".join(sorted(given.keys() - loading.opaque.keys())[:4])
            raise SpecError(
                f"{traced}: expected loading code that works without these, which are written directly"
            )
    order = {wire: place for place, wire in enumerate(given)}
    return replace(
        loading,
        written=frozenset(together) | frozenset(loading.effects),
        together=tuple(tuple(sorted(group, key=order.__getitem__)) for group in groups),
    )


def _held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
