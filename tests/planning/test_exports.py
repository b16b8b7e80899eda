"""Exports: what arrives from another process is checked before an address is made of it."""

from __future__ import annotations

import msgspec
import pytest

from weightbus.errors import SpecError
from weightbus.planning.box import Box
from weightbus.planning.exports import (
    Allocation,
    Exports,
    Place,
    Reach,
    choose_route,
    decode_exports,
    decode_reach,
    encode_exports,
)
from weightbus.planning.facts import Holding
from weightbus.planning.spec import Spec

SPEC = Spec(name="w", dtype="bfloat16", shape=(8, 6))
FACTS = {"w": Holding(spec=SPEC, boxes=(Box((0, 2), (8, 3)),))}
ALLOCATION = Allocation(handle=b"h" * 64, nbytes=110)
# The last element starts at 14 + (7 * 6 + 2) * 2 = 102 and ends at 104.
PLACE = Place(allocation=0, offset=14, strides=(6, 1))
GOOD = Exports(host="one", device="cpu", allocations=(ALLOCATION,), places={"w": (PLACE,)})


def test_round_trip() -> None:
    assert decode_exports(encode_exports(GOOD), FACTS, "trainer rank 0") == GOOD
    assert decode_reach(encode_exports(Reach(reason="no")), "server") == Reach(reason="no")


def test_a_reason_stands_alone() -> None:
    blob = encode_exports(msgspec.structs.replace(GOOD, reason="asleep"))
    assert decode_exports(blob, FACTS, "trainer rank 0") == Exports(reason="asleep")
    assert decode_exports(b"", FACTS, "trainer rank 0").reason == "trainer rank 0 exports nothing"
    assert decode_reach(b"", "server rank 1").reason == "server rank 1 has not tried"


@pytest.mark.parametrize(
    ("place", "ok"),
    [
        (PLACE, True),
        (Place(allocation=0, offset=20, strides=(6, 1)), True),
        (Place(allocation=0, offset=22, strides=(6, 1)), False),
        (Place(allocation=0, offset=14, strides=(7, 1)), False),
        (Place(allocation=1, offset=14, strides=(6, 1)), False),
        (Place(allocation=0, offset=14, strides=(6,)), False),
    ],
)
def test_boxes_lie_inside_their_allocations(place: Place, ok: bool) -> None:
    blob = encode_exports(msgspec.structs.replace(GOOD, places={"w": (place,)}))
    if ok:
        assert decode_exports(blob, FACTS, "trainer rank 3").places["w"] == (place,)
    else:
        with pytest.raises(SpecError, match=r"w: box .* outside its allocation; exports of trainer rank 3"):
            decode_exports(blob, FACTS, "trainer rank 3")


def test_pieces_are_as_long_as_their_allocation() -> None:
    def blob(*pieces: tuple[int, int]) -> bytes:
        allocation = Allocation(handle=b"h", nbytes=110, pieces=pieces)
        return encode_exports(msgspec.structs.replace(GOOD, allocations=(allocation,)))

    assert decode_exports(blob((4, 100), (5, 10)), FACTS, "trainer rank 0").allocations[0].pieces[1] == (5, 10)
    expected = r"allocation 0: expected pieces of 110 bytes, got 109; exports of trainer rank 0"
    with pytest.raises(SpecError, match=expected):
        decode_exports(blob((4, 100), (5, 9)), FACTS, "trainer rank 0")


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ({"host": 5}, r"\$\.host"),
        ({"allocations": [[b"h" * 65, 8]]}, r"\$\.allocations\[0\]\[0\]"),
        ({"allocations": [[b"h", 8, 9]]}, r"\$\.allocations\[0\]"),
        ({"places": {"w": [[0, -1, []]]}}, r"\$\.places"),
        ({"more": 1}, "more"),
    ],
)
def test_malformed_exports_are_refused_with_their_path(raw: dict[str, object], path: str) -> None:
    with pytest.raises(SpecError, match=f"exports of trainer rank 0: .*{path}"):
        decode_exports(msgspec.msgpack.encode(raw), FACTS, "trainer rank 0")


def test_text_that_is_no_utf8_is_refused() -> None:
    blob = encode_exports(GOOD).replace(b"one", b"\xff" * 3)
    with pytest.raises(SpecError, match="exports of trainer rank 0: "):
        decode_exports(blob, FACTS, "trainer rank 0")
    with pytest.raises(SpecError, match="reach of server rank 1: "):
        decode_reach(encode_exports(Reach(reason="no")).replace(b"no", b"\xff" * 2), "server rank 1")


def test_a_place_for_each_box() -> None:
    blob = encode_exports(msgspec.structs.replace(GOOD, places={}))
    with pytest.raises(SpecError, match="w: expected 1 places, got 0; exports of trainer rank 0"):
        decode_exports(blob, FACTS, "trainer rank 0")


@pytest.mark.parametrize(
    ("exports", "reaches", "cast", "route", "reason"),
    [
        (GOOD, [Reach()], "", "peer", "all ranks share a host"),
        (Exports(reason="asleep"), [Reach()], "", "broadcast", "asleep"),
        (GOOD, [Reach(), Reach(reason="far")], "", "broadcast", "far"),
        (GOOD, [Reach()], "w is fp32", "broadcast", "w is fp32"),
    ],
)
def test_the_route_and_why(exports: Exports, reaches: list[Reach], cast: str, route: str, reason: str) -> None:
    choice = choose_route("auto", {0: exports}, reaches, cast)
    assert (choice.route, choice.reason) == (route, reason)
    assert choose_route("broadcast", {0: exports}, reaches, cast).route == "broadcast"
    if route == "peer":
        assert choose_route("peer", {0: exports}, reaches, cast).route == "peer"
    else:
        with pytest.raises(SpecError, match=reason):
            choose_route("peer", {0: exports}, reaches, cast)
