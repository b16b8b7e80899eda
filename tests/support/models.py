"""Small models for tests, with every kind of tensor that must travel, and what they should hold."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor


class Toy(nn.Module):
    """Sizes are odd on purpose, so that shards are uneven and some ranks hold nothing.

    ``big`` is larger than the tests' buckets; ``head`` is tied to ``embed``.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 24, dtype=dtype)
        self.up = nn.Linear(24, 50, dtype=dtype)
        self.down = nn.Linear(50, 24, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(3, dtype=torch.float32)
        self.big = nn.Parameter(torch.empty(700, 600, dtype=dtype))
        self.register_buffer("scale", torch.zeros(()))
        self.head = nn.Linear(24, 37, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.zeros(9, dtype=torch.bool))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("phase", torch.zeros(5, dtype=torch.complex64))
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("fp8", torch.zeros(4, 8).to(torch.float8_e4m3fn))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def values(version: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What every wire tensor of a Toy holds at a version; drawn anew from the version's seed."""
    generator = torch.Generator().manual_seed(version)
    model = Toy(dtype)
    drawn = {}
    state = {**dict(model.named_parameters()), **{k: v for k, v in model.named_buffers() if k != "scratch"}}
    for name, tensor in sorted(state.items()):
        drawn[name] = draw(tensor.shape, tensor.dtype, generator)
    return drawn


def draw(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype in (torch.bool, torch.int64):
        return torch.randint(0, 2 if dtype == torch.bool else 1 << 40, shape, generator=generator).to(dtype)
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def fill(model: nn.Module, drawn: dict[str, Tensor]) -> None:
    """Write values into a model in place, whatever its sharding."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in drawn.items():
            live = state[name]
            if isinstance(live, DTensor):
                live.to_local().copy_(_local(value.to(live.device), live))
            else:
                live.copy_(value)


def _local(value: Tensor, live: DTensor) -> Tensor:
    """This rank's shard of ``value``, as FSDP2 shards what TP has sharded before: rows of TP's rows."""
    mesh, placements = live.device_mesh, live.placements
    if mesh.ndim == 2 and placements[1] == Shard(0) and not placements[0].is_replicate():
        mine = distribute_tensor(value, mesh["tp"], placements[1:]).to_local()
        chunks = torch.chunk(mine, mesh.size(0), 0)
        row = mesh.get_local_rank(0)
        return chunks[row] if row < len(chunks) else mine[:0]
    return distribute_tensor(value, mesh, placements).to_local()


def full(model: nn.Module) -> dict[str, Tensor]:
    """The model's whole tensors on the CPU. Collective over the mesh's ranks."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()
        for name, tensor in state.items()
        if name != "scratch"
    }


def distribute(model: nn.Module, mesh: DeviceMesh, placements: dict[str, list[Placement]]) -> nn.Module:
    """Replace parameters by DTensors; those not named are replicated over the mesh."""
    sharded: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module_name, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            path = f"{module_name}.{name}".lstrip(".")
            where = placements.get(path, [Replicate()] * mesh.ndim)
            if id(parameter) not in sharded:
                local = distribute_tensor(parameter.data, mesh, where)
                sharded[id(parameter)] = nn.Parameter(local, requires_grad=False)
            module._parameters[name] = sharded[id(parameter)]
    return model


TP: dict[str, list[Placement]] = {
    "embed.weight": [Shard(0)],
    "head.weight": [Shard(0)],
    "up.weight": [Shard(0)],
    "up.bias": [Shard(0)],
    "down.weight": [Shard(1)],
    "big": [Shard(1)],
    "norm.weight": [Shard(0)],
}


def join_world(rank: int, size: int, device: str) -> DeviceMesh:
    """The job's own default group and mesh, as a trainer or an engine would have them."""
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=rank, world_size=size)
    return init_device_mesh(device, (size,))


def make(kind: str, rank: int, size: int, device: str = "cpu", dtype: Any = torch.float32) -> nn.Module:
    """A Toy as ``plain``, ``fsdp2``, ``hsdp``, ``tp`` or ``fsdp2-tp`` (a 2-D mesh with strided shards)."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_DEVICE"]))
    model = Toy(dtype).to(device)
    if kind == "plain":
        return model
    mesh = join_world(rank, size, device)
    if kind == "tp":
        return distribute(model, mesh, TP)
    from torch.distributed.fsdp import fully_shard

    if kind == "fsdp2":
        fully_shard(model.up, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if kind == "hsdp":
        grid = init_device_mesh(device, (2, size // 2), mesh_dim_names=("replicate", "shard"))
        return fully_shard(model, mesh=grid)
    assert kind == "fsdp2-tp", kind
    grid = init_device_mesh(device, (2, size // 2), mesh_dim_names=("dp", "tp"))
    distribute(model, grid["tp"], TP)
    return fully_shard(model, mesh=grid["dp"])
