"""How today's systems send weights, in short: each a function that both ranks run, after which the
server's tensors hold the trainer's. Only the transport; their loaders and control messages come on top.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

FLATTENED_BYTES = 1 << 30
PACKED_BYTES = 5 << 28


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def per_tensor(tensors: Sequence[Tensor], sends: bool) -> None:
    """A broadcast for each tensor, into a new one, which a loader then copies."""
    for tensor in tensors:
        wire = tensor if sends else torch.empty_like(tensor)
        dist.broadcast(wire, 0)
        if not sends:
            tensor.copy_(wire)


def runs(tensors: Sequence[Tensor], limit_bytes: int) -> list[list[Tensor]]:
    """Neighbours of at most ``limit_bytes`` together; a larger tensor alone."""
    found: list[list[Tensor]] = [[]]
    room = limit_bytes
    for tensor in tensors:
        if found[-1] and tensor.nbytes > room:
            found.append([])
            room = limit_bytes
        found[-1].append(tensor)
        room -= tensor.nbytes
    return found


def flattened(tensors: Sequence[Tensor], sends: bool) -> None:
    """Buckets: concatenated, broadcast, split and copied out."""
    for bucket in runs(tensors, FLATTENED_BYTES):
        flat = _flat(bucket, sends)
        dist.broadcast(flat, 0)
        if not sends:
            _copy_out(flat, bucket)


def packed(tensors: Sequence[Tensor], sends: bool) -> None:
    """Two buffers in turn, each on a stream of its own: one is filled or emptied while the other travels."""
    cuda = tensors[0].is_cuda
    streams = [torch.cuda.Stream() if cuda else None for _ in range(2)]
    for turn, bucket in enumerate(runs(tensors, PACKED_BYTES)):
        stream = streams[turn % 2]
        if stream is not None:
            stream.synchronize()
        with torch.cuda.stream(stream):  # a no-op for None
            flat = _flat(bucket, sends)
            dist.broadcast(flat, 0)
            if not sends:
                _copy_out(flat, bucket)
    for stream in streams:
        if stream is not None:
            stream.synchronize()


def _flat(bucket: Sequence[Tensor], sends: bool) -> Tensor:
    if sends:
        return torch.cat([as_bytes(tensor) for tensor in bucket])
    nbytes = sum(tensor.nbytes for tensor in bucket)
    return torch.empty(nbytes, dtype=torch.uint8, device=bucket[0].device)


def _copy_out(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    offset = 0
    for tensor in bucket:
        tensor.copy_(flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        offset += tensor.nbytes


SCHEMES: dict[str, Callable[[Sequence[Tensor], bool], None]] = {
    "a broadcast for each tensor, then a copy": per_tensor,
    "flattened bucket, 1 GiB": flattened,
    "packed, two buffers of 1.25 GiB": packed,
}
