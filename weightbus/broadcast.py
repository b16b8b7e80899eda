"""The broadcast route: replay compiled steps through a process group. No decisions are made here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from weightbus.bucket import Compiled, Step
from weightbus.group import Group
from weightbus.install import Hook

# Transfers that have started and not been finished: enough to keep the link busy, few enough that
# an end is noticed soon.
IN_FLIGHT = 4


class Broadcast:
    """One rank's execution of one plan."""

    def __init__(self, compiled: Compiled, group: Group, hooks: dict[str, Hook]) -> None:
        self.compiled, self.group, self.hooks = compiled, group, hooks
        self.wrote = False

    def run(
        self,
        check: Callable[[], None],
        packed: Callable[[int], None],
        arrived: Callable[[str], None],
        progress: Callable[[int], None],
        clock: Callable[[str, float], None] = lambda stage, begun: None,
    ) -> None:
        """Send, receive and install everything; on CUDA in the order of the current stream.

        check: raises once the update has ended elsewhere. packed: a step's buffer, sent by this
        rank, is filled. arrived: a tensor with a hook is whole, and its hook runs next.
        progress: told the bytes of each finished step. clock: told when each piece of a stage began,
        at its end.
        """
        pending: deque[tuple[Step, Any]] = deque()

        def finish() -> None:
            step, work = pending.popleft()
            begun = time.monotonic()
            self.group.wait(work, check)
            clock("send", begun)
            begun = time.monotonic()
            step.unpack.run()
            for name in step.assembled:
                self._install(name, arrived)
            clock("install", begun)
            progress(step.buffer.numel())

        for index, step in enumerate(self.compiled.steps):
            while len(pending) >= IN_FLIGHT or (
                step.bucket is not None and any(step.bucket == other.bucket for other, _ in pending)
            ):
                finish()
            check()
            if step.src == self.group.rank:
                begun = time.monotonic()
                step.pack.run()
                clock("pack", begun)
                packed(index)
            self.wrote = True
            begun = time.monotonic()
            pending.append((step, self.group.broadcast(step.buffer, step.src)))
            clock("send", begun)
        while pending:
            finish()
        for name in self.compiled.whole.keys() - {n for s in self.compiled.steps for n in s.assembled}:
            self._install(name, arrived)

    def _install(self, name: str, arrived: Callable[[str], None]) -> None:
        arrived(name)
        self.hooks[name].run(self.compiled.whole[name])


@contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """On CUDA, run the body on a stream of its own, after the current one and before what follows."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            current.wait_stream(side)


def synchronise(device: torch.device, check: Callable[[], None]) -> None:
    """Wait until the current stream has done all of it; ``check`` is called meanwhile."""
    if device.type != "cuda":
        return
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    while not event.query():  # type: ignore[no-untyped-call]
        check()
