"""SHA-256 of whole tensors that lie in shards: a few rows at a time go to the one rank that hashes them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from weightbus.digest.sha256.tensors import header
from weightbus.errors import SpecError, UpdateError
from weightbus.memory.host_bytes import CHUNK_BYTES
from weightbus.memory.shard import bits_of
from weightbus.planning.box import Box
from weightbus.planning.spec import ITEMSIZE

BUFFERS = 3

Cut = tuple[int, Box, Box]
"""A box that a rank holds, by its index among them, and what it has in common with a chunk."""


class Peers:
    """The ranks of a process group of the user's, as far as bytes in host memory go between them."""

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        """timeout_s: for each wait. Raises SpecError for a group that can't carry CPU tensors."""
        if dist.get_rank(group) < 0:
            raise SpecError("group: expected one that this process is a rank of, got another")
        backends = dist.get_backend_config(group)
        if "cpu:" not in backends:
            raise SpecError(
                f"group: expected one for CPU tensors, as new_group(backend='gloo') makes, got {backends}"
            )
        self._group, self._timeout = group, timedelta(seconds=timeout_s)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def exchange(self, mine: bytes) -> list[bytes]:
        """Each rank's bytes, by rank. Collective."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._all_gather(sizes, torch.tensor([len(mine)]))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in range(self.size)]
        self._all_gather(found, padded)
        return [bytes(data[: int(n)].numpy()) for data, n in zip(found, sizes, strict=True)]

    def send(self, data: Tensor, dst: int) -> Any:
        return dist.isend(data, group=self._group, group_dst=dst)

    def receive(self, data: Tensor, src: int, name: str) -> None:
        self.wait(dist.irecv(data, group=self._group, group_src=src), f"{name}: its rows from rank {src}")

    def wait(self, work: Any, what: str) -> None:
        """Raises UpdateError when the deadline passes, or the other rank has gone."""
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            seconds = self._timeout.total_seconds()
            reason = str(error).splitlines()[0]
            raise UpdateError(
                f"sha256: expected {what} within {seconds:g} s, got: {reason}; rank {self.rank}"
            ) from error

    def _all_gather(self, into: list[Tensor], mine: Tensor) -> None:
        work = dist.all_gather(into, mine, group=self._group, async_op=True)
        self.wait(work, f"an answer of all {self.size} ranks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A way to put a whole tensor together. holders: group ranks with their boxes, which cover ``shape``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    holders: tuple[tuple[int, tuple[Box, ...]], ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    def chunks(self) -> list[Box]:
        """Pieces of at most CHUNK_BYTES, in the order of the hash."""
        return Box.whole(self.shape).split(CHUNK_BYTES // ITEMSIZE[self.dtype]) if self.nbytes else []

    def cuts(self, rank: int, chunk: Box) -> list[Cut]:
        """What a rank holds of a chunk."""
        boxes = dict(self.holders).get(rank, ())
        found = ((i, box, box.intersect(chunk)) for i, box in enumerate(boxes))
        return [(i, box, common) for i, box, common in found if common is not None]


def joined_sha256s(joins: Sequence[Join], shards: Mapping[str, Sequence[Tensor]], peers: Peers) -> list[str]:
    """``tensor_sha256`` of each join's whole tensor. Collective: ranks give equal joins and get equal answers.

    shards: by name, this rank's plain tensors in the order of its boxes. Ranks take turns to hash, so that
    all are at work; none holds more than 2 * BUFFERS + 1 chunks of CHUNK_BYTES, whatever the tensors' sizes.
    Raises UpdateError where a rank is late.
    """
    mine = {
        i: hashlib.sha256(header(joins[i].dtype, joins[i].shape))
        for i, owner in _owners(joins, peers.size)
        if owner == peers.rank
    }
    largest = min(CHUNK_BYTES, max((join.nbytes for join in joins), default=0))
    pinned = any(tensor.is_cuda for tensors in shards.values() for tensor in tensors)
    buffers = [torch.empty(largest, dtype=torch.uint8, pin_memory=pinned) for _ in range(2 * BUFFERS + 1)]
    outbox, inbox, arriving = buffers[:BUFFERS], buffers[BUFFERS:-1], buffers[-1]
    sent: list[Any] = [None] * BUFFERS
    hashed: list[Future[None] | None] = [None] * BUFFERS
    sends = receipts = 0
    with ThreadPoolExecutor(1, "weightbus-join") as hashing:
        for i, owner, chunk in _steps(joins, peers.size):
            join = joins[i]
            if owner == peers.rank:
                slot = receipts % BUFFERS
                receipts += 1
                if (task := hashed[slot]) is not None:
                    task.result()
                rows = _shaped(inbox[slot], join.dtype, chunk.sizes)
                _gather(rows, join, chunk, shards, arriving, peers)
                hashed[slot] = hashing.submit(mine[i].update, rows.reshape(-1).view(torch.uint8).numpy().data)
            elif cuts := join.cuts(peers.rank, chunk):
                slot = sends % BUFFERS
                sends += 1
                if sent[slot] is not None:
                    peers.wait(sent[slot], f"rank {owner} to take what it was sent before {join.name}")
                message = _Message(join, cuts, outbox[slot])
                _copy(message.views, _pieces(shards[join.name], cuts))
                sent[slot] = peers.send(message.data, owner)
        for work in filter(None, sent):
            peers.wait(work, "the last rows to be taken")
    answers = peers.exchange(msgspec.msgpack.encode({i: hasher.hexdigest() for i, hasher in mine.items()}))
    found: dict[int, str] = {}
    for answer in answers:
        found.update(msgspec.msgpack.decode(answer, type=dict[int, str]))
    return [found[i] for i in range(len(joins))]


def _batches(joins: Sequence[Join], size: int) -> Iterator[list[int]]:
    """Indices of ``size`` tensors of about one size, hashed at the same time by one rank each."""
    order = sorted(range(len(joins)), key=lambda i: -joins[i].nbytes)
    for first in range(0, len(order), size):
        yield order[first : first + size]


def _owners(joins: Sequence[Join], size: int) -> Iterator[tuple[int, int]]:
    for batch in _batches(joins, size):
        yield from ((i, owner) for owner, i in enumerate(batch))


def _steps(joins: Sequence[Join], size: int) -> Iterator[tuple[int, int, Box]]:
    """Each chunk's join and owner, in the order that all ranks walk: so nobody waits in a circle."""
    for batch in _batches(joins, size):
        for row in zip_longest(*(joins[i].chunks() for i in batch)):
            for owner, (i, chunk) in enumerate(zip(batch, row, strict=True)):
                if chunk is not None:
                    yield i, owner, chunk


