"""Connections that no peer makes: greetings of every ZMTP, frames by hand, HTTP that is none; sent and left."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections import deque

from weightbus.control import wire

# So many connections stay open with a request or a greeting that is not whole.
KEPT = 100


def ready(kind: bytes) -> bytes:
    return b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind


READY = ready(b"DEALER")
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


def opening(kind: bytes = b"DEALER") -> bytes:
    """All that a socket of this kind says before its first message."""
    said = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    return said + b"\x04" + bytes([len(ready(kind))]) + ready(kind)


def framed(frames: list[bytes]) -> bytes:
    """One message."""
    lasts = [frame is frames[-1] for frame in frames]
    return b"".join(
        struct.pack(">BQ", 2 | (not last), len(frame)) + frame
        for frame, last in zip(frames, lasts, strict=True)
    )


# A ZMTP heartbeat.
PING = b"\x04\x0a\x04PING\x00\x00abc"


def named(name: bytes) -> bytes:
    """The whole greeting of a ZMTP 3.0 peer that chooses the name by which a ROUTER knows it."""
    ready = READY + b"\x08Identity" + struct.pack(">I", len(name)) + name
    return opening()[:64] + b"\x04" + bytes([len(ready)]) + ready


def frame(rng: random.Random, payloads: list[bytes]) -> bytes:
    """One frame: flags, a length that may boast, and some of what it announces."""
    body = rng.choice((wire.HEADER, b"", rng.choice(payloads), rng.randbytes(rng.randrange(300))))
    flags = rng.choice((0, 1, 2, 3, 4, 5, 6, 0x80, rng.randrange(256)))
    length = len(body) if rng.random() < 0.8 else rng.choice((0, 1, 255, 1 << 20, (1 << 63) - 1, (1 << 64) - 1))
    if flags & 2:
        return bytes([flags]) + struct.pack(">Q", length) + body
    return bytes([flags, length & 255]) + body


def request(rng: random.Random) -> bytes:
    """What an HTTP server takes or not: floods of headers, wrong lengths, chunks that are none."""
    method = rng.choice((b"GET", b"POST", b"PUT", b"OPTIONS", b"\x16\x03\x01", b"A" * 300))
    path = rng.choice((b"/health", b"/status", b"/update_weights_from_tensor", b"/../..", b"/" + b"a" * 5000))
    version = rng.choice((b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/" + b"9" * 50, b""))
    body = rng.randbytes(rng.randrange(200))
    headers = [b"Host: " + rng.choice((b"127.0.0.1", b"example.com", b"")), b"Content-Type: application/json"]
    lengths = (len(body), len(body) + 7, 0, 1 << 40, 1 << 80, -1)
    headers += [b"Content-Length: %d" % one for one in rng.choices(lengths, k=rng.choice((1, 1, 1, 0, 2)))]
    if rng.random() < 0.2:
        headers.append(b"Transfer-Encoding: chunked")
        body = rng.choice((b"0\r\n\r\n", b"%x\r\n" % rng.choice((5, 1 << 70)) + body, b"zz\r\n", body))
    if rng.random() < 0.1:
        headers += [b"X-%d: " % one + b"x" * rng.choice((1, 100)) for one in range(rng.choice((50, 2000)))]
    if rng.random() < 0.05:
        headers.append(b"X-Long: " + b"x" * rng.choice((5000, 200_000)))
    rng.shuffle(headers)
    return b"\r\n".join([method + b" " + path + b" " + version, *headers, b"", body])


def http(rng: random.Random) -> bytes:
    """Requests, one or many behind each other, whole and cut."""
    whole = b"".join(request(rng) for _ in range(rng.choice((1, 1, 1, 2, 20))))
    return whole if rng.random() < 0.7 else whole[: rng.randrange(len(whole))]


def connect(address: tuple[str, int], sent: bytes, kept: deque[socket.socket] | None = None) -> None:
    """Open a connection, send, and leave it, some without a farewell; or keep it, in place of the oldest."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as left:
        connection = left.enter_context(socket.create_connection(address, timeout=5))
        if sent and sent[0] & 1:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.settimeout(0.2)
        connection.sendall(sent)
        if kept is not None:
            left.pop_all()
            kept.append(connection)
            if len(kept) > KEPT:
                kept.popleft().close()


def zmtp(rng: random.Random, payloads: list[bytes]) -> bytes:
    return greeting(rng) + b"".join(frame(rng, payloads) for _ in range(rng.randrange(5)))
