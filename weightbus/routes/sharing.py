"""One rank's part in the exchange of memory for a plan: what it lets others read, and what it has mapped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from weightbus.errors import UpdateError, WeightbusError
from weightbus.memory.cuda_copy import why_no_kernel
from weightbus.memory.export import Export, Parts, device_id
from weightbus.memory.ipc import Import, export_parts, import_exports
from weightbus.memory.streams import Mark, wait_for
from weightbus.planning.exports import Exports, Reach, encode_exports
from weightbus.planning.peer_plan import PeerPlan
from weightbus.tensors.bucket import torch_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a trainer rank has seen of its export in an update. gone: readers would see other memory.

    filled: reached once the source is complete.
    """

    gone: bool
    filled: Mark


class Sharing:
    """Kept with a plan of the peer route, and closed with it.

    asked: the publisher's route, the same on all ranks. both: this process is a trainer and a server rank.
    """

    def __init__(self, device: torch.device, asked: str, *, both: bool) -> None:
        self.device, self.asked, self.both = device, asked, both
        self.imports: dict[int, Import] = {}
        self._export: Export | None = None
        self._read: dict[str, torch.dtype] = {}  # what others copy, as they want it

    def export(self, parts: Parts) -> bytes:
        """A trainer rank's exports of its parts, or the reason why there are none."""
        if self.asked not in ("auto", "peer"):
            return b""
        if self.asked == "auto" and self.device.type == "cpu" and not self.both:
            reason = "on the CPU a peer copy needs a second copy of the source, so it must be asked for"
            return encode_exports(Exports(reason=reason))
        try:
            self._export = export_parts(parts, self.device)
        except WeightbusError as error:
            return encode_exports(Exports(reason=str(error)))
        return encode_exports(self._export.exports)

    def reach(self, sources: Mapping[int, Exports], rank: int, *, to_host: bool) -> bytes:
        """Map the memory of all trainer ranks but ``rank``, the own one, and say whether that can be done.

        to_host: whether something of this rank's target lies in the host's memory.
        """
        if self.asked not in ("auto", "peer"):
            return b""
        try:
            for source, exports in sources.items():
                if source != rank:
                    self.imports[source] = import_exports(exports, self.device)
        except WeightbusError as error:
            return encode_exports(Reach(reason=str(error)))
        no_cast = _no_cast(self.device, to_host=to_host)
        return encode_exports(Reach(device=device_id(self.device), no_cast=no_cast))

    def follow(self, plan: PeerPlan, rank: int) -> None:
        """From now on ``ready`` makes ready what ``plan`` lets others copy, all of whom have mapped it."""
        if self._export is not None:
            self._export.opened()
        read = (
            plan.specs[piece.tensor]
            for reader, pieces in plan.copies.items()
            for piece in pieces
            if piece.src == rank and reader != rank
        )
        self._read = {spec.name: torch_dtype(spec.dtype) for spec in read}

    def look(self, filled: Mark = None) -> Look:
        """The first half of ``ready``, while there is time: the source's state, and when it is complete.

        filled: when it is, if that is known; else once the current stream has done what it was given.
        """
        if self._export is None:
            return Look(gone=False, filled=None)
        if filled is None and self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            # An event would be the GPU's to reach, which may be at another process's work.
            filled = None if stream.query() else stream.record_event()
        return Look(gone=self._export.moved(), filled=filled)

    def ready(self, look: Look, timeout_s: float) -> bool:
        """Make what others are about to read complete; False where they would read what is no longer there.

        Raises UpdateError if the source's own stream takes longer.
        """
        if look.gone:
            return False
        if self._export is None:
            return True
        self._export.pack(self._read)
        deadline = time.monotonic() + timeout_s

        def check() -> None:
            if time.monotonic() > deadline:
                raise UpdateError(f"source: expected its stream to be done within {timeout_s:.0f} s")

        wait_for(look.filled, check)
        return True

    def close(self) -> None:
        """Give back every mapping, and end the export."""
        export, self._export = self._export, None
        imports, self.imports = self.imports, {}
        if export is not None:
            export.close()
        for held in imports.values():
            held.close()


def _no_cast(device: torch.device, *, to_host: bool) -> str:
    """Why this rank can't cast what it copies; empty if it can. On the CPU the owner does so."""
    if device.type == "cpu":
        return ""
    if to_host:
        return "what lies in host memory is copied to by the driver, which does not cast"
    return why_no_kernel(device)
