"""One rank's part of a plan, compiled: for each transfer a buffer, and what is copied in and out.

Either end uses its own storage as the buffer where a transfer is one contiguous box of it; all else
goes through a ring of staging buckets. Every view is made here, so that a replay only copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightbus.errors import SpecError
from weightbus.memory.torch_copy import Copies
from weightbus.planning.box import Box
from weightbus.planning.plan import SLOT_ALIGN, Plan, Slot, Transfer
from weightbus.planning.spec import Spec
from weightbus.tensors.install import Target
from weightbus.tensors.layout import Part


@dataclass(slots=True, kw_only=True)
class Step:
    """One transfer on this rank.

    buffer: uint8, in a bucket (``staged``) or in place.
    boxes: what the buffer holds, by tensor and box: in the wire's dtype as it travels, and, on the rank
    that sends it, as it lies in the source.
    """

    src: int
    buffer: Tensor
    staged: bool
    boxes: list[tuple[str, Box, Tensor, Tensor | None]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Wave:
    """Transfers that start together. pack: into the bucket, before; unpack: out of it, after.

    staged: whether a bucket is used. assembled: tensors with hooks that are whole once this wave has been
    unpacked. nbytes: of all transfers. sends, receives: of a reshard, buffers with the group rank at the other
    end. needs: the wave that has to be in place before, as this one passes on what it brought; -1: none.
    """

    steps: list[Step] = field(default_factory=list)
    pack: Copies = field(default_factory=Copies)
    unpack: Copies = field(default_factory=Copies)
    assembled: list[str] = field(default_factory=list)
    staged: bool = False
    nbytes: int = 0
    sends: list[tuple[Tensor, int]] = field(default_factory=list)
    receives: list[tuple[Tensor, int]] = field(default_factory=list)
    needs: int = -1


# Of a reshard: what leaves this rank's source through a bucket, by the plan's tensor and box.
Packed = dict[tuple[int, Box], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """This rank's waves. whole: for each tensor with a hook, the whole tensor that the hook will take.
    last: for each tensor, the wave that brings the last of it. depth: how many waves may be under way.
    landing: waves after which the host waits, as it reads what they bring. packed: of a reshard."""

    waves: list[Wave]
    whole: dict[str, Tensor]
    last: dict[str, int]
    depth: int
    landing: frozenset[int]
    packed: Packed = field(default_factory=dict)


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise SpecError(f"dtype: expected one of torch's, got {name!r}")
    return dtype


def as_bytes(tensor: Tensor) -> Tensor:
    """The contiguous tensor's storage as flat uint8."""
    return tensor.view(-1).view(torch.uint8)


def typed(buffer: Tensor, slot: Slot, spec: Spec) -> Tensor:
    """A slot's box in its transfer's buffer."""
    dtype = torch_dtype(spec.dtype)
    raw = buffer[slot.offset : slot.offset + slot.box.volume * dtype.itemsize]
    return raw.view(dtype).view(slot.box.sizes)


