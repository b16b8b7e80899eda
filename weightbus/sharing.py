"""One rank's part in the exchange of memory for a plan: what it lets others read, and what it has mapped."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from weightbus.errors import UpdateError, WeightbusError
from weightbus.exports import Exports, Reach, encode_exports
from weightbus.ipc import Export, Import, Parts, export_parts, import_exports
from weightbus.lanes import Mark, wait_for
from weightbus.peer_plan import PeerPlan


class Sharing:
    """Kept with a plan of the peer route, and closed with it.

    asked: the publisher's route, the same on all ranks. both: this process is a trainer and a server rank.
    """

    def __init__(self, device: torch.device, asked: str, *, both: bool) -> None:
        self.device, self.asked, self.both = device, asked, both
        self.imports: dict[int, Import] = {}
        self._export: Export | None = None
        self._read: frozenset[str] = frozenset()
        self._gone: bool | None = None

    def export(self, parts: Parts) -> bytes:
        """A trainer rank's exports of its parts, or the reason why there are none."""
        if self.asked == "broadcast":
            return b""
        if self.asked == "auto" and self.device.type == "cpu" and not self.both:
            reason = "on the CPU a peer copy needs a second copy of the source, so it must be asked for"
            return encode_exports(Exports(reason=reason))
        try:
            self._export = export_parts(parts, self.device)
        except WeightbusError as error:
            return encode_exports(Exports(reason=str(error)))
        return encode_exports(self._export.exports)

    def reach(self, sources: Mapping[int, Exports], rank: int) -> bytes:
        """Map the memory of all trainer ranks but ``rank``, the own one, and say whether that can be done."""
        if self.asked == "broadcast":
            return b""
        try:
            for source, exports in sources.items():
                if source != rank:
                    self.imports[source] = import_exports(exports, self.device)
        except WeightbusError as error:
            return encode_exports(Reach(reason=str(error)))
        return encode_exports(Reach())

    def follow(self, plan: PeerPlan, rank: int) -> None:
        """From now on ``ready`` makes ready what ``plan`` lets others copy from this rank."""
        self._read = frozenset(
            plan.specs[piece.tensor].name
            for reader, pieces in plan.copies.items()
            for piece in pieces
            if piece.src == rank and reader != rank
        )

    def look(self) -> None:
        """Notice now, while there is time, whether what was exported is gone; the next ``ready`` says so."""
        self._gone = self._export is not None and self._export.moved()

    def ready(self, timeout_s: float, filled: Mark) -> bool:
        """Make what others are about to read complete; False where they would read what is no longer there.

        filled: when it is, if that is known; else once the current stream has done what it was given.
        Raises UpdateError if the source's own stream takes longer.
        """
        if self._export is None:
            return True
        gone, self._gone = self._gone, None
        if self._export.moved() if gone is None else gone:
            return False
        self._export.pack(self._read)
        if self.device.type == "cuda":
            deadline = time.monotonic() + timeout_s

            def check() -> None:
                if time.monotonic() > deadline:
                    raise UpdateError(f"source: expected its stream to be done within {timeout_s:.0f} s")

            if filled is None:
                filled = torch.cuda.current_stream(self.device).record_event()
            wait_for(filled, check)
        return True

    def close(self) -> None:
        """Give back every mapping, and end the export."""
        export, self._export = self._export, None
        imports, self.imports = self.imports, {}
        if export is not None:
            export.close()
        for held in imports.values():
            held.close()
