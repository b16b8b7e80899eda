"""The peer route: each server rank copies what it wants out of the trainer ranks' memory on its own host.

The destination's process does all of the copying, so that a process that is stopped or killed writes nothing
into another's memory. No decisions are made here: the plan is compiled to waves of copies and replayed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightbus.box import Box
from weightbus.bucket import Copies, Staging, torch_dtype
from weightbus.driver import EngineCopies
from weightbus.errors import UpdateError
from weightbus.exports import Place
from weightbus.facts import Facts
from weightbus.install import Hook, Target
from weightbus.ipc import DeviceImport, SharedImport, view_of
from weightbus.kernel_copies import KernelCopies
from weightbus.layout import Part
from weightbus.peer_plan import PeerPlan, Piece
from weightbus.runs import Run, runs_of
from weightbus.spec import Spec

# Bytes that are queued together: enough to hide the host's work, few enough that an end is noticed soon.
WAVE_BYTES = 1 << 30
# Waves that are queued at a time.
IN_FLIGHT = 2
# What was queued when an update ends must be done before the rank says how it stands: this long at most.
DRAIN_S = 30.0


@dataclass(slots=True)
class Wave:
    """Copies that are started together. hook: to run when they are done; wire: the tensor that it takes."""

    nbytes: int = 0
    host: Copies = field(default_factory=Copies)
    near: list[Run] = field(default_factory=list)
    far: list[Run] = field(default_factory=list)
    queued: list[EngineCopies | KernelCopies] = field(default_factory=list)
    wire: str = ""

    def seal(self, device: torch.device) -> None:
        """Prepare what the device's copies need."""
        if self.near:
            try:
                self.queued.append(KernelCopies(self.near, device))
            except ImportError:
                self.far = self.near + self.far
        if self.far:
            self.queued.append(EngineCopies(self.far))
        self.near, self.far = [], []

    def start(self, stream: torch.cuda.Stream | None) -> None:
        self.host.run()
        for copies in self.queued:
            assert stream is not None
            copies.start(stream)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledPeer:
    """One server rank's waves, and for each tensor with a hook the whole tensor that the hook takes."""

    waves: list[Wave]
    whole: dict[str, Tensor]


