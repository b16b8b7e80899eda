from collections.abc import Sequence

from typing_extensions import Buffer

SEGMENT_BYTES: int

def sums(segments: Buffer, tiles: int, keys: Buffer, out: Buffer, threads: int, /) -> None: ...
def fold(names: Sequence[str], sums: Buffer, seed: bytes, /) -> tuple[int, int]: ...
