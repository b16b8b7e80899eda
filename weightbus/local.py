"""Unix sockets between the hub and the ranks of its own host, beside ZeroMQ.

A message that goes through ZeroMQ wakes two of its I/O threads on the way, and each of these costs more than
all that is done with the message. Here the reader alone is woken up, or looks for itself. A rank joins by
ZeroMQ, is told the name of this socket, connects, and says there by a beat which peer it is. The answer to
that is the hub's last message through ZeroMQ: from then on all messages of the two go this way, but for
heartbeats. If the connection ends, its other end has.

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
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from weightbus.errors import ProtocolError

_NUMBER = struct.Struct("<I")
_READ_BYTES = 64 << 10

# Writes in one go, so that a long message to one rank does not keep the others waiting.
_WRITES = 64

# Connections that have not said whose they are: how many there may be, and for how long.
MAX_STRANGERS = 64
STRANGER_S = 5.0


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
        self._unsent.append(deque([memoryview(head), *views]))
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
            raise ProtocolError(f"local: expected at most {self._max_frames} frames, got {count}")
        end = _NUMBER.size * (1 + count)
        if len(read) < end:
            return None
        lengths = struct.unpack_from(f"<{count}I", read, _NUMBER.size)
        if sum(lengths) > self._max_bytes:
            raise ProtocolError(f"local: expected at most {self._max_bytes} bytes, got {sum(lengths)}")
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

    @property
    def has_begun(self) -> bool:
        """Whether a part of a message is here, of which the rest is on its way."""
        return bool(self._read)

    def wait(self, timeout_s: float, events: int = select.POLLIN) -> bool:
        """Until there is something to receive, or room to send (POLLOUT); whether there is."""
        poll = select.poll()
        poll.register(self._socket, events)
        return bool(poll.poll(max(0, round(timeout_s * 1000))))

    def close(self) -> None:
        """The other end is told at once."""
        with contextlib.suppress(OSError):  # it is gone already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


_opened: weakref.WeakSet[LocalSocket] = weakref.WeakSet()


def _close_in_child() -> None:
    """A process that was forked is no rank: if it held the connection, that would outlive the rank."""
    for connection in list(_opened):
        connection._socket.close()


os.register_at_fork(after_in_child=_close_in_child)


def connect(name: str, *, max_frames: int, max_bytes: int) -> LocalSocket | None:
    """A connection to the hub that listens under ``name``; None where it can't be reached, as from another
    host or network namespace, or just now, as it has too many waiting. It never waits."""
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:
        return None
    try:
        connection.setblocking(False)
        connection.connect(f"\0{name}")
    except OSError:
        connection.close()
        return None
    return LocalSocket(connection, max_frames=max_frames, max_bytes=max_bytes)


class LocalServer:
    """The hub's end: it listens, and has a connection with each rank of its host.

    ``name`` is a random one in Linux's abstract namespace: no file is left behind. Empty where there is none.
    """

    def __init__(self, *, max_frames: int, max_bytes: int, max_unsent: int) -> None:
        self._limits = max_frames, max_bytes
        self._max_unsent = max_unsent
        self._sockets: dict[bytes, LocalSocket] = {}
        self._identities: dict[int, bytes] = {}
        self._strangers: dict[bytes, float] = {}
        self.name = f"weightbus-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        try:
            self._epoll = select.epoll()
            self._listener.bind(f"\0{self.name}")
            self._listener.listen(128)
            self._epoll.register(self._listener, select.EPOLLIN)
        except (AttributeError, OSError):
            self.name = ""

    def fileno(self) -> int:
        """Readable once ``receive`` has something to do. Only of one that has a name."""
        return self._epoll.fileno()

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._sockets

    def receive(self) -> Iterator[tuple[bytes, list[bytes] | None]]:
        """What has come: whose it is, and a message's frames, or None if the connection has ended."""
        for number, events in self._epoll.poll(0) if self.name else []:
            if number == self._listener.fileno():
                self._accept()
                continue
            if (identity := self._identities.get(number)) is None:
                continue  # closed while what others said was handled
            connection = self._sockets[identity]
            try:
                messages = connection.receive() if events & ~select.EPOLLOUT else []
            except (OSError, ProtocolError):
                self.close(identity)
                yield identity, None
                continue
            if events & select.EPOLLOUT:
                try:
                    done = connection.flush()
                except OSError:
                    done = True  # nobody reads it, but what the other end has said before may still be here
                if done:
                    self._epoll.modify(number, select.EPOLLIN)
            for frames in messages:
                if identity not in self._sockets:
                    break  # closed for what was said before
                yield identity, frames

    def send(self, identity: bytes, frames: Sequence[Any]) -> bool:
        """False if the other end has too much unread. That it is gone, ``receive`` tells."""
        connection = self._sockets[identity]
        if connection.unsent >= self._max_unsent:
            return False
        with contextlib.suppress(OSError):
            connection.send(frames)
            if connection.unsent:
                self._epoll.modify(connection.fileno(), select.EPOLLIN | select.EPOLLOUT)
        return True

    def is_stranger(self, identity: bytes) -> bool:
        return identity in self._strangers

    def admit(self, identity: bytes) -> None:
        """It has said whose it is."""
        self._strangers.pop(identity, None)

    def expire(self) -> None:
        """Close connections that have not said whose they are."""
        limit = time.monotonic() - STRANGER_S
        for identity in [i for i, since in self._strangers.items() if since < limit]:
            self.close(identity)
        if self.name:
            self._epoll.modify(self._listener, select.EPOLLIN)

    def close(self, identity: bytes) -> None:
        if (connection := self._sockets.pop(identity, None)) is None:
            return
        self._strangers.pop(identity, None)
        del self._identities[connection.fileno()]
        self._epoll.unregister(connection.fileno())
        connection.close()

    def close_all(self) -> None:
        for identity in list(self._sockets):
            self.close(identity)
        self._listener.close()
        if self.name:
            self._epoll.close()

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            # It has gone again, or too many files are open: not to be told so again before ``expire``.
            self._epoll.modify(self._listener, 0)
            return
        try:
            self._epoll.register(accepted, select.EPOLLIN)
        except OSError:
            accepted.close()
            return
        if len(self._strangers) >= MAX_STRANGERS:
            self.close(next(iter(self._strangers)))
        identity = secrets.token_bytes(16)  # which nobody can take as the name of a ZeroMQ connection
        max_frames, max_bytes = self._limits
        connection = LocalSocket(accepted, max_frames=max_frames, max_bytes=max_bytes)
        self._sockets[identity] = connection
        self._identities[connection.fileno()] = identity
        self._strangers[identity] = time.monotonic()
