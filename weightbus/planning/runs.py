"""Strided boxes as rows of bytes: what one two-dimensional copy moves. Pure integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Pitches that the driver's two-dimensional copy takes.
MAX_PITCH = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Run:
    """``rows`` rows of ``width`` bytes; offsets and pitches in bytes."""

    dst: int
    src: int
    width: int
    rows: int = 1
    dst_pitch: int = 0
    src_pitch: int = 0

    @property
    def nbytes(self) -> int:
        return self.width * self.rows


def row_major(strides: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether the elements of the innermost axis that has any extent lie side by side."""
    inner = [stride for stride, size in zip(strides, sizes, strict=True) if size != 1]
    return not inner or inner[-1] == 1


def runs_of(
    sizes: Sequence[int],
    dst_strides: Sequence[int],
    src_strides: Sequence[int],
    *,
    itemsize: int,
    dst: int = 0,
    src: int = 0,
) -> list[Run]:
    """The fewest runs that copy a box between two layouts that are both ``row_major``.

    sizes, strides: in elements. dst, src: of the first element, in bytes.
    """
    if 0 in sizes:
        return []
    axes = _merged(sizes, dst_strides, src_strides)
    width = itemsize
    if axes and axes[-1][1] == axes[-1][2] == 1:
        width = axes.pop()[0] * itemsize
    rows, dst_pitch, src_pitch = axes.pop() if axes else (1, 0, 0)
    dst_pitch, src_pitch = dst_pitch * itemsize, src_pitch * itemsize
    if max(dst_pitch, src_pitch) > MAX_PITCH:
        axes.append((rows, dst_pitch // itemsize, src_pitch // itemsize))
        rows, dst_pitch, src_pitch = 1, 0, 0
    return [
        Run(dst + d * itemsize, src + s * itemsize, width, rows, dst_pitch, src_pitch) for d, s in _places(axes)
    ]


def _merged(
    sizes: Sequence[int], dst_strides: Sequence[int], src_strides: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Axes as (size, dst stride, src stride), without those of one element, adjacent ones joined."""
    axes: list[tuple[int, int, int]] = []
    for size, d, s in zip(sizes, dst_strides, src_strides, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * d and axes[-1][2] == size * s:
            axes[-1] = (axes[-1][0] * size, d, s)
        else:
            axes.append((size, d, s))
    return axes


def _places(axes: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """Offsets of each combination of indices, in elements."""
    if not axes:
        yield 0, 0
        return
    (size, d, s), *inner = axes
    for i in range(size):
        for one, other in _places(inner):
            yield i * d + one, i * s + other
