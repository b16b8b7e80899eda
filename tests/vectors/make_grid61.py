"""Writes grid61.json: boxes around every boundary, with sums by the plain-integer definition.

    PYTHONPATH=tests python tests/vectors/make_grid61.py

Byte i of the global tensor, row-major, is i % 251; a vector's bytes are those of its box.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from grid61_definition import STABLE_SEED, sums

OTHER_SEED = bytes(range(32))
Case = tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...], bytes]


def box_bytes(itemsize: int, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> bytes:
    data = bytearray()
    for index in product(*(range(o, o + n) for o, n in zip(offsets, sizes, strict=True))):
        flat = 0
        for i, n in zip(index, shape, strict=True):
            flat = flat * n + i
        data += bytes((flat * itemsize + b) % 251 for b in range(itemsize))
    return bytes(data)


def cases() -> list[Case]:
    found: list[Case] = []

    def whole(itemsize: int, *shape: int, seed: bytes = STABLE_SEED) -> None:
        found.append((itemsize, shape, (0,) * len(shape), shape, seed))

    def box(itemsize: int, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        found.append((itemsize, shape, offsets, sizes, STABLE_SEED))

    # DIGEST.md's own examples
    for itemsize, shape in [
        (4, ()),
        (2, (1,)),
        (2, (5,)),
        (2, (33,)),
        (2, (7, 64)),
        (2, (3, 5, 7)),
        (2, (4, 3, 3, 3)),
        (4, (2, 3, 40)),
        (2, (0, 8)),
    ]:
        whole(itemsize, *shape)
    whole(2, 7, 64, seed=OTHER_SEED)
    # Lengths around words, vectors, strips of 512 bytes, and blocks of 1024 words
    for n in (
        1,
        2,
        3,
        4,
        5,
        7,
        8,
        15,
        16,
        17,
        31,
        63,
        64,
        65,
        511,
        512,
        513,
        1023,
        1024,
        4095,
        4096,
        4097,
        4100,
        8193,
    ):
        whole(1, n)
    # Rows around 64 bytes: merged below, an axis of their own from there
    for row in (1, 3, 31, 32, 33, 62, 63, 64, 65, 127):
        whole(1, 5, row)
    whole(2, 3, 31)
    whole(2, 3, 32)
    whole(2, 3, 33)
    # Axes of one element, of none, and many of them
    for shape in [
        (1, 1, 1),
        (1, 70),
        (70, 1),
        (2, 1, 2, 1, 2, 1, 40),
        (3, 0, 70),
        (0,),
        (2, 2, 2, 2, 2, 2, 2, 64),
    ]:
        whole(1, *shape)
    for itemsize in (1, 2, 4, 8, 16):
        whole(itemsize, 3, 70)
        box(itemsize, (5, 130), (1, 3), (3, 101))
    # Every phase and length of a box in a row; rows shorter than a vector
    for first in range(5):
        for size in (1, 2, 3, 4, 5, 11, 16, 21):
            box(1, (3, 90), (1, first), (2, size))
    box(1, (2, 1200), (0, 3), (2, 1100))
    box(1, (9000,), (4001,), (4500,))
    box(2, (70, 3000), (2, 1), (68, 2998))
    # Boxes that cut a merged axis: pieces with pitches of 6, 5, 15 and 12 bytes
    box(2, (9, 5, 3), (2, 1, 0), (5, 3, 2))
    box(1, (40, 5), (3, 1), (30, 3))
    box(1, (7, 3, 5), (1, 1, 1), (5, 2, 3))
    box(4, (11, 3), (2, 1), (8, 1))
    box(2, (6, 10, 3, 3), (1, 2, 1, 1), (4, 7, 2, 1))
    # Far from the origin: more than 2**32 elements, 2**32 words, 2**32 rows
    box(2, (2**33,), (2**32 + 3,), (50,))
    box(4, (2**40,), (2**39 + 1,), (7,))
    box(1, (2**34, 64), (2**33 + 5, 3), (3, 41))
    box(1, (2**31, 2**20), (2**30, 2**19 + 1), (2, 9))
    return found


def main() -> None:
    vectors = []
    for itemsize, shape, offsets, sizes, seed in cases():
        lane0, lane1 = sums(box_bytes(itemsize, shape, offsets, sizes), itemsize, shape, offsets, sizes, seed)
        vectors.append(
            {
                "itemsize": itemsize,
                "shape": shape,
                "offsets": offsets,
                "sizes": sizes,
                "seed": seed.hex(),
                "digest": f"grid61:{lane0:016x}{lane1:016x}",
            }
        )
    head = {"bytes": "byte i of the global tensor, row-major, is i % 251"}
    lines = ",\n".join("  " + json.dumps(vector) for vector in vectors)
    text = json.dumps(head)[:-1] + ',\n "vectors": [\n' + lines + "\n]}\n"
    Path(__file__).with_name("grid61.json").write_text(text)


if __name__ == "__main__":
    main()
