"""The engine's own loading code: ``weight_loader`` of a parameter, ``load_weights`` of a module.

Both are traced once (``torch_trace``), so that what they write is known, as boxes. Where that fails, the
code is called with whole tensors, and no more can be digested than what it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightbus.errors import SpecError, UpdateError
from weightbus.planning.spec import Spec
from weightbus.tensors.loaders.loading import Loading, trace_module
from weightbus.tensors.loaders.torch_taint import reaches
from weightbus.tensors.loaders.torch_trace import trace
from weightbus.tensors.loaders.trace import Effect, Fault, Untraceable
from weightbus.tensors.torch_dtensor import is_dtensor


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
            self._module.load_weights(iter([(name, self._kept[w]) for w, name in self._names.items()]))  # type: ignore


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
        traces[key] = trace_module(label, module, given, parameters, tied)
    loading = traces[key]
    assert isinstance(loading, Loading)  # noqa: S101 - by its key
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
    return lambda loaded: module.load_weights(iter([(name, loaded)]))  # type: ignore[operator]


def _giving(group: Together, wire: str) -> Callable[[Tensor], object]:
    return lambda loaded: group.give(wire, loaded)
