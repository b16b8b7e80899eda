"""A pipeline of three modules for tests, two ranks each with a part of it, and a checkpoint of it on disk."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from weightbus.storage.digest_list import NAME as LIST
from weightbus.storage.digest_list import saved_of
from weightbus.storage.disk import stored_tensors
from weightbus.tools.digest_files import digest_files

SHAPES = {
    "transformer": {"qkv.weight": (96, 64), "out.weight": (64, 32), "norm.weight": (64,)},
    "vae": {"decoder.weight": (48, 40), "decoder.bias": (48,)},
    "text_encoder": {"embed.weight": (130, 16)},
}


def axis_of(name: str) -> int | None:
    """The axis that ranks split: rows, of ``out`` columns; vectors are whole on every rank."""
    if name.endswith("bias") or name.startswith("norm"):
        return None
    return 1 if name.startswith("out") else 0


def shard(name: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    axis = axis_of(name)
    return tensor if axis is None else tensor.chunk(size, axis)[rank]


class Sharded(nn.Module):
    """Plain parameters with loaders, which are traced to boxes, and marks as engines make them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], rank: int = 0, size: int = 1) -> None:
        super().__init__()
        for name, shape in shapes.items():
            child, leaf = name.split(".")
            if not hasattr(self, child):
                setattr(self, child, nn.Module())
            axis = axis_of(name)
            own = shard(name, torch.zeros(shape), rank, size).clone()
            parameter = nn.Parameter(own)
            if axis is not None and size > 1:
                parameter.weight_loader = lambda p, w, axis=axis: p.data.copy_(w.chunk(size, axis)[rank])
                setattr(parameter, "input_dim" if axis else "output_dim", axis)
            getattr(self, child).register_parameter(leaf, parameter)


def pipeline(rank: int = 0, size: int = 1) -> dict[str, nn.Module]:
    return {module: Sharded(shapes, rank, size) for module, shapes in SHAPES.items()}


def drawn(version: int) -> dict[str, dict[str, Tensor]]:
    """What every module holds at a version, whole."""
    generator = torch.Generator().manual_seed(version)
    return {
        module: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for module, shapes in SHAPES.items()
    }


def fill(modules: dict[str, nn.Module], version: int) -> None:
    with torch.no_grad():
        for module, tensors in drawn(version).items():
            for name, parameter in modules[module].named_parameters():
                parameter.copy_(tensors[name])


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def versions_held(modules: dict[str, nn.Module], rank: int, size: int) -> dict[str, int | None]:
    """For each module the version that it holds in every bit, or None."""
    versions = {version: drawn(version) for version in (1, 2, 3)}

    def holds(module: str, version: int) -> bool:
        return all(
            torch.equal(bits(shard(name, versions[version][module][name], rank, size)), bits(parameter))
            for name, parameter in modules[module].named_parameters()
        )

    return {module: next((v for v in versions if holds(module, v)), None) for module in modules}


def write_pipeline(folder: Path, version: int, *, listed: bool = True) -> Path:
    """A file for each tensor, a folder for each module, with or without digest lists."""
    for module, tensors in drawn(version).items():
        (folder / module).mkdir(parents=True)
        for i, (name, tensor) in enumerate(tensors.items()):
            save_file({name: tensor}, folder / module / f"part-{i}.safetensors")
        if listed:
            saved = saved_of(digest_files(stored_tensors(folder / module)), version)
            (folder / module / LIST).write_bytes(msgspec.json.encode(saved))
    return folder
