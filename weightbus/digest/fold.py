"""Two integers that answer for thousands of tensors: sums weighed by keys of their names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from weightbus.digest.grid61 import P, check_seed


def fold(names: Sequence[str], sums: npt.NDArray[np.uint64], seed: bytes) -> tuple[int, int]:
    """Both lanes' sum of ``sums[i] * F[name_i]`` mod P; folds of parts add up as the parts do.

    names: one for each row of ``sums``, repeated where a tensor has several parts.
    sums: shape (n, 2), as Digester.sums returns them. Raises ValueError for another shape.
    """
    check_seed(seed)
    if sums.shape != (len(names), 2):
        raise ValueError(f"sums: expected shape ({len(names)}, 2), got {sums.shape}; fold")

    def key(lane: int, name: str) -> int:
        text = b"weightbus fold v1\0" + seed + bytes([lane]) + name.encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:16], "little") % P

    rows = sums.tolist()
    lane0, lane1 = (
        sum(row[lane] * key(lane, name) for name, row in zip(names, rows, strict=True)) % P for lane in (0, 1)
    )
    return lane0, lane1
