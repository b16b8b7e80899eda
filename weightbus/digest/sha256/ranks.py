"""SHA-256 of whole tensors that several ranks hold: what each of them says, and how shards go together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch.distributed as dist
from torch import Tensor

from weightbus.digest.sha256.gather import Join, Peers, joined_sha256s
from weightbus.digest.sha256.tensors import local_sha256s, manifest_tensors
from weightbus.errors import DigestError, SpecError
from weightbus.memory.shard import spec_of
from weightbus.planning.box import Box, check_exact_cover
from weightbus.tensors.layout import Source
from weightbus.tensors.torch_dtensor import is_dtensor, local_parts

_SPLIT_ATTRIBUTES = ("input_dim", "output_dim")  # as engines mark a plain parameter that is a shard


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor on one rank. sha256: of the local tensor. shape, boxes: global of a DTensor, else its own.

    dims: of a plain tensor, those along which it may be a shard of a larger one.
    """

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    sha256: str
    dims: tuple[int, ...]

    @property
    def sharded(self) -> bool:
        return self.boxes != (Box.whole(self.shape),)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank holds, and what it was asked. error: why it can't answer."""

    held: dict[str, Held] = {}
    unexpected: tuple[str, ...] = ()
    request: str = ""
    error: str = ""


def whole_sha256(
    source: Source, group: dist.ProcessGroup, *, threads: int | None = None, timeout_s: float = 300.0
) -> dict[str, str]:
    """``named_sha256`` of the whole tensors behind DTensor shards. Collective over ``group``; all get the same.

    No rank sees more of another's shards than some chunks of 4 MiB (``joined_sha256s``).
    group: for CPU tensors; its ranks together hold each tensor. timeout_s: of each wait for other ranks.
    Raises, on all ranks, SpecError where ranks have other names, dtypes or shapes, CoverageError where the
    group's shards don't make a whole tensor, DigestError where replicas differ; UpdateError where a rank is
    late.
    """
    peers = Peers(group, timeout_s)
    tensors: dict[str, Tensor] = {}

    def answer() -> Answer:
        tensors.update(manifest_tensors(source))
        return Answer(held=hold(tensors, threads), request=_digest_of(sorted(tensors)))

    answers = exchanged(peers, answer)
    found: dict[str, str] = {}
    joins: list[Join] = []
    for name in sorted(tensors):  # in one order on all ranks
        held = [a.held[name] for a in answers]
        if odd := odd_replicas(held):
            raise DigestError(f"{name}: expected equal replicas, got others on rank {odd[0]}; whole_sha256")
        if any(h.sharded for h in held):
            joins += ways(name, held)
        else:
            found[name] = held[0].sha256
    digests = joined_sha256s(joins, shards_of(tensors, [join.name for join in joins]), peers)
    found.update(zip((join.name for join in joins), digests, strict=True))
    return {name: found[name] for name in tensors}


def hold(tensors: Mapping[str, Tensor], threads: int | None) -> dict[str, Held]:
    """Local digests, and the boxes that they are of."""
    found = {}
    for name, sha256 in local_sha256s(tensors, threads=threads).items():
        tensor = tensors[name]
        spec = spec_of(name, tensor)
        boxes = tuple(part.box for part in local_parts(name, tensor))
        dims = () if is_dtensor(tensor) else _split_dims(tensor)
        found[name] = Held(dtype=spec.dtype, shape=spec.shape, boxes=boxes, sha256=sha256, dims=dims)
    return found


def exchanged(peers: Peers, answer: Callable[[], Answer]) -> list[Answer]:
    """Each rank's answer. Collective. Raises on all ranks if one can't answer, or was asked something else."""
    failure: Exception | None = None
    try:
        mine = answer()
    except Exception as error:
        failure, mine = error, Answer(error=str(error) or type(error).__name__)
    decode = msgspec.msgpack.Decoder(Answer).decode
    answers = [decode(data) for data in peers.exchange(msgspec.msgpack.encode(mine))]
    if failure is not None:
        raise failure
    for rank, other in enumerate(answers):
        if other.error:
            raise SpecError(f"{other.error}; on rank {rank}")
    for rank, other in enumerate(answers):
        if other.request != answers[0].request:
            raise SpecError(
                f"sha256: expected the same names and digests on all ranks, got others; on rank {rank}"
            )
    return answers


