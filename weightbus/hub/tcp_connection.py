"""A TCP connection of the hub's socket, by the file descriptor that ZeroMQ has for it.

What has come over it, what has been acknowledged, and how to hold it back, which ZeroMQ itself can't.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import sys
from dataclasses import dataclass

# struct tcp_info: tcpi_bytes_acked and tcpi_bytes_received, since Linux 4.1.
_INFO_BYTES = 232
_COUNTED = struct.Struct("=QQ")
_COUNTED_AT = 120

# What Python has no names for.
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27

# In BPF: which TCP segments are dropped.
Filter = tuple[tuple[int, int, int, int], ...]
EVERYTHING: Filter = ((0x06, 0, 0, 0),)
DATA: Filter = (
    (0x30, 0, 0, 12),  # A = byte 12, of which the upper half is the header's length in words
    (0x54, 0, 0, 0xF0),
    (0x74, 0, 0, 2),
    (0x07, 0, 0, 0),  # X = A
    (0x80, 0, 0, 0),  # A = the segment's length
    (0x2D, 0, 1, 0),  # if A > X
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),
)
_PROGRAMS = {
    what: ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in what))
    for what in (EVERYTHING, DATA)
}


@dataclass(slots=True, kw_only=True, eq=False)
class Connection:
    """One accepted connection, by its file descriptor.

    identity: by which the socket knows it; empty before its first message. peer: the member that was heard
    over it last. taken, given: bytes that came out of the socket and went into it. acked: of ``given``, as
    last seen. stuck, read: bytes inside the socket, and ``taken``, when it was looked at last. looks, progress:
    how often it was since, and when, something had come out of it. ended: since when it has been shut.
    """

    number: int
    since: float
    inode: int = 0
    identity: bytes = b""
    peer: str = ""
    heard: float = 0.0
    taken: int = 0
    given: int = 0
    acked: int = 0
    stuck: int = 0
    read: int = 0
    looks: int = 0
    progress: float = 0.0
    ended: float = 0.0

    @property
    def unread(self) -> int:
        return self.given - self.acked

    def look(self) -> int:
        """Bytes received so far; and note what was acknowledged."""
        counted = self._counted()
        if counted is None:
            # Where nobody counts, the number of messages is the only bound.
            self.acked = self.given
            return 0
        # Heartbeats are acknowledged, too; no peer saves them up.
        self.acked = min(self.given, counted[0])
        if counted[0] > self.given:
            self.given = self.acked = counted[0]
        return counted[1]

    @property
    def is_open(self) -> bool:
        """Whether the descriptor is this connection's still."""
        try:
            return os.fstat(self.number).st_ino == self.inode
        except OSError:
            return False

    def _borrowed(self) -> socket.socket | None:
        """ZeroMQ's descriptor, to be detached again. No descriptor of its own: there may be none left."""
        try:
            return (
                socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=self.number)
                if self.is_open
                else None
            )
        except OSError:
            return None

    def _counted(self) -> tuple[int, int] | None:
        """Bytes that the other end has acknowledged and that have come from it; None where nobody counts."""
        if sys.platform != "linux" or (borrowed := self._borrowed()) is None:
            return None
        try:
            info = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        except OSError:
            return None
        finally:
            borrowed.detach()
        return _COUNTED.unpack_from(info, _COUNTED_AT) if len(info) >= _COUNTED_AT + _COUNTED.size else None

    def hold(self, what: Filter) -> bool:
        """The kernel drops what comes for it, so that it comes again later."""
        program = struct.pack("@HL", len(what), ctypes.addressof(_PROGRAMS[what]))
        return self._set(_SO_ATTACH_FILTER, program)

    def release(self) -> None:
        self._set(_SO_DETACH_FILTER, 0)

    def shut(self) -> None:
        """ZeroMQ finds that it has ended, and so does the other end."""
        if (borrowed := self._borrowed()) is not None:
            with contextlib.suppress(OSError):
                borrowed.shutdown(socket.SHUT_RDWR)
            borrowed.detach()

    def _set(self, option: int, value: int | bytes) -> bool:
        if sys.platform != "linux" or (borrowed := self._borrowed()) is None:
            return False
        try:
            borrowed.setsockopt(socket.SOL_SOCKET, option, value)
        except OSError:
            return False
        finally:
            borrowed.detach()
        return True


def opened(number: int, now: float) -> Connection:
    try:
        inode = os.fstat(number).st_ino
    except OSError:
        inode = 0  # closed already
    return Connection(number=number, since=now, inode=inode)


def framed(nbytes: int, *, curve: bool) -> int:
    """Bytes of a frame on its way: what ZMTP 3 (RFC 23) and CURVE (RFC 26) add."""
    nbytes += 33 if curve else 0
    return nbytes + (2 if nbytes < 256 else 9)
