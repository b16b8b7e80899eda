"""A small engine of nano-vLLM's kind for tests: half of it fused behind loader hooks, half DTensors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

D, KV, F, WORDS, EXPERTS, E = 64, 32, 96, 101, 2, 16

SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (WORDS, D),
    "head": (WORDS, D),
    "norm": (D,),
    **{f"layers.{i}.{name}": shape for i in (0, 1) for name, shape in {
        "q": (D, D), "k": (KV, D), "v": (KV, D), "o": (D, D),
        "gate": (F, D), "up": (F, D), "down": (D, F), "norm": (D,),
    }.items()},
    **{f"experts.{e}.{name}": shape for e in range(EXPERTS) for name, shape in {
        "w1": (E, D), "w3": (E, D), "w2": (D, E),
    }.items()},
}  # fmt: skip

PLACEMENTS = {"head": Shard(0), "norm": Replicate(), "o": Shard(1), "down": Shard(1)}


def nested(tensors: dict[str, Tensor]) -> nn.Module:
    """A module tree with these parameters by name."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for key in path:
            if key not in module._modules:
                module.add_module(key, nn.Module())
            module = module.get_submodule(key)
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    return root


def drawn(version: int) -> dict[str, Tensor]:
    """What each wire tensor holds at a version, float32."""
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class Engine(nn.Module):
    """bfloat16; rank ``rank`` of ``size``, one, two or four. Each hook writes its own rows or columns.

    mesh: of the parameters that are DTensors; without one they are plain shards.
    """

    QKV: ClassVar[dict[str, tuple[int, int]]] = {"q": (0, D), "k": (D, KV), "v": (D + KV, KV)}

    def __init__(self, rank: int, size: int, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self.rows = -(-WORDS // size)
        hooked = {"embed": (self.rows, D), "experts.w13": (EXPERTS, 2 * E // size, D)}
        hooked["experts.w2"] = (EXPERTS, D, E // size)
        for i in (0, 1):
            hooked[f"layers.{i}.qkv"] = ((D + 2 * KV) // size, D)
            hooked[f"layers.{i}.gate_up"] = (2 * F // size, D)
        tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in hooked.items()}
        for name, shape in SHAPES.items():
            placement = PLACEMENTS.get(name.split(".")[-1])
            if placement is not None:
                whole = torch.zeros(shape, dtype=torch.bfloat16)
                if mesh is not None:
                    tensors[name] = distribute_tensor(whole, mesh, [placement])
                else:
                    axis = getattr(placement, "dim", None)
                    tensors[name] = whole if axis is None else whole.chunk(size, axis)[rank].clone()
        for key, child in nested(tensors).named_children():
            self.add_module(key, child)
        for name, parameter in nested(tensors).named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, parameter in self.named_parameters():
            last = name.split(".")[-1]
            if name in hooked:
                parameter.weight_loader = getattr(self, f"load_{last}")

    def load_embed(self, param, loaded):
        low, high = self.rank * self.rows, min((self.rank + 1) * self.rows, WORDS)
        param.data[: high - low].copy_(loaded[low:high])
        param.data[high - low :].fill_(0)

    def load_qkv(self, param, loaded, shard):
        start, rows = (n // self.size for n in self.QKV[shard])
        param.data.narrow(0, start, rows).copy_(loaded.chunk(self.size, 0)[self.rank])

    def load_gate_up(self, param, loaded, half):
        rows = F // self.size
        param.data.narrow(0, half * rows, rows).copy_(loaded.narrow(0, self.rank * rows, rows))

    def load_w13(self, param, loaded, expert, half):
        rows = E // self.size
        param.data[expert, half * rows :][:rows].copy_(loaded.chunk(self.size, 0)[self.rank])

    def load_w2(self, param, loaded, expert):
        param.data[expert].copy_(loaded.chunk(self.size, 1)[self.rank])

    def at(self, wire: str) -> tuple[Tensor, tuple[int, ...]]:
        """Where this rank's part of a wire tensor lives, and its offsets in the wire tensor."""
        last, size, rank = wire.split(".")[-1], self.size, self.rank
        parameters = dict(self.named_parameters())
        if wire == "embed":
            low, high = rank * self.rows, min((rank + 1) * self.rows, WORDS)
            return parameters[wire].data[: high - low], (low, 0)
        if last in PLACEMENTS:
            parameter = parameters[wire].data
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            axis = {"head": 0, "o": 1, "down": 1}.get(last)
            step = {"head": self.rows, "o": D // size, "down": F // size}.get(last, 0)
            return local, tuple(rank * step if a == axis else 0 for a in range(len(SHAPES[wire])))
        head, index, _ = wire.split(".")
        if head == "experts":
            if last == "w2":
                return parameters["experts.w2"].data[int(index)], (0, rank * E // size)
            rows = E // size
            half = parameters["experts.w13"].data[int(index), rows * (last == "w3") :][:rows]
            return half, (rank * rows, 0)
        if last in self.QKV:
            start, rows = (n // size for n in self.QKV[last])
            return parameters[f"layers.{index}.qkv"].data[start : start + rows], (rank * rows, 0)
        rows = F // size
        half = parameters[f"layers.{index}.gate_up"].data[rows * (last == "up") :][:rows]
        return half, (rank * rows, 0)


def name_map(wire: str) -> str | tuple[object, ...]:
    """Wire names to an Engine's parameters."""
    last = wire.split(".")[-1]
    if last in PLACEMENTS or wire == "embed":
        return wire
    head, index, _ = wire.split(".")
    if head == "experts":
        return ("experts.w2", int(index)) if last == "w2" else ("experts.w13", int(index), int(last == "w3"))
    if last in Engine.QKV:
        return f"layers.{index}.qkv", last
    return f"layers.{index}.gate_up", int(last == "up")
