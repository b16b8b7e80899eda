"""The definition's integers: field, keys, canonical shape, and what sums of boxes combine to. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from weightbus.errors import DigestError, SpecError
from weightbus.planning.box import Box, check_exact_cover

P = 2**61 - 1
STABLE_SEED = bytes(32)
MIN_ROW_BYTES = 64


def check_seed(seed: bytes) -> bytes:
    if not isinstance(seed, bytes) or len(seed) != 32:
        got = f"{len(seed)} bytes" if isinstance(seed, bytes) else type(seed).__name__
        raise ValueError(f"seed: expected 32 bytes, got {got}")
    return seed


def outer_axes(shape: Sequence[int], itemsize: int) -> int:
    """How many leading axes stay axes of the canonical shape; the others are merged into its row."""
    outer = max(len(shape) - 1, 0)
    row = shape[-1] if shape else 1
    while outer and row * itemsize < MIN_ROW_BYTES:
        outer -= 1
        row *= shape[outer]
    return outer


def axis_keys(seed: bytes, axes: int) -> tuple[list[int], list[int]]:
    """Both lanes' keys of the last ``axes`` canonical axes, the row's first."""

    def key(lane: int, axis: int) -> int:
        text = b"weightbus grid61 v1\0" + seed + bytes([lane]) + axis.to_bytes(4, "little")
        return int.from_bytes(hashlib.sha256(text).digest()[:16], "little") % P

    return [key(0, a) for a in range(axes)], [key(1, a) for a in range(axes)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """grid61 sums of some boxes of a tensor, with what is needed to add them up or to refuse that.

    sums: one integer in [0, P) for each lane. shape: the global shape. boxes: what the sums cover.
    """

    sums: tuple[int, int]
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    seed: bytes

    def __str__(self) -> str:
        return f"grid61:{self.sums[0]:016x}{self.sums[1]:016x}"


def combine(digests: Iterable[Digest]) -> Digest:
    """The whole tensor's digest from those of its parts, whatever ranks and shardings they came from.

    Digests of the same boxes are replicas: they count once, and they must be equal.
    Raises SpecError where dtype, shape or seed differ or there is no digest, CoverageError unless the
    boxes hold each element exactly once, DigestError where replicas differ.
    """
    parts = list(digests)
    if not parts:
        raise SpecError("combine: expected at least one digest, got none")
    first = parts[0]
    distinct: dict[frozenset[Box], Digest] = {}
    for part in parts:
        for field in ("dtype", "shape", "seed"):
            want, got = getattr(first, field), getattr(part, field)
            if want != got:
                raise SpecError(
                    f"combine: expected {field} {_text(want)}, got {_text(got)}; boxes {_spans(part)}"
                )
        boxes = frozenset(box for box in part.boxes if box.volume)
        same = distinct.setdefault(boxes, part)
        if same.sums != part.sums:
            raise DigestError(f"combine: expected equal replicas, got {same} and {part}; boxes {_spans(part)}")
    boxes_once = tuple(box for part in distinct.values() for box in part.boxes if box.volume)
    check_exact_cover("combine", first.shape, boxes_once, f"{len(parts)} digests")
    lanes = zip(*(part.sums for part in distinct.values()), strict=True)
    lane0, lane1 = (sum(lane) % P for lane in lanes)
    whole = Box.whole(first.shape)
    return Digest(sums=(lane0, lane1), dtype=first.dtype, shape=first.shape, boxes=(whole,), seed=first.seed)


def model_digest_of(digests: Mapping[str, Digest], *, seed: bytes = STABLE_SEED) -> str:
    """SHA-256 text over the whole-tensor digests of a model by wire name; combine a sharded tensor's first.

    Raises SpecError for a digest under another seed, CoverageError for one that is not of a whole tensor.
    """
    text = hashlib.sha256(b"weightbus model v1\0" + check_seed(seed))
    for name, digest in sorted(_encoded(digests), key=itemgetter(0)):
        label = name.decode()
        if digest.seed != seed:
            raise SpecError(f"{label}: expected seed {seed.hex()}, got {digest.seed.hex()}; model digest")
        check_exact_cover(label, digest.shape, digest.boxes, "model digest; combine the parts' digests first")
        dtype = digest.dtype.encode()
        text.update(len(name).to_bytes(4, "little") + name + bytes([len(dtype)]) + dtype)
        text.update(bytes([len(digest.shape)]))
        for number in (*digest.shape, *digest.sums):
            text.update(number.to_bytes(8, "little"))
    return text.hexdigest()


def _encoded(digests: Mapping[str, Digest]) -> list[tuple[bytes, Digest]]:
    return [(name.encode(), digest) for name, digest in digests.items()]


def _text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _spans(digest: Digest) -> str:
    shown = ", ".join(map(str, digest.boxes[:4]))
    return shown + (f" and {len(digest.boxes) - 4} more" if len(digest.boxes) > 4 else "")
