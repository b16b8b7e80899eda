"""What a trainer rank lets processes of its host read, and whether a server rank can read it.

Exports travel beside the facts, once for each pair of layouts. Pure integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from weightbus.errors import SpecError, visible
from weightbus.planning.facts import Facts
from weightbus.planning.spec import ITEMSIZE

# Bytes of a cudaIpcMemHandle_t, the longer of the two kinds.
HANDLE_BYTES = 64

# Reasons of which nobody needs to be told.
ASKED_FOR = "asked for"
OTHER_HOST = "trainer and server ranks are on different hosts"

_Count = Annotated[int, Meta(ge=0, lt=1 << 48)]
_Name = Annotated[str, Meta(max_length=256)]
_Reason = Annotated[str, Meta(max_length=4096)]


class Allocation(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A stretch of addresses with a handle of its own; ``handle`` is opaque here.

    pieces: of virtual memory, the file descriptor and bytes of each allocation behind it, in order.
    """

    handle: Annotated[bytes, Meta(max_length=HANDLE_BYTES)]
    nbytes: _Count
    pieces: tuple[tuple[_Count, _Count], ...] = ()


class Place(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Where one box lies: its first element's offset in an allocation, in bytes; strides in elements."""

    allocation: _Count
    offset: _Count
    strides: tuple[_Count, ...]


class Exports(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One trainer rank's. places: by wire name, one for each box of its facts.

    host: the same for all processes of one running kernel. device: ``cpu``, or the GPU's own identity.
    reason: why nothing is exported; the rest is empty then.
    """

    host: _Name = ""
    device: _Name = ""
    allocations: tuple[Allocation, ...] = ()
    places: dict[str, tuple[Place, ...]] = {}
    reason: _Reason = ""


class Reach(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One server rank's answer. reason: why it can't read the exports; empty if it can.

    device: where it copies to, as of ``Exports``. no_cast: why it can't cast what it copies; empty if it can.
    """

    reason: _Reason = ""
    device: _Name = ""
    no_cast: _Reason = ""


_encoder = msgspec.msgpack.Encoder()
_exports = msgspec.msgpack.Decoder(Exports)
_reach = msgspec.msgpack.Decoder(Reach)


def encode_exports(value: Exports | Reach) -> bytes:
    return _encoder.encode(value)


def decode_exports(blob: bytes, facts: Facts, sender: str) -> Exports:
    """Raises SpecError unless every box of ``facts`` lies inside an allocation, as far as numbers say."""
    if not blob:
        return Exports(reason=f"{sender} exports nothing")
    try:
        exports = _exports.decode(blob)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"exports of {sender}: {error}") from error
    if exports.reason:
        return Exports(reason=visible(exports.reason))
    for number, allocation in enumerate(exports.allocations):
        found = sum(nbytes for _, nbytes in allocation.pieces)
        if allocation.pieces and found != allocation.nbytes:
            raise SpecError(
                f"allocation {number}: expected pieces of {allocation.nbytes} bytes, got {found}; "
                f"exports of {sender}"
            )
    for name, holding in facts.items():
        places = exports.places.get(name, ())
        if len(places) != len(holding.boxes):
            raise SpecError(
                f"{name}: expected {len(holding.boxes)} places, got {len(places)}; exports of {sender}"
            )
        for box, place in zip(holding.boxes, places, strict=True):
            if not box.volume:
                continue
            inside = len(place.strides) == len(box.sizes) and place.allocation < len(exports.allocations)
            if inside:
                reach = sum((n - 1) * stride for n, stride in zip(box.sizes, place.strides, strict=True))
                end = place.offset + (reach + 1) * ITEMSIZE[holding.spec.dtype]
                inside = end <= exports.allocations[place.allocation].nbytes
            if not inside:
                raise SpecError(f"{name}: box {box} lies outside its allocation; exports of {sender}")
    return exports


def decode_reach(blob: bytes, sender: str) -> Reach:
    """Raises SpecError."""
    if not blob:
        return Reach(reason=f"{sender} has not tried")
    try:
        reach = _reach.decode(blob)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"reach of {sender}: {error}") from error
    no_cast = f"{sender}: {visible(reach.no_cast)}" if reach.no_cast else ""
    return Reach(reason=visible(reach.reason), device=reach.device, no_cast=no_cast)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which route an update takes, and why."""

    route: str
    reason: str


def choose_route(asked: str, exports: Mapping[int, Exports], reaches: Sequence[Reach], cast: str) -> Choice:
    """``peer`` if every server rank can read every trainer rank's memory as it is, else ``broadcast``.

    asked: ``auto``, or the route itself. cast: why what has to be cast is better not copied.
    Raises SpecError where ``peer`` is asked for and can't be had.
    """
    if asked in ("broadcast", "reshard"):
        return Choice(route=asked, reason=ASKED_FOR)
    reasons = [held.reason for held in exports.values()] + [reach.reason for reach in reaches] + [cast]
    reason = next(filter(None, reasons), "")
    if not reason:
        return Choice(route="peer", reason=ASKED_FOR if asked == "peer" else "all ranks share a host")
    if asked == "peer":
        raise SpecError(f"route: expected peer copies to be possible, as asked for; {reason}")
    return Choice(route="broadcast", reason=reason)
