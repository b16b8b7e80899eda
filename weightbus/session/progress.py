"""What one rank has done so far in an update, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from weightbus.planning.exports import Choice


@dataclass(slots=True, kw_only=True)
class Progress:
    """What this rank has done so far; ``report(done, total)`` is called as bytes move."""

    report: Callable[[int, int], None] | None = None
    stages: dict[str, float] = field(default_factory=dict)
    tensors: int = 0
    nbytes: int = 0
    moved: int = 0
    wrote: bool = False
    choice: Choice | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def move(self, nbytes: int) -> None:
        self.moved += nbytes
        if self.report:
            self.report(self.moved, self.nbytes)


class Stages:
    """Seconds from the offer to the start of each stage on this rank, and of work in it.

    seconds: of stages that follow each other. overlapping: of work that overlaps other stages, for the timeline
    only; on CUDA it is the host's time.
    """

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.overlapping: dict[str, float] = {}
        self.starts: dict[str, float] = {}
        self._offered = self._begun = time.monotonic()

    def offered(self) -> None:
        """The offer has come: what was before it counts for the first stage only."""
        self._offered = time.monotonic()

    def lap(self, stage: str) -> None:
        """A stage ends, which began where the last one ended."""
        now = time.monotonic()
        self.starts.setdefault(stage, max(0.0, self._begun - self._offered))
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._begun
        self._begun = now

    def clock(self, stage: str, begun: float) -> None:
        """A piece of a stage that overlaps others ends."""
        now = time.monotonic()
        self.starts.setdefault(stage, begun - self._offered)
        self.starts[f"{stage} end"] = now - self._offered
        self.overlapping[stage] = self.overlapping.get(stage, 0.0) + now - begun