def ways(name: str, held: Sequence[Held]) -> list[Join]:
    """How ranks' shards may make the whole tensor.

    Of DTensors, the first replicas, and the last too where some differ; of plain tensors, one way for each dim.

    Raises SpecError where DTensors have other dtypes or shapes on other ranks, CoverageError where their
    boxes don't make the whole.
    """
    first = held[0]
    if any(h.sharded for h in held):
        for rank, other in enumerate(held):
            if (other.dtype, other.shape) != (first.dtype, first.shape):
                raise SpecError(
                    f"{name}: expected {first.dtype}{list(first.shape)} as on rank 0, got "
                    f"{other.dtype}{list(other.shape)}; on rank {rank}"
                )
        by_rank = [(rank, h.boxes) for rank, h in enumerate(held)]
        orders = [by_rank, by_rank[::-1]] if odd_replicas(held) else [by_rank]
        return [_join(name, first.dtype, first.shape, order) for order in orders]
    found = []
    for dim in sorted({dim for h in held for dim in h.dims}):
        rest = {(h.dtype, len(h.shape), h.shape[:dim], h.shape[dim + 1 :]) for h in held}
        if len(rest) == 1:
            begin, boxes = 0, []
            for rank, h in enumerate(held):
                offsets = tuple(begin if axis == dim else 0 for axis in range(len(h.shape)))
                boxes.append((rank, (Box(offsets, h.shape),)))
                begin += h.shape[dim]
            shape = (*first.shape[:dim], begin, *first.shape[dim + 1 :])
            found.append(_join(name, first.dtype, shape, boxes))
    return found


def odd_replicas(held: Sequence[Held], join: Join | None = None) -> tuple[int, ...]:
    """Ranks whose bytes differ from those of the rank whose boxes, the same ones, are part of ``join``.

    By default from those of the first rank with these boxes; or, of a tensor that is nowhere a DTensor's
    shard, of rank 0. join: of DTensors.
    """
    sharded = any(h.sharded for h in held)
    told = {} if join is None else {boxes: held[rank].sha256 for rank, boxes in join.holders}
    return tuple(
        rank
        for rank, h in enumerate(held)
        if h.boxes and told.setdefault(h.boxes if sharded else (), h.sha256) != h.sha256
    )


def shards_of(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, list[Tensor]]:
    """This rank's plain tensors behind each name, in the order of its boxes."""
    return {name: [part.tensor for part in local_parts(name, tensors[name])] for name in names}


def _join(name: str, dtype: str, shape: tuple[int, ...], boxes: Sequence[tuple[int, tuple[Box, ...]]]) -> Join:
    """Of several ranks with the same boxes, the first gives them."""
    first: dict[tuple[Box, ...], int] = {}
    for rank, held in boxes:
        if held:
            first.setdefault(held, rank)
    check_exact_cover(name, shape, [box for held in first for box in held], f"{len(boxes)} ranks of the group")
    holders = tuple((rank, held) for held, rank in first.items())
    return Join(name=name, dtype=dtype, shape=shape, holders=holders)


def _split_dims(tensor: Tensor) -> tuple[int, ...]:
    dims: set[int] = set()
    for attribute in _SPLIT_ATTRIBUTES:
        dim = getattr(tensor, attribute, None)
        if isinstance(dim, int) and not isinstance(dim, bool) and -tensor.ndim <= dim < tensor.ndim:
            dims.add(dim % tensor.ndim)
    return tuple(sorted(dims))


def _digest_of(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()
