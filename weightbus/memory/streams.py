"""CUDA streams on which the parts of a transfer overlap; on the CPU, the host does them one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

# An event of CUDA, or None: on the CPU, what was asked for is done.
Mark = Any


class Lane:
    """Runs what is put into it in order, after what it was told to wait for."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self.stream: Any = None
        self._entered: list[Any] = []
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Lane:
        if self.stream is not None:
            context = torch.cuda.stream(self.stream)
            context.__enter__()  # type: ignore[no-untyped-call]
            self._entered.append(context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.stream is not None:
            self._entered.pop().__exit__(kind, error, trace)

    def after(self, mark: Mark) -> None:
        """What follows in this lane waits for ``mark``."""
        if mark is not None and self.stream is not None:
            self.stream.wait_event(mark)

    def mark(self) -> Mark:
        """Reached once all that was put in has been done."""
        return self.stream.record_event() if self.stream is not None else None


class Lanes:
    """What a rank does at once: fill buckets, send, install, digest. Made once, used by every update."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # The link is what has to be kept busy, then what it waits for.
        self.pack, self.send = Lane(device, -1), Lane(device, -2)
        self.install, self.digest = Lane(device, -1), Lane(device)
        self._all = (self.pack, self.send, self.install, self.digest)

    @property
    def overlap(self) -> bool:
        """Whether lanes run beside the host."""
        return self.device.type == "cuda"

    def begin(self, after: Mark = None) -> None:
        """All lanes wait for the current stream, and for ``after``."""
        if self.overlap:
            now = torch.cuda.current_stream(self.device).record_event()
            for lane in self._all:
                lane.stream.wait_event(now)
                lane.after(after)

    def end(self) -> None:
        """The current stream waits for all lanes: after a failure, when the host has not waited for them."""
        if self.overlap:
            current = torch.cuda.current_stream(self.device)
            for lane in self._all:
                current.wait_stream(lane.stream)

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is under way, as nothing may be written late; False if that takes longer."""
        deadline = time.monotonic() + timeout_s
        marks = [lane.mark() for lane in self._all]
        for mark in marks:
            wait_for(mark, lambda: None, until=deadline)
        return all(mark is None or mark.query() for mark in marks)


def wait_for(
    mark: Mark, check: Callable[[], None], *, pause_s: float = 0.0, until: float | None = None
) -> None:
    """The host waits for ``mark``, calling ``check``. pause_s: left to other threads between two looks."""
    while mark is not None and not mark.query():
        check()
        if pause_s:
            time.sleep(pause_s)
        if until is not None and time.monotonic() > until:
            return