class _Compiler:
    """Turns pieces into copies from wherever their sources lie."""

    def __init__(
        self,
        rank: int,
        facts: Mapping[int, Facts],
        imports: Mapping[int, DeviceImport | SharedImport],
        own: Mapping[str, Sequence[Part]],
        wave_bytes: int,
    ) -> None:
        self.rank, self.facts, self.imports, self.own, self.wave_bytes = rank, facts, imports, own, wave_bytes
        self.waves = [Wave()]

    def add(self, piece: Piece, spec: Spec, dst: Tensor, box: Box) -> None:
        """``box``, inside the piece's, to ``dst``, which has its shape."""
        wave = self.waves[-1]
        if wave.nbytes >= self.wave_bytes:
            self.waves.append(wave := Wave())
        wave.nbytes += dst.nbytes
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
        offset = sum(o * stride for o, stride in zip(inner, place.strides, strict=True)) * dst.itemsize
        self._add_imported(wave, opened, place, place.offset + offset, dst, box)

    def _add_own(self, wave: Wave, name: str, dst: Tensor, box: Box) -> None:
        part = next(part for part in self.own[name] if part.box.intersect(box) == box)
        src = part.tensor[box.within(part.box)]
        if dst.device.type == "cpu" or src.device != dst.device:
            wave.host.add(dst, src)
        else:
            wave.near += _runs(dst, box, src.stride(), src.data_ptr())

    @staticmethod
    def _add_imported(
        wave: Wave, opened: DeviceImport | SharedImport, place: Place, offset: int, dst: Tensor, box: Box
    ) -> None:
        if isinstance(opened, SharedImport):
            memory = opened.memory[place.allocation]
            wave.host.add(dst, view_of(memory, offset, dst.dtype, box.sizes, place.strides))
            return
        runs = _runs(dst, box, place.strides, opened.addresses[place.allocation] + offset)
        if opened.near:
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
    imports: Mapping[int, DeviceImport | SharedImport],
    own: Mapping[str, Sequence[Part]],
    target: Target | None,
    staging: Staging,
    device: torch.device,
    wave_bytes: int = WAVE_BYTES,
) -> CompiledPeer:
    """This rank's copies. facts: of the trainer ranks. own: the parts that this process itself sends.

    Tensors with hooks are put together in one place of the staging memory, one after the other, and of
    those only the elements that the hook is known to take.
    """
    if target is None:
        return CompiledPeer(waves=[], whole={})
    compiler = _Compiler(rank, facts, imports, own, wave_bytes)
    hooked: dict[str, list[Piece]] = {wire: [] for wire in target.hooks if wire in target.specs}
    for piece in plan.copies.get(rank, ()):
        spec = plan.specs[piece.tensor]
        if spec.name in hooked:
            hooked[spec.name].append(piece)
            continue
        for dst, box in target.writes(spec.name, piece.box):
            compiler.add(piece, spec, dst, box)
    arena = staging.arena(max((target.specs[wire].nbytes for wire in hooked), default=0))
    whole: dict[str, Tensor] = {}
    for wire, pieces in hooked.items():
        spec = target.specs[wire]
        compiler.waves.append(Wave(wire=wire))
        whole[wire] = arena[: spec.nbytes].view(torch_dtype(spec.dtype)).view(spec.shape)
        for piece in pieces:
            dst = whole[wire][piece.box.within(Box.whole(spec.shape))]
            compiler.add(piece, spec, dst, piece.box)
    for wave in compiler.waves:
        wave.seal(device)
    return CompiledPeer(waves=[wave for wave in compiler.waves if wave.nbytes or wave.wire], whole=whole)


class Peer:
    """One server rank's execution of one plan; a trainer rank has nothing to run."""

    def __init__(self, compiled: CompiledPeer, device: torch.device, hooks: Mapping[str, Hook]) -> None:
        self.compiled, self.device, self.hooks = compiled, device, hooks
        self.wrote = False

    def run(
        self,
        check: Callable[[], None],
        arrived: Callable[[str], None],
        progress: Callable[[int], None],
    ) -> None:
        """Copy and install everything; on CUDA on the current stream.

        Whatever happens, nothing that was queued here is still running when it returns or raises.
        check: raises once the update has ended elsewhere. arrived: a tensor with a hook is whole, and its
        hook runs next. progress: told the bytes of each finished wave.
        """
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        pending: deque[tuple[torch.cuda.Event | None, int]] = deque()
        try:
            for wave in self.compiled.waves:
                if len(pending) >= IN_FLIGHT:
                    _wait(pending, check, progress)
                check()
                self.wrote = True
                wave.start(stream)
                if wave.wire:
                    arrived(wave.wire)
                    self.hooks[wave.wire].run(self.compiled.whole[wave.wire])
                pending.append((stream.record_event() if stream else None, wave.nbytes))
            while pending:
                _wait(pending, check, progress)
        finally:
            _drain(stream)


def _wait(
    pending: deque[tuple[torch.cuda.Event | None, int]],
    check: Callable[[], None],
    progress: Callable[[int], None],
) -> None:
    event, nbytes = pending.popleft()
    while event is not None and not event.query():
        check()
    progress(nbytes)


def _drain(stream: torch.cuda.Stream | None) -> None:
    """Wait until all that was queued on ``stream`` is done. Raises UpdateError if that takes too long."""
    deadline = time.monotonic() + DRAIN_S
    while stream is not None and not stream.query():
        if time.monotonic() > deadline:
            raise UpdateError(f"peer copies: expected them to end within {DRAIN_S:.0f} s")
