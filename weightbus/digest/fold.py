"""Two integers that answer for thousands of tensors: sums weighed by keys of their names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from weightbus.digest.grid61 import P, check_seed

try:
    from weightbus.digest import _grid61 as _extension
except ImportError:
    _extension: Any = None  # type: ignore[no-redef]

Array = npt.NDArray[np.uint64]


class NameKeys:
    """Keys of a list of names; prepared once, as seeds change with each update and names do not."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = [name.encode() for name in names]
        self._text = b"".join(self._names)
        self._ends = np.cumsum([len(name) for name in self._names], dtype=np.int64)

    def under(self, seed: bytes) -> Array:
        """Both lanes' key of each name, shape (names, 2)."""
        prefix = b"weightbus fold v1\0" + check_seed(seed)
        keys = np.empty((len(self._names), 2), dtype=np.uint64)
        if _extension is not None:
            _extension.name_keys(self._text, self._ends, prefix, keys)
            return keys
        for row, name in enumerate(self._names):
            for lane in (0, 1):
                text = hashlib.sha256(prefix + bytes([lane]) + name).digest()
                keys[row, lane] = int.from_bytes(text[:16], "little") % P
        return keys


def fold_with(keys: Array, sums: Array) -> tuple[int, int]:
    """Both lanes' sum of ``sums[i] * keys[i]`` mod P. Both of shape (n, 2), with values in [0, P)."""
    if _extension is not None:
        return _extension.fold(np.ascontiguousarray(keys), np.ascontiguousarray(sums))
    lane0, lane1 = (
        sum(a * b for a, b in zip(keys[:, lane].tolist(), sums[:, lane].tolist(), strict=True)) % P
        for lane in (0, 1)
    )
    return lane0, lane1


def fold(names: Sequence[str], sums: Array, seed: bytes) -> tuple[int, int]:
    """Both lanes' sum of ``sums[i] * F[name_i]`` mod P; folds of parts add up as the parts do.

    names: one for each row of ``sums``, repeated where a tensor has several parts.
    sums: shape (n, 2), as Digester.sums returns them. Raises ValueError for another shape.
    """
    if sums.shape != (len(names), 2):
        raise ValueError(f"sums: expected shape ({len(names)}, 2), got {sums.shape}; fold")
    return fold_with(NameKeys(names).under(seed), sums)
