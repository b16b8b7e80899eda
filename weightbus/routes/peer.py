"""The peer route: each server rank copies what it wants out of the trainer ranks' memory on its own host.

The destination's process does all of the copying, so that a process that is stopped or killed writes nothing
into another's memory. No decisions are made here: the plan is compiled to waves of copies and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from weightbus.digest.ledger import Entry, Ledger
from weightbus.memory.copy_descriptors import CASTS, cast_pieces
from weightbus.memory.ipc import Import
from weightbus.memory.shared_memory import SharedImport, view_of
from weightbus.memory.streams import Lanes, Mark, wait_for
from weightbus.planning.box import Box
from weightbus.planning.exports import Place
from weightbus.planning.facts import Facts
from weightbus.planning.peer_plan import PeerPlan, Piece
from weightbus.planning.spec import Spec
from weightbus.routes.peer_wave import OwnCopy, Wave, address_runs, copied_by_digests
from weightbus.tensors.bucket import Staging, torch_dtype
from weightbus.tensors.install import Target
from weightbus.tensors.layout import Part
from weightbus.tensors.loaders.hook import Hook

# Bytes of a wave. What has come is digested while the next waves are under way, and the last one's digest
# is all that the proof adds to the time. Within a GPU copies leave its memory no time for digests, and each
# start of a kernel costs some: waves of what lies there are longer by a factor.
WAVE_BYTES = 1 << 30
NEAR_WAVES = 16

# Tensors with hooks that are under way: one is put together while another's hook runs.
HOOK_SLOTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledPeer:
    """One rank's part of a plan.

    waves: of a server rank. whole: for each tensor with a hook, the whole tensor that the hook will take.
    last: for each tensor that is copied, the wave that brings the last of it. sent: what is digested of what
    this rank sends.
    """

    waves: list[Wave]
    whole: dict[str, Tensor]
    last: dict[str, int]
    sent: Sequence[Entry] = ()


class _Compiler:
    """Turns pieces into copies from wherever their sources lie."""

    def __init__(
        self,
        rank: int,
        facts: Mapping[int, Facts],
        imports: Mapping[int, Import],
        own: Mapping[str, Sequence[Part]],
        wave_bytes: int,
    ) -> None:
        self.rank, self.facts, self.imports, self.own, self.wave_bytes = rank, facts, imports, own, wave_bytes
        self.waves = [Wave()]
        self.last: dict[str, int] = {}

    def add(self, piece: Piece, spec: Spec, dst: Tensor, box: Box) -> None:
        """``box``, inside the piece's, to ``dst``, which has its shape."""
        wave = self.waves[-1]
        if wave.far_bytes >= self.wave_bytes or wave.nbytes >= NEAR_WAVES * self.wave_bytes:
            self.waves.append(wave := Wave())
        wave.nbytes += dst.nbytes
        self.last[spec.name] = len(self.waves) - 1
        if not self._add(wave, piece, spec, dst, box):
            wave.far_bytes += dst.nbytes

    def _add(self, wave: Wave, piece: Piece, spec: Spec, dst: Tensor, box: Box) -> bool:
        """Whether both ends lie in one GPU's memory."""
        if piece.src == self.rank:
            part = next(part for part in self.own[spec.name] if part.box.intersect(box) == box)
            return wave.add_own(OwnCopy(spec.name, piece.box, box, dst, part.tensor[box.within(part.box)]))
        opened = self.imports[piece.src]
        held, place = next(
            (held, place)
            for held, place in zip(
                self.facts[piece.src][spec.name].boxes, opened.exports.places[spec.name], strict=True
            )
            if held.intersect(box) == box
        )
        inner = tuple(o - base for o, base in zip(box.offsets, held.offsets, strict=True))
        element = sum(o * stride for o, stride in zip(inner, place.strides, strict=True))
        dtype = torch_dtype(self.facts[piece.src][spec.name].spec.dtype)
        return self._add_imported(wave, opened, place, element, dtype, dst, box)

    @staticmethod
    def _add_imported(
        wave: Wave, opened: Import, place: Place, element: int, dtype: torch.dtype, dst: Tensor, box: Box
    ) -> bool:
        """element: the first one's number, from the place's. dtype: the source's."""
        if isinstance(opened, SharedImport):  # where it has been cast
            memory, offset = opened.memory[place.allocation], place.offset + element * dst.itemsize
            wave.host.add(dst, view_of(memory, offset, dst.dtype, box.sizes, place.strides))
            return False
        address = opened.addresses[place.allocation] + place.offset + element * dtype.itemsize
        if dtype != dst.dtype:
            pieces = cast_pieces(dst, address, place.strides, CASTS[dtype, dst.dtype])
            if opened.near:
                wave.near.cast += pieces
            else:
                wave.cast_far += pieces
            return opened.near
        runs = address_runs(dst, place.strides, address)
        if dst.device.type == "cpu":
            wave.down += runs
        elif opened.near:
            wave.near.runs += runs
        else:
            wave.far += runs
        return opened.near and dst.device.type != "cpu"


