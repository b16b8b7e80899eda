"""Frames that no hub should be sent: recorded messages with faults, and bytes that are no messages."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import msgspec

from weightbus.control import messages as m
from weightbus.control import wire

Value = Any

ODD: list[Value] = [
    None, True, -1, 0, 1, 2**31, 2**61, 2**62, 2**63, 2**64 - 1, -(2**63), 1.5, float("nan"), float("inf"),
    "", "x", "update", "a" * 70, "a" * 2000, "\x00\ud7ff", b"", b"\x00" * 32, b"z" * 5000,
    [], {}, [[]], {"type": "go"},
]  # fmt: skip


def odd(rng: random.Random) -> Value:
    """One of them, as an object of its own: it may be changed in turn."""
    return copy.deepcopy(rng.choice(ODD))


def nested(depth: int) -> Value:
    value: Value = 1
    for _ in range(depth):
        value = [value]
    return value


def mutate(value: Value, rng: random.Random) -> Value:
    """A copy of a decoded message with one to three faults, anywhere in it."""
    value = msgspec.msgpack.decode(msgspec.msgpack.encode(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spot = value
        for _ in range(rng.randrange(3)):  # walk down
            inner = [
                x
                for x in (spot.values() if isinstance(spot, dict) else spot)
                if isinstance(x, dict | list) and x
            ]
            if not inner:
                break
            spot = rng.choice(inner)
        if isinstance(spot, dict):
            key = rng.choice(list(spot)) if spot else "type"
            match rng.randrange(6):
                case 0:
                    spot.pop(key, None)
                case 1:
                    spot[rng.choice(("extra", "peer", "update", "hub", "id", ""))] = odd(rng)
                case 2:
                    spot[key] = nested(rng.choice((2, 50, 400)))
                case 3 if isinstance(spot.get(key), str | bytes) and spot[key]:
                    old = spot[key]
                    at = rng.randrange(len(old))
                    spot[key] = old[:at] + old[at + 1 :] + (old[:1] * rng.choice((0, 1, 100)))
                case 4 if isinstance(spot.get(key), int):
                    spot[key] = max(
                        -(2**63), min(2**64 - 1, spot[key] + rng.choice((-1, 1, 2, -(2**40), 2**40)))
                    )
                case _:
                    spot[key] = odd(rng)
        elif isinstance(spot, list) and spot:
            spot[rng.randrange(len(spot))] = odd(rng)
            if rng.random() < 0.3:
                spot *= rng.choice((2, 30))
    return value


def structured(recorded: Sequence[bytes], rng: random.Random) -> list[bytes]:
    """Valid msgpack: a recorded payload, mutated four times out of five, else played again as it was."""
    payload = rng.choice(recorded)
    if rng.random() < 0.8:
        payload = msgspec.msgpack.encode(mutate(msgspec.msgpack.decode(payload), rng))
    return [wire.HEADER, payload[: m.MAX_FRAME_BYTES]]


def broken(recorded: Sequence[bytes], rng: random.Random) -> list[bytes]:
    """Anything else: cut, flipped, random, deep, boasting of lengths, of another protocol."""
    payload = bytearray(rng.choice(recorded))
    match rng.randrange(9):
        case 0:
            return [wire.HEADER, bytes(payload[: rng.randrange(len(payload))])]
        case 1:
            for _ in range(rng.choice((1, 2, 8))):
                payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
            return [wire.HEADER, bytes(payload)]
        case 2:
            return [wire.HEADER, rng.randbytes(rng.choice((0, 1, 3, 50, 4000)))]
        case 3:
            return [wire.HEADER, rng.choice((b"\x91", b"\x81\xa1a")) * rng.choice((10, 1500, 60000))]
        case 4:  # array, map, string and bytes of 4 GB, of which nothing follows
            return [
                wire.HEADER,
                b"\x82\xa4type\xa5facts" + rng.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6")) + b"\xff" * 4,
            ]
        case 5:
            return [
                rng.choice((b"", b"weightbus/9", b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04\x95")),
                bytes(payload),
            ]
        case 6:
            return [wire.HEADER]
        case 7:
            return [wire.HEADER, bytes(payload)] + [b"more"] * rng.choice((1, 2, 200))
        case _:
            return [wire.HEADER, bytes(payload) + rng.randbytes(3)]
