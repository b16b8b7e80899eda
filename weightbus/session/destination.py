"""The server's end of an update on one rank: the live tensors that are written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from weightbus.control import messages as m
from weightbus.control.sketch import sketch_of
from weightbus.digest.changes import Snapshot
from weightbus.digest.ledger import Ledger, Record, live_entries
from weightbus.errors import SpecError, TornError, UpdateError, WeightbusError
from weightbus.inventory.audit import Audit
from weightbus.inventory.derived import Derived
from weightbus.inventory.reads import Inputs
from weightbus.planning.spec import Spec
from weightbus.session.endpoint import Endpoint
from weightbus.storage.saved_names import modules_of
from weightbus.tensors.install import NameMap, Target, matches
from weightbus.tensors.layout import Layout, Source
from weightbus.tensors.loaders.hook import Traces

log = logging.getLogger("weightbus")

State = Literal["empty", "ready", "updating", "torn"]


class OtherVersion(UpdateError):
    """This rank holds other weights than those that a check, or another replica, asks for."""


class Destination(Endpoint):
    """A server rank's target, its state, and the engine's callbacks."""

    def __init__(
        self,
        source: Source,
        *,
        device: torch.device | str | None,
        name_map: NameMap | None,
        local: Sequence[str],
        derived: Derived,
        trust_traces: bool,
        require_proof: bool = False,
        example_inputs: Inputs = None,
        on_update: Callable[[int | None], None] | None,
        on_commit: Callable[[int | None], None] | None,
        on_torn: Callable[[WeightbusError], None] | None,
        on_refused: Callable[[WeightbusError], None] | None,
        cpu_group: dist.ProcessGroup | None,
    ) -> None:
        def is_declared(name: str) -> bool:
            return matches(name, (*local, *derived))

        super().__init__(source, declared=is_declared)
        for one, other in self.layout.overlapping():
            if is_declared(one) or is_declared(other):
                continue  # such as a view that the engine makes of a parameter
            raise SpecError(f"{one}: shares part of its storage with {other}; expected one or the other")
        self.device = _device(self.layout, device)
        self._name_map, self._local, self._derived = name_map, local, derived
        self._trust_traces = trust_traces
        self.audit = Audit(
            self.source, local=local, derived=derived, require_proof=require_proof, inputs=example_inputs
        )
        self.cpu_group = cpu_group
        self._on_update, self._on_commit = on_update, on_commit
        self._on_torn, self._on_refused = on_torn, on_refused
        self.state: State = "empty"
        self.version: int | None = None
        self.error: WeightbusError | None = None
        self.tried: int | None = None
        self.again = False
        self._before: State | None = None  # of an update that goes on: the state before it
        self._torn: set[str] = set()  # modules that hold a mixture
        self._traces: Traces = {}
        self._last: tuple[Target, tuple[tuple[str, ...] | None, bool, dict[str, str]]] | None = None
        self._loaded: dict[str, str] = {}
        self.snapshot: Snapshot | None = None

    def target(
        self,
        manifest: Mapping[str, Spec],
        modules: Sequence[str] | None,
        *,
        ties: Mapping[str, str] | None = None,
        partial: bool = False,
    ) -> Target:
        """The last one again, for the same tensors over the same layout.

        ties: names of the manifest that are one tensor (``ties_of``). partial: destinations that the manifest
        does not feed stay as they are.
        """
        asked = modules if modules is None else tuple(modules), partial, dict(ties or {})
        if self._last is not None and self._last[1] == asked:
            last = self._last[0]
            if last.base is self.layout and last.manifest == manifest:
                return last
        target = self._make(manifest, *asked)
        self._last = target, asked
        return target

    def _make(
        self,
        manifest: Mapping[str, Spec],
        modules: Sequence[str] | None,
        partial: bool,
        ties: Mapping[str, str],
    ) -> Target:
        return Target(
            self.layout,
            modules,
            manifest,
            ties=ties,
            name_map=self._name_map,
            local=("*",) if partial else self._local,
            derived=tuple(self._derived),
            loaders=self._loaders(),
            trust_traces=self._trust_traces,
            device=self.device,
            traces=self._traces,
        )

    def loads_otherwise(self, target: Target) -> bool:
        """Whether loading code does something else now than when ``target`` was made.

        As where experts lie, or what is skipped, may have changed. It is traced again for the next plan.
        """
        if not target.has_hooks:
            return False
        self._traces, self._last = {}, None
        try:
            return not target.writes_like(self._make(target.manifest, target.modules, False, target.ties))
        except SpecError:
            return True  # which the next plan refuses

    def sketch(self) -> m.Sketch:
        """What this rank holds, in short. Names that loading code or a map takes mean something else on the
        wire, and those that no update feeds nothing."""
        specs, given = self.layout.specs, (*self._local, *self._derived)
        plain = [
            name
            for name in specs
            if getattr(self.layout.tensors[name], "weight_loader", None) is None and not matches(name, given)
        ]
        if self._name_map is not None or self._loaders():
            plain = []
        return sketch_of(specs, plain=plain, whole=len(plain) == len(specs))

    def _loaders(self) -> dict[str, nn.Module]:
        """Modules that have ``load_weights``, by the prefix of their names."""
        source = self.source
        modules = (
            {"": source} if isinstance(source, nn.Module) else source if isinstance(source, Mapping) else {}
        )
        return {
            name and f"{name}.": module
            for name, module in modules.items()
            if callable(getattr(module, "load_weights", None))
        }

    def own_names(self) -> dict[str, nn.Module]:
        """Modules that take tensors by their own names, by the prefix of these: neither a ``name_map`` nor
        ``load_weights`` is asked."""
        loaders, modules = self._loaders(), modules_of(self.source)
        found = {name and f"{name}.": module for name, module in modules.items()} if not self._name_map else {}
        return {prefix: module for prefix, module in found.items() if prefix not in loaders}

    def record(self, job: m.Job) -> Record:
        """What this rank holds of ``job``; its ledger digests what is live now. Raises OtherVersion."""
        held = [self._records.get(key) for key in self._keys(job.modules)]
        record = held[0]
        if record is None or any(other is not record for other in held) or record.seed != job.seed:
            loaded = [self._loaded[key] for key in self._keys(job.modules) if key in self._loaded]
            version = loaded[0] if loaded else f"version {record.version}" if record else "none"
            raise OtherVersion(f"expected version {job.version}, got {version}; this rank is {self.state}")
        self.changed()
        if self.refresh() or (record.target is not None and record.target.base is not self.layout):
            return self._relive(record, job)
        return record

    def _relive(self, record: Record, job: m.Job) -> Record:
        """The record over storage that has moved since."""
        assert record.target is not None  # noqa: S101 - of a server rank
        target = self.target(record.target.manifest, job.modules, ties=record.target.ties)
        entries = live_entries(target, {}, record.group, {})
        ledger = Ledger(entries, record.ledger.wants, record.ledger.owners)
        self.audit.follow(target, record.target)
        moved = replace(record, ledger=ledger, sums=ledger.sums.copy(), target=target)
        self.commit(moved, job.modules)
        return moved

    def forget(self, modules: Sequence[str] | None) -> None:
        super().forget(modules)
        for key in self._keys(modules):
            self._loaded.pop(key, None)

    def perturbed(self) -> None:
        """A test overwrites all weights: they are no version, and only a complete update leads out."""
        self.forget(None)
        self._torn = set(self._keys(None))
        self.state, self.version = "torn", None
        self.error = TornError("the weights were overwritten for a test")

    def label(self, version: int) -> None:
        super().label(version)
        self.state, self.version = "ready", version

    def before(self, version: int | None) -> None:
        """An update is about to start: the engine stops using the weights."""
        if self._last is not None:
            self._last[0].begin()
        self._before = self.state
        self.state = "updating"
        if self._on_update:
            self._on_update(version)

    def after(self, outcome: m.Outcome, version: int, modules: Sequence[str] | None, wrote: bool) -> None:
        """Exactly one of the callbacks ``on_commit``, ``on_torn``, ``on_refused``, once for each ``before``."""
        self.tried, self.again = version, outcome.again and not outcome.ok
        if (before := self._closes(outcome, f"version {version}")) is None:
            return
        if not outcome.ok:
            self._failed(outcome, f"version {version}", modules, wrote, before)
            return
        self.version = version
        self._torn -= set(self._keys(modules))
        if self._torn:
            self._tear(
                f"version {version} is in place, but {', '.join(sorted(self._torn))} still holds a mixture"
            )
            return
        self.state, self.error = "ready", None
        if self._on_commit:
            self._on_commit(version)

    def after_load(
        self,
        outcome: m.Outcome,
        version: int | None,
        modules: Sequence[str] | None,
        wrote: bool,
        *,
        what: str,
        complete: bool,
    ) -> None:
        """The end of a load for which ``before`` was called, with the same callbacks.

        what: where the tensors came from. complete: it was of all tensors; only such a one leads out of
        ``empty``. What it wrote is no longer any version of the trainer's, and a check will say so.
        """
        if (before := self._closes(outcome, f"load of {what}")) is None:
            return
        if not outcome.ok:
            self._failed(outcome, f"load of {what}", modules, wrote, before)
            return
        self.forget(modules)
        label = "" if version is None else f"version {version}, "
        self._loaded |= dict.fromkeys(self._keys(modules), f"{label}loaded from {what}")
        self._torn -= set(self._keys(modules))
        self.state = "ready" if complete else before
        self.version, self.error = version, None
        if self._on_commit:
            self._on_commit(version)

    def _closes(self, outcome: m.Outcome, what: str) -> State | None:
        """The state before the update that ends here; None if none was begun: then the engine was told of
        nothing, and its state stays."""
        before, self._before = self._before, None
        if before is None and not outcome.ok:
            self.error = UpdateError(f"{what} refused: " + "; ".join(map(str, outcome.failures)))
            log.error("%s", self.error)
        return before

    def _failed(
        self, outcome: m.Outcome, what: str, modules: Sequence[str] | None, wrote: bool, before: State
    ) -> None:
        reasons = "; ".join(map(str, outcome.failures))
        if wrote:
            self.forget(modules)
            self._torn |= set(self._keys(modules))
            self._tear(f"{what}: {reasons}")
        else:
            self.state = before
            self.error = UpdateError(f"{what} refused: {reasons}")
            log.error("%s", self.error)
            if self._on_refused:
                self._on_refused(self.error)

    def _tear(self, reason: str) -> None:
        self.state, self.error = "torn", TornError(reason)
        log.error("torn: %s", self.error)
        if self._on_torn:
            self._on_torn(self.error)


def _device(layout: Layout, given: torch.device | str | None) -> torch.device:
    """Where the bytes of updates arrive. Raises SpecError for another one than that of the layout's tensors."""
    if given is None:
        return layout.device
    device = torch.device(given)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if layout.device.type != "cpu" and device != layout.device:
        raise SpecError(f"device: expected {layout.device}, where tensors of the target lie, got {device}")
    return device
