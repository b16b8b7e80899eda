"""Boxes that several trainer ranks hold: which ranks, so that all of them are compared and none is dropped."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from weightbus.planning.box import Box
from weightbus.planning.facts import Facts


def holders_of(name: str, sources: Mapping[int, Facts]) -> dict[Box, list[int]]:
    """The distinct boxes of a tensor that have elements, each with the group ranks that hold it."""
    holders: dict[Box, list[int]] = {}
    for rank, facts in sources.items():
        for box in facts[name].boxes if name in facts else ():
            if box.volume:
                holders.setdefault(box, []).append(rank)
    return holders


def digesters(holders: Sequence[int], sources: Collection[int], read: Mapping[int, int]) -> tuple[int, ...]:
    """Which holders of a box digest it in an update, so that each of them is proved; the first answers for it.

    sources: those that server ranks take it from. read: bytes that each digests besides.
    One is enough where server ranks take it from each of the others: what these have got is compared with its
    sums. Else all digest, and are compared with each other (docs/digest.md).
    """
    others = [rank for rank in holders if rank not in sources]
    if len(others) < 2:
        return (min(others or holders, key=lambda rank: (read[rank], rank)),)
    first = min(sources)
    return (first, *(rank for rank in holders if rank != first))


@dataclass(frozen=True, slots=True)
class Replicated:
    """What more than one trainer rank holds, alike on every rank.

    sets: the distinct sets of such group ranks, in order. boxes: by tensor, each of its boxes and the place of
    its set.
    """

    sets: tuple[tuple[int, ...], ...] = ()
    boxes: Mapping[str, Mapping[Box, int]] = field(default_factory=dict)

    def set_of(self, name: str, piece: Box) -> int | None:
        """The set whose ranks all hold ``piece``; None where one rank alone does."""
        for box, place in self.boxes.get(name, {}).items():
            if box.intersect(piece) == piece:
                return place
        return None


def replicated(sources: Mapping[int, Facts]) -> Replicated:
    """sources: for each group rank that sends, what it holds; boxes are equal or disjoint."""
    if len(sources) < 2:
        return Replicated()
    held: dict[str, dict[Box, tuple[int, ...]]] = {}
    for name in sorted({name for facts in sources.values() for name in facts}, key=str.encode):
        for box, ranks in holders_of(name, sources).items():
            if len(set(ranks)) > 1:
                held.setdefault(name, {})[box] = tuple(sorted(set(ranks)))
    sets = tuple(sorted({ranks for boxes in held.values() for ranks in boxes.values()}))
    place = {ranks: index for index, ranks in enumerate(sets)}
    boxes = {name: {box: place[ranks] for box, ranks in found.items()} for name, found in held.items()}
    return Replicated(sets, boxes)
