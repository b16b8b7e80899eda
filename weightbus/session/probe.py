"""One server rank's answer to a question about what it holds live; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import torch.distributed as dist
from torch import nn

from weightbus.control import messages as m
from weightbus.digest.changes import compare, snapshot
from weightbus.digest.sha256.check import check_sha256
from weightbus.digest.sha256.tensors import module_sha256
from weightbus.errors import SpecError, UpdateError
from weightbus.session.destination import Destination
from weightbus.storage.bounded_json import decode
from weightbus.tensors.perturbation import perturb

# What a target that is no mapping of modules answers to.
ONLY_MODULE = "model"

Manifests = dict[str, str] | list[dict[str, str]]


class Probe:
    """``checksum``: SHA-256 of modules. ``sha256``: a module's tensors against expected digests. ``snapshot``
    and ``compare``: whether anything has changed in between. ``perturb``: other values everywhere, for tests;
    only a complete update or load leads out of ``torn`` then."""

    def __init__(
        self,
        task: m.ProbeTask,
        place: int,
        size: int,
        destination: Destination,
        group: dist.ProcessGroup | None,
    ) -> None:
        """group: the engine's own, of the replica's ranks for CPU tensors; without it each rank looks at its
        shards alone."""
        self._task, self._place, self._size = task, place, size
        self._destination, self._group = destination, group

    def prepare(self) -> bytes:
        """Raises SpecError for an unknown question or module."""
        match self._task.question:
            case "checksum":
                modules = self._modules(self._task.modules)
                return json.dumps({name: module_sha256(module) for name, module in modules.items()}).encode()
            case "sha256":
                ((_, module),) = self._modules(self._task.modules).items()
                verdict = check_sha256(
                    module,
                    decode("expected digests", self._task.argument, Manifests),
                    group=self._group,
                    rank=self._place,
                    size=self._size,
                    partial=True,
                )
                return msgspec.json.encode(verdict)
            case "snapshot":
                self._destination.snapshot = snapshot(self._destination.source)
                return json.dumps(
                    {"ok": True, "text": f"{len(self._destination.snapshot.digests)} tensors"}
                ).encode()
            case "compare":
                if self._destination.snapshot is None:
                    raise UpdateError("compare: expected a snapshot before, got none on this rank")
                changes = compare(self._destination.snapshot, self._destination.source)
                return json.dumps({"ok": changes.none, "text": str(changes)}).encode()
            case "perturb":
                self._destination.perturbed()
                perturb(self._destination.source)
                return json.dumps({"ok": True, "text": "perturbed"}).encode()
        raise SpecError(f"question: expected one that this rank can answer, got {self._task.question!r}")

    def _modules(self, names: list[str] | None) -> Mapping[str, Any]:
        source = self._destination.source
        if isinstance(source, Mapping):
            found: Mapping[str, Any] = source
        else:
            found = {ONLY_MODULE: source if isinstance(source, nn.Module) else list(source)}
        for name in names or ():
            if name not in found:
                raise SpecError(f"{name}: expected a module among {', '.join(found)}; got {name!r}")
        return found if names is None else {name: found[name] for name in names}

    def check(self, gathered: m.Gathered) -> None:
        raise AssertionError("a probe ends when all have answered")

    def write(self) -> bytes | None:
        raise AssertionError("a probe writes nothing")

    def finish(self, gathered: m.Gathered) -> None:
        raise AssertionError("a probe writes nothing")

    def close(self) -> None:
        pass
