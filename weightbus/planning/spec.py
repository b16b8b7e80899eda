"""What a tensor is, apart from where it lies: name, dtype and global shape. Pure integers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from weightbus.errors import SpecError

# torch's dtype names without "torch.", with bytes per element.
ITEMSIZE = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8,
    "int64": 8,
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
    "complex32": 4, "complex64": 8, "complex128": 16,
}  # fmt: skip

MAX_AXES = 64  # as torch; what others say is bounded by it before sizes are multiplied


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One tensor of a version: wire name, dtype (torch's name without ``torch.``), global shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.name.isprintable():
            raise SpecError(f"name of a tensor: expected printable characters, got {self.name!a}")

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEMSIZE[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


def castable(src: str, dst: str) -> bool:
    """Whether a sender may cast ``src`` to ``dst``: equal, or between floats of 16 bits and more,
    or between complex types. Quantising to 8-bit floats needs scales, so it is no cast."""

    def kind(dtype: str) -> str:
        wide = ITEMSIZE[dtype] >= 2
        return next((k for k in ("float", "complex") if wide and dtype.lstrip("b").startswith(k)), dtype)

    return src == dst or (kind(src) == kind(dst) and kind(src) in ("float", "complex"))


def fingerprint(parts: Sequence[object]) -> str:
    """Short name of a value that is built from tuples, strings, bytes and integers."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
