"""A Unix socket between the hub and a rank of its host, beside the rank's ZeroMQ connection.

A message through ZeroMQ wakes an I/O thread in the sender and one in the receiver before the receiver itself.
Here the receiver alone is woken up, or looks by itself. The rank listens under a random name, and tells that
with the beat by which it takes its role. The hub connects, and answers the beat there: from then on all that
the two say goes this way. So the hub has no further door: who is not let in by ZeroMQ has no such socket.

On the wire: of each message, how many frames it has, their lengths, and the frames; numbers of 4 bytes,
little-endian. The frames are those of wire.py.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import struct
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from weightbus.errors import ProtocolError

_NUMBER = struct.Struct("<I")
_READ_BYTES = 64 << 10

# Writes in one go, so that a long message to one rank does not keep the others waiting.
_WRITES = 64

# Connections that may wait to be accepted: the hub's, and those of who has seen the name on this host.
_WAITING = 8


class LocalSocket:
    """One end of a connection. It never waits: what can't be written yet is kept. For one thread at a time.

    max_frames, max_bytes: of a message from the other end.
    """

    def __init__(self, connection: socket.socket, *, max_frames: int, max_bytes: int) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._max_frames, self._max_bytes = max_frames, max_bytes
        self._room = bytearray(_READ_BYTES)  # kept, as a look must not take longer than it needs to
        self._read = bytearray()
        self._first_bytes = 0  # length of the message that ``_read`` begins with, once that is known
        self._unsent: deque[deque[memoryview]] = deque()  # of each message, what is left of it
        self.unsent_bytes = 0
        _opened.add(self)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unsent(self) -> int:
        """Messages that are not all written."""
        return len(self._unsent)

    def send(self, frames: Sequence[Any]) -> None:
        """frames: bytes, or anything with their buffer. Raises OSError if the other end is gone."""
        views = [memoryview(frame) for frame in frames]
        lengths = [len(views), *(view.nbytes for view in views)]
        head = b"".join(map(_NUMBER.pack, lengths))
        if sum(lengths) < _READ_BYTES:
            views, head = [], b"".join([head, *views])
        self._unsent.append(deque([memoryview(head), *(view for view in views if view.nbytes)]))
        self.unsent_bytes += len(head) + sum(view.nbytes for view in views)
        self.flush()

    def flush(self) -> bool:
        """Write some of what can be written; whether that was all. Raises OSError if the other end is gone."""
        for _ in range(_WRITES):
            if not self._unsent:
                break
            message = self._unsent[0]
            try:
                sent = self._socket.send(message[0])
            except BlockingIOError:
                break
            self.unsent_bytes -= sent
            if sent < message[0].nbytes:
                message[0] = message[0][sent:]
                continue
            message.popleft()
            if not message:
                self._unsent.popleft()
        return not self._unsent

    def receive(self) -> list[list[bytes]]:
        """The frames of the messages that one look makes whole.

        Raises ConnectionError if the other end is gone, ProtocolError for a message that is too long.
        """
        try:
            nbytes = self._socket.recv_into(self._room)
        except BlockingIOError:
            return []
        if not nbytes:
            raise ConnectionResetError("the other end has closed the connection")
        self._read += memoryview(self._room)[:nbytes]
        messages = []
        while (frames := self._first()) is not None:
            messages.append(frames)
        return messages

    def _first(self) -> list[bytes] | None:
        """Take the first message out of what was read, if all of it is there."""
        read = self._read
        if len(read) < max(_NUMBER.size, self._first_bytes):
            return None
        (count,) = _NUMBER.unpack_from(read)
        if count > self._max_frames:
            raise ProtocolError(f"local socket: expected at most {self._max_frames} frames, got {count}")
        end = _NUMBER.size * (1 + count)
        if len(read) < end:
            return None
        lengths = struct.unpack_from(f"<{count}I", read, _NUMBER.size)
        if sum(lengths) > self._max_bytes:
            raise ProtocolError(f"local socket: expected at most {self._max_bytes} bytes, got {sum(lengths)}")
        self._first_bytes = end + sum(lengths)
        if len(read) < self._first_bytes:
            return None
        frames = []
        for length in lengths:
            frames.append(bytes(read[end : end + length]))
            end += length
        del read[:end]
        self._first_bytes = 0
        return frames

    def wait(self, timeout_s: float) -> bool:
        """Until there is something to receive, or room for what is unsent; whether there is."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        return bool(poll.poll(max(0, round(timeout_s * 1000))))

    def close(self) -> None:
        """The other end is told at once."""
        with contextlib.suppress(OSError):  # it is gone already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


_opened: weakref.WeakSet[LocalSocket] = weakref.WeakSet()


def _close_in_child() -> None:
    """A process that was forked is no rank: if it held the connection, that would outlive the rank."""
    for one in list(_opened):
        one._socket.close()


os.register_at_fork(after_in_child=_close_in_child)


class LocalListener:
    """A rank's end until the hub has connected. name: a random one in Linux's abstract namespace, so that no
    file is left behind; empty where there is none."""

    def __init__(self) -> None:
        self.name = f"weightbus-{secrets.token_hex(16)}"
        with contextlib.ExitStack() as stack:
            try:
                self._socket = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                self._socket.setblocking(False)
                self._socket.bind(f"\0{self.name}")
                self._socket.listen(_WAITING)
                stack.pop_all()
            except (AttributeError, OSError):  # no such sockets, or no descriptor for one
                self.name = ""

    def fileno(self) -> int:
        """Readable once somebody has connected. Only of one that has a name."""
        return self._socket.fileno()

    def accept(self, *, max_frames: int, max_bytes: int) -> LocalSocket | None:
        """One who has connected: the hub, if its first message tells what only the hub knows."""
        try:
            accepted, _ = self._socket.accept()
        except OSError:
            return None
        return LocalSocket(accepted, max_frames=max_frames, max_bytes=max_bytes)

    def close(self) -> None:
        if self.name:
            self._socket.close()


def connect(name: str, *, max_frames: int, max_bytes: int) -> LocalSocket | None:
    """A connection to the rank that listens under ``name``; None where it can't be reached, as from another
    host or network namespace, or has too many waiting. It never waits."""
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except (AttributeError, OSError):
        return None
    try:
        connection.setblocking(False)
        connection.connect(f"\0{name}")
    except OSError:
        connection.close()
        return None
    return LocalSocket(connection, max_frames=max_frames, max_bytes=max_bytes)