def aligned(nbytes: int) -> int:
    return -(-nbytes // SLOT_ALIGN) * SLOT_ALIGN


class Staging:
    """All staging memory of a rank, allocated when a plan is compiled and kept: a ring of buckets,
    and an arena in which tensors with hooks are put together."""

    def __init__(self, device: torch.device, num_buckets: int) -> None:
        self.device, self.num_buckets = device, num_buckets
        self._ring: list[Tensor] = []
        self._arena = self._empty(0)

    def _empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    @property
    def nbytes(self) -> int:
        return self._arena.nbytes + sum(bucket.nbytes for bucket in self._ring)

    def ring(self, bucket_bytes: int) -> list[Tensor]:
        if bucket_bytes and (not self._ring or self._ring[0].nbytes < bucket_bytes):
            self._ring.clear()
            self._ring = [self._empty(bucket_bytes) for _ in range(self.num_buckets)]
        return self._ring

    def arena(self, nbytes: int) -> Tensor:
        if self._arena.nbytes < nbytes:
            self._arena = self._empty(0)
            self._arena = self._empty(nbytes)
        return self._arena


class Ends:
    """What this rank reads from its source and writes to its target, as views of boxes.

    echoes: as of a plan. whole: for each tensor with a hook, where it is put together.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        echoes: Mapping[int, int],
        source: Mapping[str, Sequence[Part]],
        target: Target | None,
        whole: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self.specs, self.device = specs, device
        self.source, self.target, self.whole = source, target, whole
        self.echoes: dict[int, list[int]] = {}
        for echo, carrier in echoes.items():
            self.echoes.setdefault(carrier, []).append(echo)

    def reads(self, spec: Spec, box: Box) -> Tensor:
        """``box`` in the one part that holds all of it: a plan sends what was told."""
        part = next(part for part in self.source[spec.name] if part.box.intersect(box) == box)
        return part.tensor[box.within(part.box)]

    def writes(self, spec: Spec, box: Box) -> list[tuple[Tensor, Box]]:
        if spec.name in self.whole:
            return [(self.whole[spec.name][box.within(Box.whole(spec.shape))], box)]
        return self.target.writes(spec.name, box) if self.target else []

    def in_place(self, slots: Sequence[Slot], *, sends: bool) -> Tensor | None:
        """The storage that can be the buffer itself: the source's where this rank sends, else the target's."""
        if len(slots) != 1:
            return None
        (slot,) = slots
        spec = self.specs[slot.tensor]
        if sends:
            return self.serves(spec, self.reads(spec, slot.box))
        writes = self.writes(spec, slot.box)
        if len(writes) != 1 or writes[0][1] != slot.box:
            return None
        return self.serves(spec, writes[0][0])

    def serves(self, spec: Spec, view: Tensor) -> Tensor | None:
        """``view``, if it can be a buffer."""
        plain = view.is_contiguous() and not view.is_conj() and not view.is_neg()
        fits = view.dtype == torch_dtype(spec.dtype) and view.device == self.device
        return view if plain and fits else None

    def install(self, copies: Copies, slot: Slot, view: Tensor, *, echoes_only: bool = False) -> None:
        """Have ``copies`` write a slot's box to wherever it is wanted, under all names of its tensor."""
        for index in (*(() if echoes_only else (slot.tensor,)), *self.echoes.get(slot.tensor, ())):
            for dst, inner in self.writes(self.specs[index], slot.box):
                copies.add(dst, view[inner.within(slot.box)])


def compile_waves(
    plan: Plan,
    rank: int,
    *,
    source: Mapping[str, Sequence[Part]],
    target: Target | None,
    staging: Staging,
) -> Compiled:
    """This rank's part of ``plan``: a step for each transfer, in the plan's waves.

    source: the parts that this rank can send. target: where it installs; None on trainer ranks.
    As many waves may be under way as there are buckets: a wave may start once the one that many
    before it has ended.
    """
    spans = spans_of(plan)
    whole = place_whole(plan.specs, target, staging, spans)
    ends = Ends(plan.specs, plan.echoes, source, target, whole, staging.device)
    places = [[ends.in_place(t.slots, sends=t.src == rank) for t in wave] for wave in plan.waves]
    staged = [
        sum(aligned(t.nbytes) for t, place in zip(wave, row, strict=True) if place is None)
        for wave, row in zip(plan.waves, places, strict=True)
    ]
    ring = staging.ring(max(staged, default=0))
    waves = []
    used = 0
    for transfers, row, room in zip(plan.waves, places, staged, strict=True):
        wave = Wave(staged=room > 0, nbytes=sum(transfer.nbytes for transfer in transfers))
        offset = 0
        for transfer, place in zip(transfers, row, strict=True):
            if place is None:
                buffer = ring[used % len(ring)][offset : offset + transfer.nbytes]
                offset += aligned(transfer.nbytes)
            else:
                buffer = as_bytes(place)
            wave.steps.append(
                _step(ends, wave, transfer, buffer, staged=place is None, sends=transfer.src == rank)
            )
        used += wave.staged
        waves.append(wave)
    return finished(waves, whole, {name: last for name, (_, last) in spans.items()}, target, staging, {})


def finished(
    waves: list[Wave],
    whole: dict[str, Tensor],
    last: dict[str, int],
    target: Target | None,
    staging: Staging,
    packed: Packed,
) -> Compiled:
    """With the waves after which hooks run, and the host waits."""
    for name in whole.keys() & last.keys():
        waves[last[name]].assembled.append(name)
    hooks = target.hooks if target else {}
    landing = frozenset(
        index
        for index, wave in enumerate(waves)
        if wave.unpack.to_host or any(hooks[name].to_host for name in wave.assembled)
    )
    depth = staging.num_buckets
    return Compiled(waves=waves, whole=whole, last=last, depth=depth, landing=landing, packed=packed)


def _step(ends: Ends, wave: Wave, transfer: Transfer, buffer: Tensor, *, staged: bool, sends: bool) -> Step:
    step = Step(src=transfer.src, buffer=buffer, staged=staged)
    for slot in transfer.slots:
        spec = ends.specs[slot.tensor]
        view = typed(buffer, slot, spec)
        origin = ends.reads(spec, slot.box) if sends else None
        step.boxes.append((spec.name, slot.box, view, origin))
        if origin is not None and staged:
            wave.pack.add(view, origin)
        ends.install(wave.unpack, slot, view, echoes_only=not staged and not sends)
        for index in ends.echoes.get(slot.tensor, ()):
            echo = ends.specs[index]
            step.boxes.append((echo.name, slot.box, view, ends.reads(echo, slot.box) if sends else None))
    return step


def spans_of(plan: Plan) -> dict[str, tuple[int, int]]:
    """The first and last wave of each tensor that has elements."""
    spans: dict[str, tuple[int, int]] = {}
    for index, wave in enumerate(plan.waves):
        for transfer in wave:
            for slot in transfer.slots:
                name = plan.specs[slot.tensor].name
                spans[name] = (spans.get(name, (index, 0))[0], index)
    for echo, carrier in plan.echoes.items():
        if (name := plan.specs[carrier].name) in spans:
            spans[plan.specs[echo].name] = spans[name]
    return spans


def place_whole(
    specs: Sequence[Spec], target: Target | None, staging: Staging, spans: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """A place in the arena for each tensor with a hook, shared by those that never meet in time."""
    if target is None or not target.hooks:
        return {}
    hooked = {spec.name: spec for spec in specs if spec.name in target.hooks}
    places: list[tuple[int, int, int]] = []  # offset, end, last wave that may still use it
    offsets = {}
    for name in sorted(hooked.keys() & spans.keys(), key=lambda name: (spans[name], name)):
        first, last = spans[name]
        nbytes = aligned(hooked[name].nbytes)
        offset = 0
        for low, high, until in sorted(places):
            if until >= first and low < offset + nbytes and offset < high:
                offset = high
        # A wave starts up to ``num_buckets`` waves before the hook of an earlier one has run.
        places.append((offset, offset + nbytes, last + staging.num_buckets - 1))
        offsets[name] = offset
    arena = staging.arena(max((end for _, end, _ in places), default=0))
    return {
        name: arena[offsets.get(name, 0) :][: spec.nbytes].view(torch_dtype(spec.dtype)).view(spec.shape)
        for name, spec in hooked.items()
    }