class _Message:
    """What one rank sends of a chunk. data: the bytes, at the start of a buffer. views: into them, by cut."""

    def __init__(self, join: Join, cuts: Sequence[Cut], buffer: Tensor) -> None:
        self.views, end = [], 0
        for _, _, common in cuts:
            begin, end = end, end + common.volume * ITEMSIZE[join.dtype]
            self.views.append(_shaped(buffer[begin:end], join.dtype, common.sizes))
        self.data = buffer[:end]


def _gather(
    rows: Tensor, join: Join, chunk: Box, shards: Mapping[str, Sequence[Tensor]], arriving: Tensor, peers: Peers
) -> None:
    """Fill ``rows``, a chunk of the whole tensor, with what each holder has of it."""
    for rank, _ in join.holders:
        if not (cuts := join.cuts(rank, chunk)):
            continue
        if rank == peers.rank:
            pieces = _pieces(shards[join.name], cuts)
        else:
            message = _Message(join, cuts, arriving)
            peers.receive(message.data, rank, join.name)
            pieces = message.views
        _copy([rows[common.within(chunk)] for _, _, common in cuts], pieces)


def _shaped(buffer: Tensor, dtype: str, sizes: Sequence[int]) -> Tensor:
    """The start of a buffer, as integers of a dtype's width in some shape."""
    integers = bits_of(torch.empty(0, dtype=getattr(torch, dtype))).dtype
    return buffer[: math.prod(sizes) * ITEMSIZE[dtype]].view(integers).view(tuple(sizes))


def _pieces(tensors: Sequence[Tensor], cuts: Sequence[Cut]) -> list[Tensor]:
    return [bits_of(tensors[i])[common.within(box)] for i, box, common in cuts]


def _copy(dst: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    for into, piece in zip(dst, src, strict=True):
        into.copy_(piece)
