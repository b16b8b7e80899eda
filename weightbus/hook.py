"""The engine's own loading code: ``weight_loader`` of a parameter, ``load_weights`` of a module.

Both are traced once (``torch_trace``), so that what they write is known, as boxes. Where that fails, the
code is called with whole tensors, and no more can be digested than what it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightbus.errors import SpecError, UpdateError
from weightbus.spec import Spec, castable
from weightbus.torch_dtensor import is_dtensor
from weightbus.torch_module import twin
from weightbus.torch_trace import Traced, trace, trace_many
from weightbus.trace import Effect, Overwritten, Piece, Untraceable

# A module whose load_weights fails on more tensors than this is not tried without them any further.
MAX_FAILURES = 16


@dataclass(slots=True, kw_only=True)
class Hook:
    """Code that installs one wire tensor.

    call: takes the tensor whole. parameters: those that it may write. effects: what it does to each; or
    the reason why that is not known. direct: what is known to be written may be written without a call.
    """

    wire: str
    what: str
    call: Callable[[Tensor], object]
    parameters: Mapping[str, Tensor]
    effects: Mapping[str, Effect] | str
    direct: bool

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
        try:
            with torch.no_grad():
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
    """

    effects: Mapping[str, Effect]
    dtypes: Mapping[str, str]
    opaque: Mapping[str, str]

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
        except Untraceable as reason:
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
    for wire, (name, spec) in given.items():
        effects = loading.opaque.get(wire) or known.get(wire, {})
        if effects or not spec.elements:
            hooks[wire] = Hook(
                wire=wire,
                what=label,
                call=lambda loaded, name=name: module.load_weights([(name, loaded)]),  # type: ignore
                parameters=parameters,
                effects=effects,
                direct=True,
            )
    return hooks, loading


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
                return Loading(
                    _run(module, left, given, dtypes, parameters, asked, ties).effects, dtypes, opaque
                )
        except NotALoader:
            raise
        except Overwritten as reason:
            raise SpecError(
                f"{asked[-1] or label}: {label}: {reason}; expected one for each destination (tie them on "
                f"the trainer too, or let name_map give None for one of them)"
            ) from reason
        except Untraceable as reason:
            text = f"{label} can't be traced: {reason}"
            if not asked or len(asked) > len(left) or len(opaque) == MAX_FAILURES:
                # It failed after the last one, or too often: nothing is known of any.
                return Loading({}, dtypes, dict.fromkeys(given, text))
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

    def weights() -> Iterator[tuple[str, Tensor]]:
        for wire, tensor in wires.items():
            asked.append(wire)
            yield left[wire], tensor
        asked.append("")

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
        if [id(tensor) for tensor in _held(copy)] != before:
            raise Untraceable("it replaces a parameter")

    return trace_many(run, wires, parameters, ties=ties, allow_casts=allow_casts)


def _held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
