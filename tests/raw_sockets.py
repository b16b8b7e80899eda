"""Connections that no peer makes: greetings of every ZMTP, frames by hand, HTTP that is none; sent and left."""

from __future__ import annotations

import contextlib
import random
import socket
import struct

from weightbus import wire

READY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
MECHANISMS = (b"NULL", b"PLAIN", b"CURVE", b"GSSAPI", b"X" * 20, b"")


def greeting(rng: random.Random) -> bytes:
    """Of ZMTP 1.0, 2.0, 3.0, 3.1 or none, right or cut."""
    kind = rng.randrange(6)
    if kind == 0:
        return b"\x01\x00"
    if kind == 1:
        return b"\xff" + bytes(7) + b"\x01\x7f\x01" + bytes([rng.randrange(16)]) + b"\x00\x00"
    if kind == 2:
        return rng.randbytes(rng.randrange(80))
    whole = b"\xff" + bytes(8) + b"\x7f\x03" + bytes([rng.randrange(3)])
    whole += rng.choice(MECHANISMS).ljust(20, b"\0") + bytes([rng.randrange(2)]) + bytes(31)
    ready = READY if rng.random() < 0.8 else rng.randbytes(rng.randrange(40))
    whole += b"\x04" + bytes([len(ready)]) + ready
    return whole if rng.random() < 0.8 else whole[: rng.randrange(len(whole))]


def frame(rng: random.Random, payloads: list[bytes]) -> bytes:
    """One frame: flags, a length that may boast, and some of what it announces."""
    body = rng.choice((wire.HEADER, b"", rng.choice(payloads), rng.randbytes(rng.randrange(300))))
    flags = rng.choice((0, 1, 2, 3, 4, 5, 6, 0x80, rng.randrange(256)))
    length = len(body) if rng.random() < 0.8 else rng.choice((0, 1, 255, 1 << 20, (1 << 63) - 1, (1 << 64) - 1))
    if flags & 2:
        return bytes([flags]) + struct.pack(">Q", length) + body
    return bytes([flags, length & 255]) + body


def http(rng: random.Random) -> bytes:
    """Requests, whole and cut, of what an HTTP server takes and of what it does not."""
    method = rng.choice((b"GET", b"POST", b"PUT", b"OPTIONS", b"\x16\x03\x01", b"A" * 300))
    path = rng.choice((b"/health", b"/status", b"/update_weights_from_tensor", b"/../..", b"/" + b"a" * 5000))
    body = rng.randbytes(rng.randrange(200))
    length = rng.choice((len(body), 0, 1 << 40, -1))
    head = b"%s %s HTTP/1.1\r\nHost: %s\r\n" % (method, path, rng.choice((b"127.0.0.1", b"example.com", b"")))
    whole = head + b"Content-Length: %d\r\nContent-Type: application/json\r\n\r\n" % length + body
    return whole if rng.random() < 0.7 else whole[: rng.randrange(len(whole))]


def connect(address: tuple[str, int], sent: bytes) -> None:
    """Open a connection, send, and leave it; some without a farewell."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=5) as connection:
        if sent and sent[0] & 1:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.settimeout(0.2)
        connection.sendall(sent)


def zmtp(rng: random.Random, payloads: list[bytes]) -> bytes:
    return greeting(rng) + b"".join(frame(rng, payloads) for _ in range(rng.randrange(5)))
