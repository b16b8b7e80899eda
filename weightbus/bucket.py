"""One rank's part of a plan, compiled: for each transfer a buffer, and what is copied in and out.

Either end uses its own storage as the buffer where a transfer is one contiguous box of it; all else
goes through a ring of staging buckets. Every view is made here, so that a replay only copies.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightbus.box import Box
from weightbus.install import Target
from weightbus.layout import Part
from weightbus.plan import SLOT_ALIGN, Plan, Slot, Transfer
from weightbus.spec import Spec
from weightbus.torch_copy import copy_all


@dataclass(slots=True)
class Copies:
    """Pairs of views of equal shape, copied (and cast) together."""

    dst: list[Tensor] = field(default_factory=list)
    src: list[Tensor] = field(default_factory=list)

    def add(self, dst: Tensor, src: Tensor) -> None:
        self.dst.append(dst)
        self.src.append(src)

    def run(self) -> None:
        if self.dst:
            copy_all(self.dst, self.src)


@dataclass(slots=True, kw_only=True)
class Step:
    """One transfer on this rank.

    buffer: uint8, in a bucket or in place. bucket: which bucket, None if in place.
    boxes: what the buffer holds, by tensor and box, in the wire's dtype.
    assembled: tensors with hooks that are whole once this step has been unpacked.
    """

    src: int
    buffer: Tensor
    bucket: int | None
    boxes: list[tuple[str, Box, Tensor]] = field(default_factory=list)
    pack: Copies = field(default_factory=Copies)
    unpack: Copies = field(default_factory=Copies)
    assembled: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """All steps, and for each tensor with a hook the whole tensor that the hook will take."""

    steps: list[Step]
    whole: dict[str, Tensor]


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def as_bytes(tensor: Tensor) -> Tensor:
    """The contiguous tensor's storage as flat uint8."""
    return tensor.view(-1).view(torch.uint8)


def _typed(buffer: Tensor, slot: Slot, spec: Spec) -> Tensor:
    """A slot's box in its transfer's buffer."""
    dtype = torch_dtype(spec.dtype)
    raw = buffer[slot.offset : slot.offset + slot.box.volume * dtype.itemsize]
    return raw.view(dtype).view(slot.box.sizes)


class Staging:
    """All staging memory of a rank, allocated when a plan is compiled and kept: a ring of buckets,
    and an arena in which tensors with hooks are put together."""

    def __init__(self, device: torch.device, num_buckets: int) -> None:
        self._device = device
        self._num_buckets = num_buckets
        self._ring: list[Tensor] = []
        self._arena = self._empty(0)

    def _empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    @property
    def nbytes(self) -> int:
        return self._arena.nbytes + sum(bucket.nbytes for bucket in self._ring)

    def ring(self, bucket_bytes: int) -> list[Tensor]:
        if bucket_bytes and (not self._ring or self._ring[0].nbytes < bucket_bytes):
            self._ring.clear()
            self._ring = [self._empty(bucket_bytes) for _ in range(self._num_buckets)]
        return self._ring

    def arena(self, nbytes: int) -> Tensor:
        if self._arena.nbytes < nbytes:
            self._arena = self._empty(0)
            self._arena = self._empty(nbytes)
        return self._arena


