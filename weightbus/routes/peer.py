"""The peer route: each server rank copies what it wants out of the trainer ranks' memory on its own host.

The destination's process does all of the copying, so that a process that is stopped or killed writes nothing
into another's memory. No decisions are made here: the plan is compiled to waves of copies and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightbus.digest.ledger import Ledger
from weightbus.memory.copy_descriptors import CASTS, cast_pieces
from weightbus.memory.copy_descriptors import Piece as CastPiece
from weightbus.memory.cuda_copy import CudaCopies, why_no_kernel
from weightbus.memory.driver import EngineCopies
from weightbus.memory.ipc import Import
from weightbus.memory.kernel_copies import KernelCopies
from weightbus.memory.shared_memory import SharedImport, view_of
from weightbus.memory.streams import Lanes, Mark, wait_for
from weightbus.memory.torch_copy import Copies
from weightbus.memory.warn_once import say_once
from weightbus.planning.box import Box
from weightbus.planning.exports import Place
from weightbus.planning.facts import Facts
from weightbus.planning.peer_plan import PeerPlan, Piece
from weightbus.planning.runs import Run, runs_of
from weightbus.planning.spec import Spec
from weightbus.tensors.bucket import Staging, torch_dtype
from weightbus.tensors.install import Target
from weightbus.tensors.layout import Part
from weightbus.tensors.loaders.hook import Hook

# Bytes of a wave. What has come is digested while the next waves are under way, and the last one's digest
# is all that the proof adds to the time.
WAVE_BYTES = 1 << 30

# A copy engine takes some microseconds for each of these, and a kernel hardly longer for all of them.
SMALL_BYTES = 256 << 10

# Tensors with hooks that are under way: one is put together while another's hook runs.
HOOK_SLOTS = 2


@dataclass(slots=True)
class Wave:
    """Copies that are started together. wire: the tensor that they make whole, if its hook is to run then.

    host: between tensors, by torch. near, far, down: by addresses, within a GPU, from another, and from one to
    host memory. cast, cast_far: those that a kernel casts on the way. to_host: whether the host reads what it
    brings, and waits for it first.
    """

    nbytes: int = 0
    host: Copies = field(default_factory=Copies)
    near: list[Run] = field(default_factory=list)
    far: list[Run] = field(default_factory=list)
    down: list[Run] = field(default_factory=list)
    cast: list[CastPiece] = field(default_factory=list)
    cast_far: list[CastPiece] = field(default_factory=list)
    by_engine: list[EngineCopies] = field(default_factory=list)
    by_kernel: KernelCopies | None = None
    by_cast: CudaCopies | None = None
    by_far_cast: CudaCopies | None = None
    wire: str = ""
    to_host: bool = False

    def seal(self, device: torch.device) -> None:
        """Prepare what the device's copies need: the engines for what comes from another GPU, since they
        leave its multiprocessors alone, and one kernel for the rest."""
        by_kernel = self.near + [run for run in self.far if run.nbytes <= SMALL_BYTES]
        by_engine = [run for run in self.far if run.nbytes > SMALL_BYTES]
        if by_kernel:
            try:
                self.by_kernel = KernelCopies(by_kernel, device)
            except ImportError as error:
                say_once(f"peer copies within a GPU by the driver alone, exact but slower: {error}")
                by_engine = by_kernel + by_engine
        if by_engine:
            self.by_engine.append(EngineCopies(by_engine))
        if self.down:
            self.by_engine.append(EngineCopies(self.down, to_host=True))
        if self.cast:
            self.by_cast = CudaCopies(self.cast, device, share=1)
        if self.cast_far:
            self.by_far_cast = CudaCopies(self.cast_far, device)
        self.to_host |= bool(self.down) or self.host.to_host
        self.near, self.far, self.down, self.cast, self.cast_far = [], [], [], [], []

    def start(self, lanes: Lanes) -> list[Mark]:
        """All are reached once all is copied. What comes over the link, and what lies here, go side by side:
        neither waits for the other's part of an earlier wave."""
        marks: list[Mark] = []
        if self.host or self.by_engine or self.by_far_cast:
            with lanes.send:
                self.host.run()
                for copies in self.by_engine:
                    copies.start(lanes.send.stream)
                if self.by_far_cast is not None:
                    self.by_far_cast.run()
            marks.append(lanes.send.mark())
        if self.by_kernel or self.by_cast:
            with lanes.pack:
                if self.by_kernel is not None:
                    self.by_kernel.start(lanes.pack.stream)
                if self.by_cast is not None:
                    self.by_cast.run()
            marks.append(lanes.pack.mark())
        return marks


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledPeer:
    """One server rank's waves. whole: for each tensor with a hook, the whole tensor that the hook will take.
    last: for each tensor that is copied, the wave that brings the last of it."""

    waves: list[Wave]
    whole: dict[str, Tensor]
    last: dict[str, int]


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
        if wave.nbytes >= self.wave_bytes:
            self.waves.append(wave := Wave())
        wave.nbytes += dst.nbytes
        self.last[spec.name] = len(self.waves) - 1
        if piece.src == self.rank:
            self._add_own(wave, spec.name, dst, box)
            return
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
        self._add_imported(wave, opened, place, element, dtype, dst, box)

    def _add_own(self, wave: Wave, name: str, dst: Tensor, box: Box) -> None:
        part = next(part for part in self.own[name] if part.box.intersect(box) == box)
        src = part.tensor[box.within(part.box)]
        if dst.device.type == "cpu" or src.device != dst.device:
            wave.host.add(dst, src)
        elif src.dtype == dst.dtype:
            wave.near += _runs(dst, box, src.stride(), src.data_ptr())
        elif (src.dtype, dst.dtype) in CASTS and not why_no_kernel(dst.device):
            wave.cast += cast_pieces(dst, src.data_ptr(), src.stride(), CASTS[src.dtype, dst.dtype])
        else:
            wave.host.add(dst, src)

    @staticmethod
    def _add_imported(
        wave: Wave, opened: Import, place: Place, element: int, dtype: torch.dtype, dst: Tensor, box: Box
    ) -> None:
        """element: the first one's number, from the place's. dtype: the source's."""
        if isinstance(opened, SharedImport):  # where it has been cast
            memory, offset = opened.memory[place.allocation], place.offset + element * dst.itemsize
            wave.host.add(dst, view_of(memory, offset, dst.dtype, box.sizes, place.strides))
            return
        address = opened.addresses[place.allocation] + place.offset + element * dtype.itemsize
        if dtype != dst.dtype:
            pieces = cast_pieces(dst, address, place.strides, CASTS[dtype, dst.dtype])
            if opened.near:
                wave.cast += pieces
            else:
                wave.cast_far += pieces
            return
        runs = _runs(dst, box, place.strides, address)
        if dst.device.type == "cpu":
            wave.down += runs
        elif opened.near:
            wave.near += runs
        else:
            wave.far += runs


def _runs(dst: Tensor, box: Box, strides: Sequence[int], address: int) -> list[Run]:
    return runs_of(box.sizes, dst.stride(), strides, itemsize=dst.itemsize, dst=dst.data_ptr(), src=address)


def compile_peer(
    plan: PeerPlan,
    rank: int,
    *,
    facts: Mapping[int, Facts],
    imports: Mapping[int, Import],
    own: Mapping[str, Sequence[Part]],
    target: Target | None,
    staging: Staging,
    wave_bytes: int = WAVE_BYTES,
) -> CompiledPeer:
    """This rank's copies; none on a rank that only trains.

    facts: of the trainer ranks. imports: their memory, mapped here. own: the parts that this process itself
    sends. Tensors with hooks are put together in staging memory, in turns, and of each only the elements that
    its hook is known to take.
    """
    if target is None:
        return CompiledPeer(waves=[], whole={}, last={})
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
    for wave in compiler.waves:
        wave.seal(staging.device)
    return CompiledPeer(waves=compiler.waves, whole=whole, last=compiler.last)


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
                marks = wave.start(lanes)
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
