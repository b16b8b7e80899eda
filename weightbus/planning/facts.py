"""What ranks tell each other before a plan: which boxes of which tensors each of them holds.

Trainer ranks tell what they can send, server ranks what they want, in the trainer's (wire) names.
Facts travel as msgpack, once for each pair of layouts. Pure integers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from weightbus.errors import SpecError, visible
from weightbus.planning.box import Box
from weightbus.planning.spec import ITEMSIZE, MAX_AXES, Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """The boxes of one tensor on one rank. The spec's dtype is the holder's own.

    in_place: whether each box lies contiguous on this rank, so that a transfer may use its storage.
    why_arrived: why the server rank can only vouch for what arrived, not for what is live
    (an opaque hook installs it); empty where the boxes are live storage. modules: of a trainer rank's mapping,
    those that own the tensor, under any of its names. tied: of a trainer rank's tensor that has several names,
    the least of them; each of them has facts. skipped: why the server rank takes nothing of it; else empty.
    """

    spec: Spec
    boxes: tuple[Box, ...]
    in_place: bool = False
    why_arrived: str = ""
    modules: tuple[str, ...] = ()
    tied: str = ""
    skipped: str = ""

    @property
    def nbytes(self) -> int:
        return sum(box.volume for box in self.boxes) * ITEMSIZE[self.spec.dtype]


Facts = Mapping[str, Holding]


class _Row(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    name: str
    dtype: str
    shape: Annotated[tuple[int, ...], Meta(max_length=MAX_AXES)]
    boxes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    in_place: bool
    why_arrived: str
    modules: tuple[str, ...] = ()
    tied: str = ""
    skipped: str = ""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[_Row])


def encode_facts(facts: Facts) -> bytes:
    return _encoder.encode(
        [
            _Row(
                name=name,
                dtype=holding.spec.dtype,
                shape=holding.spec.shape,
                boxes=tuple((box.offsets, box.sizes) for box in holding.boxes),
                in_place=holding.in_place,
                why_arrived=holding.why_arrived,
                modules=holding.modules,
                tied=holding.tied,
                skipped=holding.skipped,
            )
            for name, holding in facts.items()
        ]
    )


def decode_facts(blob: bytes, sender: str) -> dict[str, Holding]:
    """Raises SpecError, naming ``sender``, where the bytes are not facts that make sense."""
    try:
        rows = _decoder.decode(blob)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"facts of {sender}: {error}") from error
    facts: dict[str, Holding] = {}
    for row in rows:
        boxes = tuple(Box(*pair) for pair in row.boxes)
        if row.name in facts:
            raise SpecError(f"{row.name}: named twice in the facts of {sender}")
        if row.dtype not in ITEMSIZE:
            raise SpecError(f"{row.name}: unknown dtype {row.dtype!r} in the facts of {sender}")
        for box in boxes:
            if len(box.offsets) != len(box.sizes):
                text = f"{row.name}: expected an offset for each size, got {box.offsets} and {box.sizes}"
                raise SpecError(f"{text}; facts of {sender}")
            if not box.inside(row.shape):
                raise SpecError(f"{row.name}: box {box} lies outside {list(row.shape)}; facts of {sender}")
        spec = Spec(name=row.name, dtype=row.dtype, shape=row.shape)
        facts[row.name] = Holding(
            spec=spec,
            boxes=boxes,
            in_place=row.in_place,
            why_arrived=visible(row.why_arrived),
            modules=row.modules,
            tied=row.tied,
            skipped=visible(row.skipped),
        )
    return facts


def owners_of(sources: Iterable[Facts]) -> dict[str, frozenset[str]]:
    """By wire name, the trainer's modules that own the tensor; nothing for a source that is no mapping."""
    owners: dict[str, frozenset[str]] = {}
    for facts in sources:
        for name, holding in facts.items():
            if holding.modules:
                owners[name] = owners.get(name, frozenset()) | frozenset(holding.modules)
    return owners


def ties_of(sources: Iterable[Facts]) -> dict[str, str]:
    """The names of tied tensors, each with the least of the names that its tensor has."""
    return {n: holding.tied for facts in sources for n, holding in facts.items() if holding.tied}


def facts_id(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()[:32]
