"""Whether an engine computes with what an update brings: a model that was updated beside one that was loaded.

An update proves what it writes. What an engine has made of weights before (a transpose, a fused or packed copy,
a map of experts) it knows only if the engine declares it. This finds the rest, once, for an engine's developer.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightbus.colocated import colocate
from weightbus.errors import WeightbusError
from weightbus.session.baseline import difference, held
from weightbus.storage.disk import stored_tensors
from weightbus.tensors.perturbation import perturb

Model = nn.Module | Mapping[str, nn.Module]
Load = Callable[[Path], Model]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What became of an update of a live model, against one that was loaded from the same weights.

    differ: by name, tensors of the live model that are not as in the loaded one, and how. unstable: those
    that differ between two loads of the same files, and so were not compared. compared: how many were. word:
    the update's verdict. unknown: names of which the update said that it proves nothing, each with the reason.
    refused: why there was no update.
    """

    differ: Mapping[str, str]
    unstable: tuple[str, ...]
    compared: int
    word: str
    unknown: Mapping[str, str]
    refused: str = ""

    @property
    def ok(self) -> bool:
        """Whether each tensor is as in a fresh load, and none differs between loads."""
        return not (self.differ or self.unstable or self.refused)

    def __str__(self) -> str:
        if self.refused:
            return f"refused: {self.refused}"
        lines = [f"{len(self.differ)} of {self.compared} tensors differ from a fresh load; update: {self.word}"]
        lines += [f"{name}: {how}" for name, how in self.differ.items()]
        lines += [f"{name}: differs between two loads of the same files" for name in self.unstable]
        lines += [f"{name}: unknown: {why}" for name, why in self.unknown.items() if name not in self.differ]
        return "\n  ".join(lines)


def audit(load: Load, checkpoint: str | Path, *, seed: int = 0, **options: Any) -> AuditReport:
    """Update a live model to other weights, and compare all that it holds with a model loaded from these.

    load: makes the engine's model of a directory, with all its steps after loading; called three times.
    checkpoint: a directory of safetensors files; it is copied, and in the copy each element gets another value
    (``perturb``, by ``seed``). options: of ``colocate``, such as name_map, local and derived.
    In one process; needs host memory for the weights, and disk for the copy. Raises SpecError for a checkpoint
    that is none.
    """
    stored_tensors(Path(checkpoint))
    live = load(Path(checkpoint))
    with tempfile.TemporaryDirectory(prefix="weightbus-audit-") as folder:
        other = Path(folder) / "checkpoint"
        weights = _perturbed(Path(checkpoint), other, seed)
        try:
            with colocate(list(weights.items()), live, **options) as both:
                report = both.update(1)
        except WeightbusError as error:
            return AuditReport(
                differ={}, unstable=(), compared=0, word="failed", unknown={}, refused=str(error)
            )
        fresh, again = held(load(other)), held(load(other))
    mine = held(live)
    unstable = {name for name in fresh.keys() & again.keys() if difference(fresh[name], again[name])}
    names = sorted((mine.keys() | fresh.keys()) - unstable, key=str.encode)
    differ = {name: how for name in names if (how := difference(mine.get(name), fresh.get(name)))}
    return AuditReport(
        differ=differ,
        unstable=tuple(sorted(unstable, key=str.encode)),
        compared=len(names),
        word=report.word,
        unknown=report.partial,
    )


def _perturbed(checkpoint: Path, copy: Path, seed: int) -> dict[str, Tensor]:
    """A copy of the directory with other weights, and these."""
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("weightbus-digests.json"))
    stored = stored_tensors(copy)
    weights = {}
    for name, one in stored.items():
        dtype = getattr(torch, one.spec.dtype)
        data = bytearray(one.path.read_bytes()[one.begin : one.end])
        tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        weights[name] = tensor.view(one.spec.shape)
    perturb(list(weights.items()), seed=seed)
    for name, one in stored.items():
        with one.path.open("r+b") as file:
            file.seek(one.begin)
            file.write(weights[name].view(-1).view(torch.uint8).numpy().tobytes())
    return weights
