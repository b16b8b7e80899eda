"""Where a DTensor's local shard lies in the global tensor.

torch's private names here: ``_StridedShard`` with its ``split_factor``, and ``_local_tensor``. torch's
own offset helper gives one offset for a shard, and is wrong where a strided shard has several runs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from weightbus.box import Box
from weightbus.errors import SpecError

# Consecutive indices of one axis: (first, count).
Run = tuple[int, int]


def local_tensor(tensor: DTensor) -> Tensor:
    """The rank's own storage. ``to_local`` would record a gradient and may give another view."""
    local = tensor._local_tensor
    assert isinstance(local, Tensor)
    return local.detach()


def local_boxes(name: str, tensor: DTensor) -> list[tuple[Box, Tensor]]:
    """This rank's boxes of the global tensor, each with its view of the local storage; in order.

    Raises SpecError for ``Partial`` and for placements that are not known here.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return []
    axes: list[list[tuple[int, int, int]]] = [[] for _ in tensor.shape]
    for mesh_dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard | _StridedShard):
            raise SpecError(
                f"{name}: expected Replicate or Shard placements, got {placement!r}; mesh axis {mesh_dim}"
            )
        stride = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        axes[placement.dim % tensor.ndim].append((mesh.size(mesh_dim), coordinate[mesh_dim], stride))
    runs = [
        axis_runs(size, tuple(shards)) if shards else ((0, size),)
        for size, shards in zip(tensor.shape, axes, strict=True)
    ]
    local = local_tensor(tensor)
    expected = [sum(count for _, count in axis) for axis in runs]
    if list(local.shape) != expected:
        raise SpecError(
            f"{name}: expected a local shard of shape {expected} for {list(tensor.shape)} under "
            f"{tuple(tensor.placements)}, got {list(local.shape)}; mesh coordinate {coordinate}"
        )
    starts = [tuple(itertools.accumulate((count for _, count in axis), initial=0)) for axis in runs]
    boxes = []
    for picks in itertools.product(*(range(len(axis)) for axis in runs)):
        chosen = [axis[pick] for axis, pick in zip(runs, picks, strict=True)]
        box = Box(tuple(first for first, _ in chosen), tuple(count for _, count in chosen))
        index = tuple(
            slice(start[pick], start[pick] + count)
            for start, pick, (_, count) in zip(starts, picks, chosen, strict=True)
        )
        if box.volume or not tensor.numel():
            boxes.append((box, local[index]))
    return boxes


@functools.lru_cache(maxsize=4096)
def axis_runs(size: int, shards: tuple[tuple[int, int, int], ...]) -> tuple[Run, ...]:
    """The indices of one axis that are left after sharding, as runs.

    shards: (mesh size, this rank's coordinate, split factor; 1 for a plain shard) of the mesh
    dimensions that shard the axis, outermost first.
    """
    runs: list[Run] = [(0, size)] if size else []
    for count, coordinate, stride in _order(shards):
        total = sum(n for _, n in runs)
        # chunk() into ``stride`` pieces, each of them into ``count``, of each the coordinate's.
        picked: list[Run] = []
        for outer_start, outer_size in _chunks(total, stride):
            start, length = _chunks(outer_size, count)[coordinate]
            picked += _slice(runs, outer_start + start, length)
        runs = _merge(picked)
    return tuple(runs)


def _order(shards: tuple[tuple[int, int, int], ...]) -> list[tuple[int, int, int]]:
    """The order in which shards were applied. A strided shard whose factor is the number of shards
    inside it stands for a plain shard applied after them: FSDP of what TP has sharded before."""
    if not shards:
        return []
    (count, coordinate, stride), rest = shards[0], shards[1:]
    inside = 1
    for size, _, _ in rest:
        inside *= size
    if stride > 1 and stride == inside:
        return [*_order(rest), (count, coordinate, 1)]
    return [shards[0], *_order(rest)]


def _chunks(size: int, count: int) -> list[Run]:
    """torch.chunk's pieces: ceil(size / count) each, the last ones shorter or empty."""
    step = -(-size // count)
    return [(min(i * step, size), min((i + 1) * step, size) - min(i * step, size)) for i in range(count)]


def _slice(runs: Iterable[Run], start: int, length: int) -> list[Run]:
    """Part of the sequence of indices that ``runs`` spell out."""
    found = []
    for first, count in runs:
        low, high = max(start, 0), min(start + length, count)
        if low < high:
            found.append((first + low, high - low))
        start -= count
    return found


def _merge(runs: Iterable[Run]) -> list[Run]:
    merged: list[Run] = []
    for first, count in runs:
        if merged and merged[-1][0] + merged[-1][1] == first:
            merged[-1] = (merged[-1][0], merged[-1][1] + count)
        else:
            merged.append((first, count))
    return merged


def mesh_position(tensors: Iterable[Tensor]) -> tuple[int, int] | None:
    """This rank's place in the largest device mesh of the DTensors, and its size; None without any."""
    meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
    if not meshes:
        return None
    mesh = max(meshes, key=lambda mesh: mesh.size())
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    rank = 0
    for size, place in zip(mesh.shape, coordinate, strict=True):
        rank = rank * size + place
    return rank, mesh.size()
