"""Which boxes of a DTensor this rank holds. The only file that touches DTensor's private names.

torch's own offset helper is wrong where a rank's shard is several runs of rows (a lone ``_StridedShard``), so
the boxes come from what torch does when it distributes: each mesh dim, left to right, splits what the
dims before it left. ``Shard`` follows ``torch.chunk``; ``_StridedShard`` is asked to split an index vector.
``fully_shard`` of a tensor-parallel parameter calls itself ``_StridedShard`` too, but it splits what tensor
parallelism left, from right to left. For most uneven sizes, and all even ones, that comes to the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from functools import lru_cache
from operator import itemgetter
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from weightbus.errors import SpecError
from weightbus.memory.shard import Part, check_plain, plain_view, spec_of
from weightbus.planning.box import Box

Step = tuple[int, int, int, int]
"""One split: tensor dim, split factor (0 for a plain Shard), number of shards, this rank's shard."""

Runs = tuple[tuple[int, int], ...]
"""Start and stop of each run of indices of one dim, in the order of the local tensor."""


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    return isinstance(tensor, DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds: a DTensor's very own local tensor (``to_local`` may wrap it), else the tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def local_parts(name: str, tensor: Tensor) -> list[Part]:
    """The parts of ``tensor`` that this rank holds, sharing its storage.

    A plain tensor is one part, the whole box. A DTensor has one part for each box, in row-major order of
    the local tensor; none where its shard is empty, or where this rank is not of its mesh.
    Raises SpecError for a placement other than Replicate, Shard and _StridedShard, for a tensor that can't
    be moved (``check_plain``), and where the local shape is not what the placements say.
    """
    spec = spec_of(name, tensor)
    if not isinstance(tensor, DTensor):
        check_plain(name, tensor)
        return [Part(spec=spec, box=Box.whole(spec.shape), tensor=plain_view(tensor))]
    steps = _steps(name, tensor)
    if steps is None:
        return []
    check_plain(name, local_tensor(tensor))
    local = plain_view(local_tensor(tensor))
    readings = {_boxes(spec.shape, order) for order in (steps, _inner_first(steps))}
    fitting = [boxes for sizes, boxes in readings if local.shape == sizes]
    if len(fitting) != 1 or local.dtype != tensor.dtype:
        sizes = " or ".join(str(list(sizes)) for sizes, _ in sorted(readings, key=itemgetter(0)))
        why = "which fits two ways of sharding" if len(fitting) > 1 else f"{list(local.shape)} {local.dtype}"
        raise SpecError(
            f"{name}: expected a local tensor of {sizes} {tensor.dtype} for {tensor.placements} of "
            f"{list(spec.shape)} on mesh {list(tensor.device_mesh.shape)}, got {why}; "
            f"at mesh coordinate {tensor.device_mesh.get_coordinate()}"
        )
    (boxes,) = fitting
    whole = Box.whole(local.shape)
    return [Part(spec=spec, box=box, tensor=local[inner.within(whole)]) for box, inner in boxes]


def mesh_position(tensors: Iterable[Tensor]) -> tuple[int, int] | None:
    """This rank's row-major position in the DTensors' device mesh, and the mesh's size.

    Of several meshes the largest counts, of equal ones the first. None if there is no DTensor, or none
    whose mesh has this rank.
    """
    best: tuple[int, int] | None = None
    for mesh in {id(t.device_mesh): t.device_mesh for t in tensors if isinstance(t, DTensor)}.values():
        coordinate = mesh.get_coordinate()
        if coordinate is not None and (best is None or mesh.size() > best[1]):
            position = 0
            for index, size in zip(coordinate, mesh.shape, strict=True):
                position = position * size + index
            best = position, mesh.size()
    return best


def _steps(name: str, tensor: DTensor) -> tuple[Step, ...] | None:
    """The splits that lead to this rank's shard, in order; None where this rank is not of the mesh."""
    # Checked before the coordinate, so that ranks outside the mesh refuse too.
    for placement in tensor.placements:
        if type(placement) not in (Replicate, Shard, _StridedShard):
            raise SpecError(
                f"{name}: expected placements Replicate, Shard and _StridedShard, got {placement!r}"
            )
        if type(placement) is not Replicate and not -tensor.ndim <= cast(Any, placement).dim < tensor.ndim:
            raise SpecError(f"{name}: expected placements of {tensor.ndim} dims, got {placement!r}")
    order = getattr(tensor._spec, "shard_order", None) or ()
    if any(list(entry.mesh_dims) != sorted(entry.mesh_dims) for entry in order):
        raise SpecError(f"{name}: expected mesh dims that shard from left to right, got shard order {order}")
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    steps = []
    for placement, count, index in zip(tensor.placements, mesh.shape, coordinate, strict=True):
        if type(placement) is not Replicate:
            sharded = cast(Any, placement)
            factor = int(sharded.split_factor) if type(placement) is _StridedShard else 0
            steps.append((sharded.dim % tensor.ndim, factor, count, index))
    return tuple(steps)


def _inner_first(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The splits as fully_shard orders them: a strided one, whose factor is the number of shards inside
    it, is a plain one that comes after these."""
    if not steps:
        return ()
    (dim, factor, count, index), inner = steps[0], steps[1:]
    if factor > 1 and factor == math.prod(step[2] for step in inner if step[0] == dim):
        return (*_inner_first(inner), (dim, 0, count, index))
    return (steps[0], *_inner_first(inner))


@lru_cache(maxsize=65536)
def _boxes(
    shape: tuple[int, ...], steps: tuple[Step, ...]
) -> tuple[tuple[int, ...], tuple[tuple[Box, Box], ...]]:
    """The local tensor's shape, and each box with the box of the local tensor that holds it."""
    runs = [_runs(n, tuple(s for s in steps if s[0] == dim)) for dim, n in enumerate(shape)]
    sizes = tuple(sum(stop - start for start, stop in dim_runs) for dim_runs in runs)
    if 0 in sizes:
        return sizes, ()
    spans = []  # for each dim: (global start, local start, size) of each run
    for dim_runs in runs:
        ends = itertools.accumulate(stop - start for start, stop in dim_runs)
        spans.append([(a, end - (b - a), b - a) for (a, b), end in zip(dim_runs, ends, strict=True)])
    boxes = []
    for picked in itertools.product(*spans):
        starts, local_starts, counts = zip(*picked, strict=True) if picked else ((), (), ())
        boxes.append((Box(starts, counts), Box(local_starts, counts)))
    return sizes, tuple(boxes)


@lru_cache(maxsize=65536)
def _runs(size: int, steps: tuple[Step, ...]) -> Runs:
    """The indices of a dim of ``size`` that are left after ``steps``."""
    runs: Runs = ((0, size),) if size else ()
    for _, factor, count, index in steps:
        runs = _strided_shard(runs, factor, count, index) if factor else _shard(runs, count, index)
    return runs


def _shard(runs: Runs, count: int, index: int) -> Runs:
    """Shard ``index`` of ``count`` as torch.chunk cuts: all of the rounded-up size, the last ones shorter."""
    total = sum(stop - start for start, stop in runs)
    size = -(-total // count)
    low, high = size * index, size * (index + 1)
    kept, at = [], 0
    for start, stop in runs:
        first, last = max(low, at), min(high, at + stop - start)
        if first < last:
            kept.append((start + first - at, start + last - at))
        at += stop - start
    return tuple(kept)


def _strided_shard(runs: Runs, factor: int, count: int, index: int) -> Runs:
    indices = (
        torch.cat([torch.arange(a, b, device="cpu") for a, b in runs])
        if runs
        else torch.arange(0, device="cpu")
    )
    pieces, _ = _StridedShard(0, split_factor=factor)._split_tensor(
        indices, count, with_padding=False, contiguous=False
    )
    held = pieces[index]
    if not len(held):
        return ()
    breaks = torch.nonzero(held[1:] != held[:-1] + 1).flatten()
    starts = [int(held[0]), *held[breaks + 1].tolist()]
    lasts = [*held[breaks].tolist(), int(held[-1])]
    return tuple((start, last + 1) for start, last in zip(starts, lasts, strict=True))
