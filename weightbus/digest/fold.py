"""Two integers that answer for thousands of tensors: sums weighed by keys of their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from weightbus.digest.grid61 import P, check_seed

NameKeys = Mapping[str, tuple[int, int]]


def name_keys(names: Iterable[str], seed: bytes) -> NameKeys:
    """Both lanes' key of each name: most of what ``fold`` does, so it can be done while a GPU works."""
    base0, base1 = (
        hashlib.sha256(b"weightbus fold v1\0" + check_seed(seed) + bytes([lane])) for lane in (0, 1)
    )

    def key(base: hashlib._Hash, name: bytes) -> int:
        text = base.copy()
        text.update(name)
        return int.from_bytes(text.digest()[:16], "little") % P

    return {name: (key(base0, name.encode()), key(base1, name.encode())) for name in names}


def fold(
    names: Sequence[str], sums: npt.NDArray[np.uint64], seed: bytes, keys: NameKeys | None = None
) -> tuple[int, int]:
    """Both lanes' sum of ``sums[i] * F[name_i]`` mod P; folds of parts add up as the parts do.

    names: one for each row of ``sums``, repeated where a tensor has several parts. keys: of these names
    under ``seed``, if they are known. sums: shape (n, 2), as Digester.sums returns them.
    Raises ValueError for another shape.
    """
    check_seed(seed)
    if sums.shape != (len(names), 2):
        raise ValueError(f"sums: expected shape ({len(names)}, 2), got {sums.shape}; fold")
    if keys is None:
        keys = name_keys(set(names), seed)
    lane0 = lane1 = 0
    for name, (a, b) in zip(names, sums.tolist(), strict=True):
        one, two = keys[name]
        lane0 += a * one
        lane1 += b * two
    return lane0 % P, lane1 % P
