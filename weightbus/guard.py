"""Knows the connections of the hub's socket, and cuts those that fill its memory or its descriptors.

A frame's size and the number of waiting messages are bounded, but ZeroMQ keeps the frames of a message
until its last one is there, however many there are; and what a peer leaves unread is counted by it in messages
only. So the hub compares what the kernel has received from each connection with what has come out of the
socket, and what it gave for a connection with what the other end has acknowledged. Who has gone is known from
the same events.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

# Bytes that may be inside the socket, unread or of messages not yet whole: of one connection, of all.
MAX_STUCK_BYTES = 32 << 20
MAX_STUCK_BYTES_OF_ALL = 256 << 20

# Bytes of answers that a connection may leave unread, and all of them together.
MAX_UNREAD_BYTES = 8 << 20
MAX_UNREAD_BYTES_OF_ALL = 128 << 20

# What a member may have left unread of its rounds before it is sent more: one long message.
MAX_UNREAD_BYTES_OF_MEMBER = 256 << 20

# The connections are looked at as often as the process has grown by so much, and each second.
GROWTH_BYTES = 32 << 20

# What framing and encryption add to a message at most, and heartbeats in a second.
OVERHEAD_BYTES = 256

# struct tcp_info: tcpi_bytes_acked and tcpi_bytes_received, since Linux 4.1.
_INFO_BYTES = 232
_COUNTED = struct.Struct("=QQ")
_COUNTED_AT = 120

_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True, kw_only=True, eq=False)
class Connection:
    """One accepted connection, by its file descriptor.

    identity: by which the socket knows it; empty before its first message. peer: the member that was heard
    over it last. taken, given: bytes that came out of the socket and went into it. acked: of ``given``, as
    last seen.
    """

    number: int
    since: float
    identity: bytes = b""
    peer: str = ""
    heard: float = 0.0
    taken: int = 0
    given: int = 0
    acked: int = 0

    @property
    def unread(self) -> int:
        return self.given - self.acked

    def look(self) -> int:
        """Bytes received so far; and note what was acknowledged."""
        counted = _counted(self.number)
        if counted is None:
            # Where nobody counts, the number of messages is the only bound.
            self.acked = self.given
            return 0
        # Heartbeats are acknowledged, too; no peer saves them up.
        self.acked = min(self.given, counted[0])
        if counted[0] > self.given:
            self.given = self.acked = counted[0]
        return counted[1]


class Guard:
    """Watches the connections of a bound socket. Where the kernel does not count, it does not cut for bytes."""

    def __init__(self, watched: zmq.Socket[Any]) -> None:
        self._watched = watched
        self._connections: dict[int, Connection] = {}
        self._of: dict[bytes, Connection] = {}
        self._heard_by: Counter[str] = Counter()
        self._of_members = 0
        self._size = 0
        where = f"inproc://guard-{id(self)}"
        watched.monitor(where, _EVENTS)
        self.events = watched.context.socket(zmq.PAIR)
        self.events.setsockopt(zmq.RCVHWM, 0)  # a thread of ZeroMQ's would wait for room
        self.events.setsockopt(zmq.LINGER, 0)
        self.events.connect(where)

    def __len__(self) -> int:
        return len(self._connections)

    # -- who is there ------------------------------------------------------------------------------

    def look(self, now: float) -> list[Connection]:
        """Take note of connections that have come; those that have gone."""
        gone: list[Connection] = []
        while int(self.events.get(zmq.EVENTS)) & zmq.POLLIN:
            event = parse_monitor_message(self.events.recv_multipart(zmq.NOBLOCK))
            number = int(event["value"])
            if (former := self._connections.pop(number, None)) is not None:
                gone.append(former)
                self._forget(former)
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._connections[number] = Connection(number=number, since=now)
        return gone

    def _forget(self, connection: Connection) -> None:
        if self._of.get(connection.identity) is connection:
            del self._of[connection.identity]
        peer = connection.peer
        self._is_of(connection, "")
        connection.peer = peer  # of which it was, to the end

    def took(self, number: int, identity: bytes, nbytes: int, now: float) -> list[Connection]:
        """A message has come out of the socket; connections that are found to have gone meanwhile."""
        connection, gone = self._connections.get(number), []
        if connection is None or (connection.identity and connection.identity != identity):
            gone = self.look(now)  # a descriptor is used again: that it was closed has been said before
            connection = self._connections.get(number)
            if connection is None:
                connection = self._connections[number] = Connection(number=number, since=now)
        if connection.identity != identity:
            connection.identity = identity
            self._of[identity] = connection
        connection.heard = now
        connection.taken += nbytes
        return gone

    def is_here(self, identity: bytes) -> bool:
        return identity in self._of

    def heard(self, identity: bytes, peer: str) -> None:
        """A member has spoken over this connection."""
        connection = self._of.get(identity)
        if connection is not None and connection.peer != peer:
            self._is_of(connection, peer)

    def _is_of(self, connection: Connection, peer: str) -> None:
        former, connection.peer = connection.peer, peer
        self._of_members += bool(peer) - bool(former)
        if former:
            self._heard_by[former] -= 1
            if self._heard_by[former] <= 0:
                del self._heard_by[former]
        if peer:
            self._heard_by[peer] += 1

    def is_connected(self, peer: str) -> bool:
        """Whether a connection is open over which this member was heard."""
        return peer in self._heard_by

    # -- what they hold ----------------------------------------------------------------------------

    def has_room(self, identity: bytes, nbytes: int, *, member: bool = False) -> bool:
        """Whether so many bytes more may wait for this connection. member: they are of a member's round, whose
        messages are few, and long."""
        connection = self._of.get(identity)
        if connection is None:
            return True
        if member:
            if connection.unread > MAX_UNREAD_BYTES_OF_MEMBER:
                connection.look()
            return connection.unread <= MAX_UNREAD_BYTES_OF_MEMBER
        if connection.unread + nbytes > MAX_UNREAD_BYTES // 8:
            connection.look()
            if connection.unread + nbytes > MAX_UNREAD_BYTES:
                return False
            if self._unread_of_strangers() > MAX_UNREAD_BYTES_OF_ALL:
                for other in list(self._connections.values()):
                    other.look()
                return self._unread_of_strangers() <= MAX_UNREAD_BYTES_OF_ALL
        return True

    def _unread_of_strangers(self) -> int:
        return sum(min(one.unread, MAX_UNREAD_BYTES) for one in self._connections.values() if one.unread > 0)

    def gave(self, identity: bytes, nbytes: int) -> None:
        if (connection := self._of.get(identity)) is not None:
            connection.given += nbytes

    def has_grown(self) -> bool:
        """Whether this process has taken so much memory since that its connections should be looked at."""
        try:
            with open("/proc/self/statm", "rb") as statm:
                size = int(statm.read().split()[1]) * _PAGE_BYTES
        except (OSError, ValueError, IndexError):
            return False
        if size - self._size > GROWTH_BYTES:
            self._size = size
            return True
        self._size = min(self._size, size)
        return False

    def cut(self, now: float) -> int:
        """Shut down the connections of which too much is stuck; how many were."""
        stuck = []
        for connection in self._connections.values():
            received = connection.look()
            allowed = int(OVERHEAD_BYTES * (now - connection.since))
            stuck.append((received - connection.taken - allowed, connection))
        total = sum(nbytes for nbytes, _ in stuck if nbytes > 0)
        cut = 0
        for nbytes, connection in sorted(stuck, key=lambda one: -one[0]):
            if nbytes > MAX_STUCK_BYTES or (total > MAX_STUCK_BYTES_OF_ALL and nbytes > 1 << 20):
                total -= nbytes
                cut += 1
                self.shut(connection)
        return cut

    def spare(self) -> int:
        """Keep descriptors in reserve: who has been silent longest, and is no member, goes. How many went."""
        room = _room()
        surplus = len(self._connections) - room
        if surplus <= 0:
            return 0
        strangers = [one for one in self._connections.values() if not one.peer]
        strangers.sort(key=lambda one: (bool(one.heard), one.heard or one.since))
        for connection in strangers[:surplus]:
            self.shut(connection)
        return min(surplus, len(strangers))

    def is_full(self) -> bool:
        """Whether members' connections take so many descriptors that no further member is let in."""
        return self._of_members > _room() * 3 // 4

    def shut(self, connection: Connection) -> None:
        with contextlib.suppress(OSError):
            # No descriptor of its own: there may be none left.
            shared = socket.socket(fileno=connection.number)
            try:
                shared.shutdown(socket.SHUT_RDWR)
            finally:
                shared.detach()

    def close(self) -> None:
        self._watched.disable_monitor()
        self.events.close(linger=0)


def _room() -> int:
    """How many connections this process may have: an eighth of its descriptors, 32 at least, is kept free."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        limit = 1 << 20
    return max(16, limit - max(32, limit // 8) - 32)


def _counted(number: int) -> tuple[int, int] | None:
    """Bytes that the other end has acknowledged and that have come from it; None where nobody counts."""
    if sys.platform != "linux":
        return None
    try:
        connection = socket.socket(fileno=number)
    except OSError:
        return None
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    except OSError:
        return None
    finally:
        connection.detach()
    return _COUNTED.unpack_from(info, _COUNTED_AT) if len(info) >= _COUNTED_AT + _COUNTED.size else None
