"""What a job holds after a step, whole and on disk, so that a third process can compare the two jobs.

Nothing here uses weightbus: the weights are gathered by DTensor and compared bit by bit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    weights: dict[str, Tensor]
    embeddings: Tensor
    facts: dict[str, str]


def path(folder: Path, job: str, step: int) -> Path:
    return folder / f"{job}-{step}.safetensors"


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight whole and on the CPU. Collective over the ranks that hold the model."""
    state = model.state_dict().items()
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu() for name, t in state}


def write(
    file: Path, weights: dict[str, Tensor], embeddings: Tensor, facts: dict[str, str] | None = None
) -> None:
    """Called by one rank. The file appears at once and whole."""
    tensors = {f"weight.{name}": tensor.contiguous() for name, tensor in weights.items()}
    unfinished = file.with_suffix(".unfinished")
    save_file({**tensors, "embeddings": embeddings.detach().cpu().contiguous()}, unfinished, facts or {})
    os.replace(unfinished, file)


def read(file: Path) -> Snapshot:
    with safe_open(file, framework="pt") as tensors:
        weights = {
            name.removeprefix("weight."): tensors.get_tensor(name)
            for name in tensors.keys()  # noqa: SIM118
            if name.startswith("weight.")
        }
        return Snapshot(
            weights=weights, embeddings=tensors.get_tensor("embeddings"), facts=tensors.metadata() or {}
        )


def bit_equal(a: Tensor, b: Tensor) -> bool:
    """Bytes, not values: 0.0 and -0.0 differ, a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def count_equal(a: Snapshot, b: Snapshot) -> int:
    """How many weights are in both, bit for bit."""
    return sum(name in b.weights and bit_equal(tensor, b.weights[name]) for name, tensor in a.weights.items())
