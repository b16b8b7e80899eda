"""Knows the connections of the hub's socket, holds back those that send faster than it reads, and cuts those
that fill its memory or its descriptors.

ZeroMQ's own bound of waiting messages (ZMQ_RCVHWM) can't be used: a connection that it has stopped, and that is
then reset with a ZMTP ping in what is left, ends the process (libzmq 4.3.5, its issue 4364, ``out_event``). Nor
does it count frames of a message that is not whole, nor what closed connections have left. So the hub
compares what the kernel has received from each connection with what has come out of the socket, and what it
gave for a connection with what the other end has acknowledged. Where it falls behind, it has the kernel
drop the packets of whoever sends most, and those that open connections: TCP sends them again later.
Who has gone is known from the same events.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from collections import Counter
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from weightbus.control.messages import MAX_FRAME_BYTES
from weightbus.hub.tcp_connection import DATA, EVERYTHING, Connection, opened

# Bytes of a connection that may be inside the socket before it is held back, where the hub is behind.
MAX_STUCK_BYTES = 4 << 10
MAX_STUCK_BYTES_OF_MEMBER = 16 << 20

# Bytes of a message that has not become whole while the hub has read all that was: of one connection, of all
# strangers. The longest has two frames.
MAX_UNWHOLE_BYTES = 2 * MAX_FRAME_BYTES + (64 << 10)
MAX_UNWHOLE_BYTES_OF_ALL = 4 << 20

# Who was found so in so many looks, and for so long, is cut.
ENDLESS_LOOKS = 20
ENDLESS_S = 1.0

# Bytes of answers that a connection may leave unread, and all of them together.
MAX_UNREAD_BYTES = 8 << 20
MAX_UNREAD_BYTES_OF_ALL = 128 << 20

# What a member may have left unread of its rounds before it is sent more: one long message.
MAX_UNREAD_BYTES_OF_MEMBER = 256 << 20

# The connections are looked at as often as the process has grown by so much, for some time after that, and each
# second.
GROWTH_BYTES = 8 << 20
ALERT_S = 2.0

# With so much more than at its least, it is large: less may wait, and fewer are let in.
MAX_GROWTH_BYTES = 48 << 20

# How often it gives freed memory back to the system, while it is large; that takes milliseconds.
TRIM_S = 5.0

# Where the hub is behind and grows: new connections that are let in in so long. Of those that were held, so
# many are released at a time.
MAX_IN = 16
IN_EACH_S = 0.5

# What comes over a connection beside messages: a handshake; a peer's own heartbeats, in a second and in all.
HANDSHAKE_BYTES = 2048
PINGS_BYTES = 256
MAX_PINGS_BYTES = 64 << 10

# What has been shut for so long, and is open still, libzmq has lost sight of: its name had moved to another
# connection while it sent more than was read.
GHOST_S = 2.0

# Who has come or spoken within so long goes last for a want of descriptors.
RECENT_S = 2.0

_EVENTS = zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Guard:
    """Watches the connections of a bound socket. Where the kernel does not count (elsewhere than on Linux), no
    connection is held back or cut for bytes."""

    def __init__(self, watched: zmq.Socket[Any]) -> None:
        self._watched = watched
        self._connections: dict[int, Connection] = {}
        self._of: dict[bytes, Connection] = {}
        self._late: set[bytes] = set()  # of closed connections, of which messages may wait still
        self._heard_by: Counter[str] = Counter()
        self._of_members = 0
        self._size = 0  # of the process, when it was last looked at for a reason
        self._least = 1 << 62
        self._is_large = False
        self._alert_until = 0.0
        self._listener: Connection | None = None
        self._held: dict[Connection, None] = {}  # since longest first
        self.ghosts = 0  # connections that have been shut, and are open still, as of the last sweep
        self._is_shut = False  # nobody is let in
        self._let_in = 0
        self._next_in = self._next_trim = 0.0
        where = f"inproc://guard-{id(self)}"
        watched.monitor(where, _EVENTS)
        self.events = watched.context.socket(zmq.PAIR)
        self.events.setsockopt(zmq.RCVHWM, 0)  # a thread of ZeroMQ's would wait for room
        self.events.setsockopt(zmq.LINGER, 0)
        self.events.connect(where)

    def __len__(self) -> int:
        return len(self._connections)

    # -- who is there ------------------------------------------------------------------------------

    def look(self, now: float, *, sweep: bool = False) -> list[Connection]:
        """Take note of connections that have come; those that have gone. sweep: also those of which ZeroMQ did
        not say so, as when it listens no more."""
        gone: list[Connection] = []
        while int(self.events.get(zmq.EVENTS)) & zmq.POLLIN:
            event = parse_monitor_message(self.events.recv_multipart(zmq.NOBLOCK))
            number = int(event["value"])
            if event["event"] == zmq.EVENT_LISTENING:
                self._listener = opened(number, now)
                continue
            if (former := self._connections.pop(number, None)) is not None:
                self._held.pop(former, None)
                gone.append(former)
                self._forget(former)
                self._late.add(former.identity)
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._connections[number] = opened(number, now)
                self._let_in += 1
        if sweep:
            self.ghosts = sum(now - one.ended > GHOST_S for one in self._connections.values() if one.ended)
            for closed in [one for one in self._connections.values() if not one.is_open]:
                gone.append(self._connections.pop(closed.number))
                self._held.pop(closed, None)
                self._forget(closed)
        return gone

    def _forget(self, connection: Connection) -> None:
        if self._of.get(connection.identity) is connection:
            del self._of[connection.identity]
        peer = connection.peer
        self._is_of(connection, "")
        connection.peer = peer  # of which it was, to the end

    def took(self, number: int, identity: bytes, nbytes: int, now: float) -> list[Connection]:
        """A message has come out of the socket; connections that are found to have gone meanwhile."""
        gone: list[Connection] = []
        connection = self._connections.get(number)
        if connection is None or connection.identity != identity:
            gone = self.look(now)  # a descriptor is used again: that it was closed has been said before
            connection = self._connections.get(number)
            if connection is None:
                connection = self._connections[number] = opened(number, now)
        if connection.identity != identity:
            if connection.identity:
                if identity in self._late:
                    return gone  # of the connection that had this descriptor before
                self._forget(connection)
            # A name that has moved to another connection: what comes over the former one is read no more.
            if (former := self._of.get(identity)) is not None:
                self.shut(former, now)
            connection.identity, connection.peer, connection.taken = identity, "", 0
            self._of[identity] = connection
        connection.heard = now
        connection.taken += nbytes
        return gone

    def took_of(self, identity: bytes, nbytes: int) -> None:
        """A further message of a connection that is known."""
        if (connection := self._of.get(identity)) is not None:
            connection.taken += nbytes

    def is_here(self, identity: bytes, since: float = 0.0) -> bool:
        """Whether a connection by this name is open. since: that was accepted after that."""
        connection = self._of.get(identity)
        return connection is not None and connection.since >= since

    def is_of_member(self, identity: bytes) -> bool:
        return (connection := self._of.get(identity)) is not None and bool(connection.peer)

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

    def unread_by_members(self) -> bool:
        """Whether something that was sent to a member is still on its way."""
        mine = [one for one in self._connections.values() if one.peer]
        for one in mine:
            one.look()
        return any(one.unread > 0 for one in mine)

    def gave(self, identity: bytes, nbytes: int) -> None:
        if (connection := self._of.get(identity)) is not None:
            connection.given += nbytes

    def is_alert(self, now: float) -> bool:
        """Whether this process has just taken so much memory that its connections should be looked at."""
        try:
            with open("/proc/self/statm", "rb") as statm:
                size = int(statm.read().split()[1]) * _PAGE_BYTES
        except (OSError, ValueError, IndexError):
            return False
        if size - self._size > GROWTH_BYTES:
            self._size = size
            self._alert_until = now + ALERT_S
        self._size = min(self._size, size)
        self._least = min(self._least, size)
        self._is_large = size > self._least + MAX_GROWTH_BYTES
        return now < self._alert_until

    def bound(self, now: float, *, drained: bool, behind: bool, alert: bool) -> int:
        """Hold back who sends more than is read; cut who sends what is no message. How many were cut.

        drained: since the last time, the hub has had read all that was whole. behind: it has not for long.
        alert: and it grows.
        """
        unwhole: list[Connection] = []
        for connection in self._connections.values():
            received = connection.look()
            pings = min(PINGS_BYTES * (now - connection.since), MAX_PINGS_BYTES)
            stuck = received - connection.taken - HANDSHAKE_BYTES - int(pings)
            if connection.read != connection.taken or stuck <= 0:
                connection.looks, connection.progress = 0, now
            else:
                connection.looks += 1
            if drained and connection.looks:
                unwhole.append(connection)
            if behind and stuck > (MAX_STUCK_BYTES_OF_MEMBER if connection.peer else MAX_STUCK_BYTES):
                self._hold(connection)
            connection.stuck, connection.read = stuck, connection.taken
        endless = self._endless(unwhole)
        if drained:
            self._late.clear()
            self._release_some(now, endless)
        elif behind and alert:
            self._let_some_in(now)
        ended = [
            one
            for one in endless
            if self._is_large or (one.looks >= ENDLESS_LOOKS and now - one.progress > ENDLESS_S)
        ]
        for connection in ended:
            self.shut(connection, now)
        return len(ended)

    def _endless(self, unwhole: list[Connection]) -> list[Connection]:
        """Those that have sent more than a message, of which nothing became whole, are held back."""
        most = MAX_UNWHOLE_BYTES_OF_ALL // 4 if self._is_large else MAX_UNWHOLE_BYTES_OF_ALL
        of_all, endless = sum(one.stuck for one in unwhole if not one.peer), []
        for connection in sorted(unwhole, key=lambda one: -one.stuck):
            if connection.stuck > MAX_UNWHOLE_BYTES or (of_all > most and not connection.peer):
                of_all -= 0 if connection.peer else connection.stuck
                endless.append(connection)
                self._hold(connection)
        return endless

    def _let_some_in(self, now: float) -> None:
        """New connections, of which those that are not let in try again after a second."""
        if now >= self._next_in:
            self._next_in, self._let_in = now + IN_EACH_S, 0
            self._open()
        if self._let_in >= (MAX_IN // 4 if self._is_large else MAX_IN) and self._listener and not self._is_shut:
            self._is_shut = self._listener.hold(EVERYTHING)

    def _open(self) -> None:
        if self._is_shut and self._listener:
            self._is_shut = False
            self._listener.release()

    def _hold(self, connection: Connection) -> None:
        if connection not in self._held and connection.hold(DATA):
            self._held[connection] = None

    def _release(self, connection: Connection) -> None:
        if connection in self._held:
            del self._held[connection]
            connection.release()

    def _release_some(self, now: float, but: list[Connection]) -> None:
        """Members; and those who have been held longest."""
        released = [one for one in self._held if one not in but]
        for number, connection in enumerate(released):
            if connection.peer or number < MAX_IN:
                self._release(connection)
        self._open()
        if self._is_large and now >= self._next_trim:
            self._next_trim = now + TRIM_S
            _give_back()

    @property
    def holds(self) -> bool:
        return bool(self._held) or self._is_shut

    def spare(self, now: float) -> int:
        """Keep descriptors in reserve: strangers go. First who has said nothing, or long ago; then who could
        not speak yet; then who has just spoken. How many went."""
        surplus = len(self._connections) - _room()
        if surplus <= 0:
            return 0

        def rank(one: Connection) -> tuple[int, float]:
            seen = one.heard or one.since
            if now - seen >= RECENT_S:
                return (1 if one.heard else 0), seen
            return (3 if one.heard else 2), seen

        strangers = sorted((one for one in self._connections.values() if not one.peer), key=rank)
        for connection in strangers[:surplus]:
            self.shut(connection, now)
        return min(surplus, len(strangers))

    def is_full(self) -> bool:
        """Whether members' connections take so many descriptors that no further member is let in."""
        return self._of_members > _room() * 3 // 4

    def shut(self, connection: Connection, now: float) -> None:
        connection.ended = connection.ended or now
        self._release(connection)  # so that the other end is told
        connection.shut()

    def close(self) -> None:
        self._watched.disable_monitor()
        self.events.close(linger=0)


def _give_back() -> None:
    """Freed memory, to the system: where the C library keeps it, it would count as taken."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _room() -> int:
    """How many connections this process may have: an eighth of its descriptors, 32 at least, is kept free."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        limit = 1 << 20
    return max(16, limit - max(32, limit // 8) - 32)
