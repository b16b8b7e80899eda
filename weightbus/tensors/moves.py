"""One rank's part of a reshard plan, compiled: the messages that it sends and receives, and what is copied.

As in ``bucket``, either end uses its own storage as the buffer where a message is one contiguous box of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from weightbus.memory.shard import Part
from weightbus.planning.box import Box
from weightbus.planning.plan import Slot
from weightbus.planning.reshard_plan import ReshardPlan
from weightbus.planning.reshard_waves import Move
from weightbus.tensors.bucket import (
    Compiled,
    Ends,
    Packed,
    Staging,
    Wave,
    aligned,
    as_bytes,
    finished,
    place_whole,
    torch_dtype,
    typed,
)
from weightbus.tensors.install import Target


@dataclass(slots=True)
class _Side:
    """One end of a move on this rank. place: storage that serves as its buffer. staged: a bucket does."""

    move: Move
    sends: bool
    place: Tensor | None
    staged: bool


def compile_moves(
    plan: ReshardPlan,
    rank: int,
    *,
    source: Mapping[str, Sequence[Part]],
    target: Target | None,
    staging: Staging,
) -> Compiled:
    """This rank's part of ``plan``: all of its waves, in some of which it may have nothing to do.

    source: the parts that this rank can send. target: where it installs; None on trainer ranks.
    What is passed on is read where it was written, so the wave that brought it has to end before.
    """
    spans = _spans(plan, rank)
    whole = place_whole(plan.specs, target, staging, spans)
    ends = Ends(plan.specs, plan.echoes, source, target, whole, staging.device)
    sides = [[side for move in wave for side in _sides(ends, move, rank)] for wave in plan.waves]
    staged = [sum(aligned(side.move.nbytes) for side in row if side.staged) for row in sides]
    ring = staging.ring(max(staged, default=0))
    waves: list[Wave] = []
    packed: Packed = {}
    arrived: dict[tuple[int, Box], int] = {}
    used = 0
    for index, (row, room) in enumerate(zip(sides, staged, strict=True)):
        wave = Wave(staged=room > 0)
        offset = 0
        for side in row:
            buffer = None
            if side.staged:
                buffer = ring[used % len(ring)][offset : offset + side.move.nbytes]
                offset += aligned(side.move.nbytes)
            elif side.place is not None:
                buffer = as_bytes(side.place)
            _add(ends, wave, packed, side, buffer)
            for slot in side.move.slots:
                if side.move.passed and side.sends:
                    wave.needs = max(wave.needs, arrived[slot.tensor, slot.box])
                elif side.move.dst == rank:
                    arrived[slot.tensor, slot.box] = index
            if side.move.dst == rank or (target is None and side.sends):
                wave.nbytes += side.move.nbytes
        used += wave.staged
        waves.append(wave)
    last = {name: final for name, (_, final) in spans.items()}
    return finished(waves, whole, last, target, staging, packed)


def _sides(ends: Ends, move: Move, rank: int) -> list[_Side]:
    if move.src == move.dst == rank:
        cast = any(
            ends.reads(spec, slot.box).dtype != torch_dtype(spec.dtype)
            for slot in move.slots
            for spec in [ends.specs[slot.tensor]]
        )
        return [_Side(move, sends=True, place=None, staged=cast)]
    if rank not in (move.src, move.dst):
        return []
    sends = move.src == rank
    place: Tensor | None = None
    if sends and move.passed:
        (slot, *others) = move.slots
        place = None if others else ends.serves(ends.specs[slot.tensor], _passes(ends, slot))
    else:
        place = ends.in_place(move.slots, sends=sends)
    return [_Side(move, sends=sends, place=place, staged=place is None)]


def _passes(ends: Ends, slot: Slot) -> Tensor:
    """Where this rank has what it passes on: under one of its names, in one piece, as the plan has cut it."""
    return next(
        view
        for index in (slot.tensor, *ends.echoes.get(slot.tensor, ()))
        for view, inner in ends.writes(ends.specs[index], slot.box)
        if inner == slot.box
    )


def _add(ends: Ends, wave: Wave, packed: Packed, side: _Side, buffer: Tensor | None) -> None:
    """buffer: of the message; none for what is copied from the source to the target as it is."""
    move = side.move
    if move.src != move.dst and buffer is not None:
        (wave.sends if side.sends else wave.receives).append((buffer, move.dst if side.sends else move.src))
    for slot in move.slots:
        spec = ends.specs[slot.tensor]
        view = ends.reads(spec, slot.box) if buffer is None else typed(buffer, slot, spec)
        if side.sends and side.staged:
            wave.pack.add(view, _passes(ends, slot) if move.passed else ends.reads(spec, slot.box))
            if not move.passed:
                packed[slot.tensor, slot.box] = view
        if move.dst == move.src or not side.sends:
            ends.install(wave.unpack, slot, view, echoes_only=not side.sends and not side.staged)


def _spans(plan: ReshardPlan, rank: int) -> dict[str, tuple[int, int]]:
    """The first and last wave in which this rank gets, or passes on, anything of a tensor."""
    spans: dict[int, tuple[int, int]] = {}
    for index, wave in enumerate(plan.waves):
        for move in wave:
            if move.dst == rank or (move.src == rank and move.passed):
                for slot in move.slots:
                    spans[slot.tensor] = (spans.get(slot.tensor, (index, 0))[0], index)
    for echo, carrier in plan.echoes.items():
        if carrier in spans:
            spans[echo] = spans[carrier]
    return {plan.specs[index].name: span for index, span in spans.items()}