class _Ends:
    """What this rank can send from and receive into, by wire name and box."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        source: Mapping[str, Sequence[Part]],
        target: Target | None,
        whole: Mapping[str, Tensor],
    ) -> None:
        self.plan, self.rank, self.source, self.target, self.whole = plan, rank, source, target, whole

    def reads(self, spec: Spec, box: Box) -> Tensor:
        """The view of ``box`` in the one part that holds all of it: a plan sends what was told."""
        part = next(part for part in self.source[spec.name] if part.box.intersect(box) == box)
        return part.tensor[box.within(part.box)]

    def writes(self, spec: Spec, box: Box) -> list[tuple[Tensor, Box]]:
        if spec.name in self.whole:
            return [(self.whole[spec.name][box.within(Box.whole(spec.shape))], box)]
        return self.target.writes(spec.name, box) if self.target else []

    def in_place(self, transfer: Transfer) -> Tensor | None:
        """The storage that can be the buffer itself: the source's on its rank, else the target's."""
        if len(transfer.slots) != 1:
            return None
        slot = transfer.slots[0]
        spec = self.plan.specs[slot.tensor]
        if transfer.src == self.rank:
            view = self.reads(spec, slot.box)
        else:
            writes = self.writes(spec, slot.box)
            if len(writes) != 1 or writes[0][1] != slot.box:
                return None
            view = writes[0][0]
        plain = view.is_contiguous() and not view.is_conj() and not view.is_neg()
        return view if plain and view.dtype == torch_dtype(spec.dtype) else None


def compile_steps(
    plan: Plan,
    rank: int,
    *,
    source: Mapping[str, Sequence[Part]],
    target: Target | None,
    staging: Staging,
    in_flight: int,
) -> Compiled:
    """This rank's steps of ``plan``, one for each transfer.

    source: the parts that this rank can send. target: where it installs; None on trainer ranks.
    in_flight: how many steps may have started and not ended.
    """
    whole = _place_whole(plan, target, staging, in_flight)
    ends = _Ends(plan, rank, source, target, whole)
    places = [ends.in_place(transfer) for transfer in plan.transfers]
    staged = [t.nbytes for t, place in zip(plan.transfers, places, strict=True) if place is None]
    ring = staging.ring(max(staged, default=0))
    steps = []
    used = 0
    for transfer, place in zip(plan.transfers, places, strict=True):
        if place is None:
            bucket = used % len(ring)
            used += 1
            step = Step(src=transfer.src, buffer=ring[bucket][: transfer.nbytes], bucket=bucket)
        else:
            step = Step(src=transfer.src, buffer=as_bytes(place), bucket=None)
        for slot in transfer.slots:
            spec = plan.specs[slot.tensor]
            view = _typed(step.buffer, slot, spec)
            step.boxes.append((spec.name, slot.box, view))
            if transfer.src == rank and place is None:
                step.pack.add(view, ends.reads(spec, slot.box))
            if place is None or transfer.src == rank:
                for dst, inner in ends.writes(spec, slot.box):
                    step.unpack.add(dst, view[inner.within(slot.box)])
        steps.append(step)
    for name, (_, last) in _spans(plan, whole).items():
        steps[last].assembled.append(name)
    return Compiled(steps=steps, whole=whole)


def _spans(plan: Plan, names: Container[str]) -> dict[str, tuple[int, int]]:
    """The first and last transfer of each tensor."""
    spans: dict[str, tuple[int, int]] = {}
    for index, transfer in enumerate(plan.transfers):
        for slot in transfer.slots:
            name = plan.specs[slot.tensor].name
            if name in names:
                spans[name] = (spans.get(name, (index, 0))[0], index)
    return spans


def _place_whole(plan: Plan, target: Target | None, staging: Staging, in_flight: int) -> dict[str, Tensor]:
    """A place in the arena for each tensor with a hook, shared by those that never meet in time."""
    if target is None or not target.hooks:
        return {}
    specs = {spec.name: spec for spec in plan.specs if spec.name in target.hooks}
    places: list[tuple[int, int, int]] = []  # offset, end, last step that may still use it
    offsets = {}
    for name, (first, last) in sorted(_spans(plan, specs).items(), key=lambda item: item[1]):
        nbytes = -(-specs[name].nbytes // SLOT_ALIGN) * SLOT_ALIGN
        offset = 0
        for low, high, until in sorted(places):
            if until >= first and low < offset + nbytes and offset < high:
                offset = high
        # A transfer starts up to ``in_flight`` steps before the hook of an earlier one has run.
        places.append((offset, offset + nbytes, last + in_flight))
        offsets[name] = offset
    arena = staging.arena(max((end for _, end, _ in places), default=0))
    return {
        name: arena[offsets.get(name, 0) :][: spec.nbytes].view(torch_dtype(spec.dtype)).view(spec.shape)
        for name, spec in specs.items()
    }
