"""Waves of the peer route: copies that start together, and which of them the source's digests do on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from weightbus.digest import why_not_copied
from weightbus.digest.ledger import Entry
from weightbus.memory.copy_descriptors import CASTS, cast_pieces
from weightbus.memory.copy_descriptors import Piece as CastPiece
from weightbus.memory.cuda_copy import CudaCopies, why_no_kernel
from weightbus.memory.driver import EngineCopies
from weightbus.memory.kernel_copies import KernelCopies
from weightbus.memory.streams import Lane, Lanes, Mark
from weightbus.memory.torch_copy import Copies
from weightbus.memory.warn_once import say_once
from weightbus.planning.box import Box
from weightbus.planning.runs import Run, runs_of

# A copy engine takes some microseconds for each of these, and a kernel hardly longer for all of them.
SMALL_BYTES = 256 << 10


class OwnCopy(NamedTuple):
    """Of what this process holds itself: ``box`` of a tensor, and the box of the plan's piece around it."""

    name: str
    piece: Box
    box: Box
    dst: Tensor
    src: Tensor


@dataclass(slots=True)
class Near:
    """Copies within one GPU's memory, by addresses. cast: those that a kernel casts on the way."""

    runs: list[Run] = field(default_factory=list)
    cast: list[CastPiece] = field(default_factory=list)
    by_kernel: KernelCopies | None = None
    by_cast: CudaCopies | None = None

    def __bool__(self) -> bool:
        return bool(self.by_kernel or self.by_cast)

    def add(self, dst: Tensor, src: Tensor) -> None:
        """Of one device, and of equal dtypes or of two in ``CASTS``."""
        if src.dtype == dst.dtype:
            self.runs += address_runs(dst, src.stride(), src.data_ptr())
        else:
            self.cast += cast_pieces(dst, src.data_ptr(), src.stride(), CASTS[src.dtype, dst.dtype])

    def seal(self, device: torch.device) -> list[Run]:
        """Prepare the kernels. Returns what is left to copy engines, where they can't be had."""
        left: list[Run] = []
        if self.runs:
            try:
                self.by_kernel = KernelCopies(self.runs, device)
            except ImportError as error:
                say_once(f"peer copies within a GPU by the driver alone, exact but slower: {error}")
                left = self.runs
        if self.cast:
            self.by_cast = CudaCopies(self.cast, device, share=1)
        self.runs, self.cast = [], []
        return left

    def start(self, lane: Lane) -> None:
        """In ``lane``, which is entered."""
        if self.by_kernel is not None:
            self.by_kernel.start(lane.stream)
        if self.by_cast is not None:
            self.by_cast.run()


@dataclass(slots=True)
class Wave:
    """Copies that are started together. wire: the tensor that they make whole, if its hook is to run then.

    far_bytes: of ``nbytes``, those that don't come out of the same GPU's memory. host: between tensors, by
    torch. near, far, down: by addresses, within a GPU, from another, and from one to host memory. cast_far:
    from another GPU, by a kernel that casts on the way. own: within this process and a GPU, until it is sealed.
    proved: those of them that digests of the source do, if there are any. to_host: whether the host reads what
    it brings, and waits for it first.
    """

    nbytes: int = 0
    far_bytes: int = 0
    host: Copies = field(default_factory=Copies)
    near: Near = field(default_factory=Near)
    proved: Near = field(default_factory=Near)
    far: list[Run] = field(default_factory=list)
    down: list[Run] = field(default_factory=list)
    cast_far: list[CastPiece] = field(default_factory=list)
    own: list[OwnCopy] = field(default_factory=list)
    by_engine: list[EngineCopies] = field(default_factory=list)
    by_far_cast: CudaCopies | None = None
    wire: str = ""
    to_host: bool = False

    def add_own(self, copy: OwnCopy) -> bool:
        """Whether both ends lie in one GPU's memory."""
        dst, src = copy.dst, copy.src
        cast = (src.dtype, dst.dtype) in CASTS and not why_no_kernel(dst.device)
        if dst.device.type != "cpu" and src.device == dst.device and (src.dtype == dst.dtype or cast):
            self.own.append(copy)
            return True
        self.host.add(dst, src)
        return False

    def seal(self, device: torch.device) -> None:
        """Prepare what the device's copies need: the engines for what comes from another GPU, since they
        leave its multiprocessors alone, and one kernel for the rest."""
        for copy in self.own:
            self.near.add(copy.dst, copy.src)
        self.near.runs += [run for run in self.far if run.nbytes <= SMALL_BYTES]
        by_engine = [run for run in self.far if run.nbytes > SMALL_BYTES]
        by_engine = self.near.seal(device) + by_engine
        if self.proved.seal(device):
            raise ImportError("no kernel that copies, although there is one that digests")
        if by_engine:
            self.by_engine.append(EngineCopies(by_engine))
        if self.down:
            self.by_engine.append(EngineCopies(self.down, to_host=True))
        if self.cast_far:
            self.by_far_cast = CudaCopies(self.cast_far, device)
        self.to_host |= bool(self.down) or self.host.to_host
        self.own, self.far, self.down, self.cast_far = [], [], [], []

    def start(self, lanes: Lanes, digest: Callable[[], object] | None = None) -> list[Mark]:
        """All are reached once all is copied. What comes over the link, and what lies here, go side by side:
        neither waits for the other's part of an earlier wave. digest: starts the digests that copy."""
        marks: list[Mark] = []
        if self.host or self.by_engine or self.by_far_cast:
            with lanes.send:
                self.host.run()
                for copies in self.by_engine:
                    copies.start(lanes.send.stream)
                if self.by_far_cast is not None:
                    self.by_far_cast.run()
            marks.append(lanes.send.mark())
        if self.near or self.proved:
            with lanes.pack:
                if self.proved and digest is not None:
                    digest()
                else:
                    self.proved.start(lanes.pack)
                self.near.start(lanes.pack)
            marks.append(lanes.pack.mark())
        return marks


def copied_by_digests(waves: Sequence[Wave], sent: Sequence[Entry]) -> list[Entry]:
    """The entries, those with copies and a stage of their own that are copied as they are digested: read once.

    Such copies go from ``own`` to ``proved``. Where a digest reads, and what that weighs, is its entry's, and
    follows from the layout; it takes no address from a copy but the one to write to.
    """
    own: dict[tuple[str, Box], list[tuple[Wave, int, OwnCopy]]] = {}
    for index, wave in enumerate(waves):
        for copy in () if wave.wire else wave.own:
            own.setdefault((copy.name, copy.piece), []).append((wave, index, copy))
    found, taken = [], set[int]()
    for entry in sent:
        placed = own.get((entry.part.spec.name, entry.part.box), [])
        copies = tuple((copy.box, copy.dst) for _, _, copy in placed)
        stages = {(index,) for _, index, _ in placed}
        if len(stages) == 1 and not why_not_copied(entry.part, copies):
            for wave, _, copy in own.pop((entry.part.spec.name, entry.part.box)):
                wave.proved.add(copy.dst, copy.src)
                taken.add(id(copy))
            entry = replace(entry, stage=stages.pop(), copies=copies)
        found.append(entry)
    for wave in waves:
        wave.own = [copy for copy in wave.own if id(copy) not in taken]
    return found


def address_runs(dst: Tensor, strides: Sequence[int], address: int) -> list[Run]:
    """What copies a box at ``address``, of ``strides`` in elements, into all of ``dst``; in whole addresses."""
    return runs_of(dst.shape, dst.stride(), strides, itemsize=dst.itemsize, dst=dst.data_ptr(), src=address)
