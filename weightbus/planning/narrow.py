"""Where two copies of a tensor differ, found by comparing sums of ever smaller boxes. Pure integers.

Each round cuts what is left along each axis into slabs; the first and the last slab that differ are cut
again. Every element outside of the box that this leads to is equal, and its first and last slice along
each axis differ. A last round cuts that box into a grid, to tell a block from scattered elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from weightbus.planning.box import Box

# Boxes in one round: of two axes cut at both ends, 64 parts each.
MAX_BOXES = 256
MAX_PARTS = 64

# 64 parts a round: a tensor of 2**31 rows takes six rounds, and the grid one more.
MAX_ROUNDS = 10

Range = tuple[int, int]


def bounding(boxes: Iterable[Box]) -> Box:
    """The smallest box around boxes that are not empty."""
    held = [box for box in boxes if box.volume]
    lows = tuple(map(min, zip(*(box.offsets for box in held), strict=True)))
    ends = tuple(map(max, zip(*(box.ends for box in held), strict=True)))
    return Box(lows, tuple(end - low for low, end in zip(lows, ends, strict=True)))


@dataclass(slots=True)
class Search:
    """One search. Call ``boxes`` and, with what came of them, ``compared``, until there are no more boxes.

    first, last: for each axis, the range in which the first and the last difference lie.
    lost: no box differed any more, so the tensor has changed meanwhile.
    grid: of the last round, how many parts there were and how many differed; None before.
    zeros: the box holds zeros only, in a copy that should not.
    """

    first: list[Range]
    last: list[Range]
    rounds: int = 0
    lost: bool = False
    grid: tuple[int, int] | None = None
    zeros: bool = False
    _asked: list[tuple[int, Range]] = field(default_factory=list)  # axis and range of each box

    @classmethod
    def within(cls, box: Box) -> Search:
        ranges = list(zip(box.offsets, box.ends, strict=True))
        return cls(first=list(ranges), last=list(ranges))

    @property
    def box(self) -> Box:
        """All differences lie in it, as far as is known."""
        return self._but({})

    def _but(self, axes: dict[int, Range]) -> Box:
        spans = [axes.get(axis, (self.first[axis][0], self.last[axis][1])) for axis in range(len(self.first))]
        return Box(tuple(low for low, _ in spans), tuple(high - low for low, high in spans))

    @property
    def _open(self) -> list[int]:
        sides = zip(self.first, self.last, strict=True)
        return [axis for axis, pair in enumerate(sides) if any(high - low > 1 for low, high in pair)]

    def boxes(self) -> list[Box]:
        """The boxes to compare next; none at the end. At most MAX_BOXES."""
        self._asked = []
        if self.lost or self.grid or self.rounds >= MAX_ROUNDS:
            return []
        if not (axes := self._open):
            # The box is found: is all of it wrong, and is it zeros?
            return grid_of(self.box)
        parts = max(2, min(MAX_PARTS, MAX_BOXES // (2 * len(axes))))
        for axis in axes[: MAX_BOXES // 4]:
            for side in dict.fromkeys((self.first[axis], self.last[axis])):
                self._asked += [(axis, part) for part in cut(side, parts)]
        return [self._but({axis: part}) for axis, part in self._asked]

    def compared(self, right: Sequence[tuple[int, int]], live: Sequence[tuple[int, int]]) -> None:
        """Sums of the boxes, in order, of the copy that is right and of the one that is not."""
        self.rounds += 1
        differs = [one != other for one, other in zip(right, live, strict=True)]
        if not any(differs):
            self.lost = True
        elif not self._asked:
            self.grid = len(differs), sum(differs)
            self.zeros = not any(map(any, live))
        else:
            for axis in {axis for axis, _ in self._asked}:
                wrong = [
                    part
                    for (other, part), bad in zip(self._asked, differs, strict=True)
                    if bad and other == axis
                ]
                if not wrong:
                    self.lost = True
                    return
                self.first[axis], self.last[axis] = min(wrong), max(wrong)


def cut(span: Range, parts: int) -> list[Range]:
    """At most ``parts`` ranges that make up ``span``."""
    low, high = span
    step = -(-(high - low) // parts)
    return [(start, min(start + step, high)) for start in range(low, high, step)]


def grid_of(box: Box) -> list[Box]:
    """The box in at most MAX_BOXES parts, single elements if it has no more than that."""
    if box.volume <= MAX_BOXES:
        return box.split(1)
    parts = [1] * len(box.sizes)
    # Double the parts of the axis whose parts are the longest, as long as there is room.
    while math.prod(parts) * 2 <= MAX_BOXES:
        axis = max(range(len(parts)), key=lambda axis: box.sizes[axis] / parts[axis])
        parts[axis] *= 2
    found = [Box((), ())]
    for low, end, count in zip(box.offsets, box.ends, parts, strict=True):
        found = [
            Box((*one.offsets, start), (*one.sizes, stop - start))
            for one in found
            for start, stop in cut((low, end), count)
        ]
    return found
