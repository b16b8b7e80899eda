"""What ranks hold, cut along the borders of what others want. Pure integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightbus.planning.box import Box, less, meets, overlap


@dataclass(frozen=True, slots=True)
class Cell:
    """A box that lies in one box of the source, and in one of each rank that wants any of it."""

    box: Box
    holders: tuple[int, ...]
    wanted_by: tuple[int, ...] = ()


def cells_of(held: Mapping[Box, Sequence[int]], wanted: Mapping[Box, Sequence[int]]) -> list[Cell]:
    """What is held, cut along the borders of all that is wanted; only what somebody wants."""
    cells = [Cell(box, tuple(sorted(set(ranks)))) for box, ranks in held.items()]
    for layer in _layers(list(wanted)):
        shared: dict[int, list[tuple[Box, tuple[int, ...]]]] = {}
        for place, other, inner in meets([cell.box for cell in cells], layer):
            shared.setdefault(place, []).append((inner, tuple(wanted[layer[other]])))
        cut: list[Cell] = []
        for place, cell in enumerate(cells):
            left = [cell.box]
            for inner, ranks in shared.get(place, ()):
                cut.append(Cell(inner, cell.holders, tuple(sorted({*cell.wanted_by, *ranks}))))
                left = [rest for one in left for rest in less(one, inner)]
            cut += [Cell(rest, cell.holders, cell.wanted_by) for rest in left]
        cells = cut
    return [cell for cell in cells if cell.wanted_by]


def _layers(boxes: Sequence[Box]) -> list[list[Box]]:
    """Boxes in lists of such as share no element: one list, if all replicas are cut alike."""
    if not overlap(boxes):
        return [list(boxes)]
    layers: list[list[Box]] = []
    for box in boxes:
        layer = next((layer for layer in layers if not overlap([box], layer)), None)
        if layer is None:
            layers.append(layer := [])
        layer.append(box)
    return layers


def disjoint(boxes: Sequence[Box]) -> list[Box]:
    """The elements of all boxes, each in one box."""
    if not overlap(boxes):
        return list(boxes)
    found: list[Box] = []
    for box in boxes:
        left = [box]
        for other in found:
            left = [rest for one in left for rest in less(one, other)]
        found += left
    return found
