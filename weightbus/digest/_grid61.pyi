from typing import Any, TypeAlias

from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
SEGMENT_BYTES: int

def sums(segments: Array, tiles: int, keys: Array, out: Array, threads: int, /) -> None: ...
def name_keys(text: bytes, ends: Array, prefix: bytes, out: Array, /) -> None: ...
def fold(keys: Array, sums: Array, /) -> tuple[int, int]: ...