def compile_peer(
    plan: PeerPlan,
    rank: int,
    *,
    facts: Mapping[int, Facts],
    imports: Mapping[int, Import],
    own: Mapping[str, Sequence[Part]],
    target: Target | None,
    staging: Staging,
    sent: Sequence[Entry] = (),
    wave_bytes: int = WAVE_BYTES,
) -> CompiledPeer:
    """This rank's copies; none on a rank that only trains.

    facts: of the trainer ranks. imports: their memory, mapped here. own: the parts that this process itself
    sends. sent: what it digests of them, what it copies itself as it is copied. Tensors with hooks are put
    together in staging memory, in turns, and of each only the elements that its hook is known to take.
    """
    if target is None:
        return CompiledPeer(waves=[], whole={}, last={}, sent=sent)
    compiler = _Compiler(rank, facts, imports, own, wave_bytes)
    hooked: dict[str, list[Piece]] = {wire: [] for wire in target.hooks}
    for piece in plan.copies[rank]:
        spec = plan.specs[piece.tensor]
        if spec.name in hooked:
            hooked[spec.name].append(piece)
            continue
        for dst, box in target.writes(spec.name, piece.box):
            compiler.add(piece, spec, dst, box)
    whole = _place_whole(target, staging)
    for wire, pieces in hooked.items():
        spec = target.specs[wire]
        compiler.waves.append(Wave())
        for piece in pieces:
            dst = whole[wire][piece.box.within(Box.whole(spec.shape))]
            compiler.add(piece, spec, dst, piece.box)
        compiler.waves[-1].wire = wire
        compiler.waves[-1].to_host = target.hooks[wire].to_host
        compiler.last[wire] = len(compiler.waves) - 1
    sent = copied_by_digests(compiler.waves, sent)
    for wave in compiler.waves:
        wave.seal(staging.device)
    return CompiledPeer(waves=compiler.waves, whole=whole, last=compiler.last, sent=sent)


def _place_whole(target: Target, staging: Staging) -> dict[str, Tensor]:
    """For each tensor with a hook its place in staging memory, which it shares with every second other."""
    specs = [target.specs[wire] for wire in target.hooks]
    room = -(-max((spec.nbytes for spec in specs), default=0) // 16) * 16
    arena = staging.arena(HOOK_SLOTS * room)
    return {
        spec.name: arena[i % HOOK_SLOTS * room :][: spec.nbytes].view(torch_dtype(spec.dtype)).view(spec.shape)
        for i, spec in enumerate(specs)
    }


class Peer:
    """One rank's execution of one plan: a server rank copies, a trainer rank digests what it has."""

    def __init__(
        self, compiled: CompiledPeer, lanes: Lanes, hooks: Mapping[str, Hook], sent: Ledger, live: Ledger
    ) -> None:
        self.compiled, self.lanes, self.hooks = compiled, lanes, hooks
        self.sent, self.live = sent, live
        self.wrote = False

    def run(
        self,
        seed: bytes | None,
        *,
        check: Callable[[], None],
        progress: Callable[[int], None],
        meanwhile: Callable[[], None] = lambda: None,
        after: Mark = None,
        pause_s: float = 0.0,
    ) -> None:
        """Copy and install everything; returns once it is in place. Arguments as of ``Broadcast.run``.

        The sources are complete: their ranks have waited for that before they said that they were ready.
        """
        lanes = self.lanes
        if self.compiled.waves or seed:  # else this rank leaves the GPU to the one that copies
            lanes.begin(after)
        try:
            if seed:
                with lanes.digest:
                    self.sent.launch(0, seed)
            ended: list[list[Mark]] = []
            hooked: list[Mark] = []
            for index, wave in enumerate(self.compiled.waves):
                check()
                if len(hooked) >= HOOK_SLOTS:
                    lanes.send.after(hooked[-HOOK_SLOTS])
                    lanes.pack.after(hooked[-HOOK_SLOTS])
                self.wrote = True
                marks = wave.start(lanes, partial(self.sent.launch, (index,), seed) if seed else None)
                if wave.wire:
                    # Of earlier waves, too: what a hook may write over has to be there before it writes.
                    for lane in (lanes.send, lanes.pack):
                        lanes.install.after(lane.mark())
                    with lanes.install:
                        self._install(wave.wire, seed)
                    hooked.append(lanes.install.mark())
                    marks = [hooked[-1]]
                ended.append(marks)
                if wave.to_host:
                    for mark in marks:
                        wait_for(mark, check)
                if seed:
                    with lanes.digest:
                        for mark in marks:
                            lanes.digest.after(mark)
                        self.live.launch(index, seed)
                if not lanes.overlap:
                    progress(wave.nbytes)
            if seed:
                self.sent.prepare(seed)
                self.live.prepare(seed)
            meanwhile()
            if lanes.overlap:
                for wave, marks in zip(self.compiled.waves, ended, strict=True):
                    for mark in marks:
                        wait_for(mark, check, pause_s=pause_s)
                    progress(wave.nbytes)
        except BaseException:
            lanes.end()
            raise

    def _install(self, name: str, seed: bytes | None) -> None:
        if seed:
            self.live.launch(name, seed)
        self.hooks[name].run(self.compiled.whole[name])
