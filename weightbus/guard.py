"""Cuts connections that fill the hub's memory where ZeroMQ's own limits do not reach.

A frame's size and the number of waiting messages are bounded, but ZeroMQ keeps the frames of a message
until its last one is there, however many there are. So the hub compares what each connection has sent, as
the kernel counts it, with what has come out of the socket, and shuts it down when too much is stuck.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import time
from collections import Counter
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

# Bytes that may be inside the socket, unread or of messages not yet whole: of one connection, of all.
MAX_STUCK_BYTES = 64 << 20
MAX_STUCK_BYTES_OF_ALL = 512 << 20

# What framing and encryption add to a message at most, and heartbeats in a second.
OVERHEAD_BYTES = 256

# struct tcp_info: tcpi_bytes_received, since Linux 4.1.
_INFO_BYTES = 232
_RECEIVED = struct.Struct("=Q")
_RECEIVED_AT = 128


class Guard:
    """Watches the connections of a bound socket. Where the kernel does not count, it does nothing.

    taken: bytes that came out of the socket, by the connection's file descriptor; the owner adds to it.
    """

    def __init__(self, watched: zmq.Socket[Any]) -> None:
        self.taken: Counter[int] = Counter()
        self._watched = watched
        self._events = watched.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._since: dict[int, float] = {}

    def look(self) -> None:
        """Take note of connections that have come and gone."""
        while self._events.poll(0):
            event = parse_monitor_message(self._events.recv_multipart())
            number = int(event["value"])
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._since[number] = time.monotonic()
            else:
                self._since.pop(number, None)
                self.taken.pop(number, None)

    def cut(self) -> int:
        """Shut down the connections of which too much is stuck; how many were."""
        now = time.monotonic()
        stuck = {}
        for number, since in self._since.items():
            received = _received(number)
            if received is not None:
                stuck[number] = received - self.taken[number] - int(OVERHEAD_BYTES * (now - since))
        total = sum(stuck.values())
        cut = 0
        for number, nbytes in sorted(stuck.items(), key=lambda item: -item[1]):
            if nbytes > MAX_STUCK_BYTES or (total > MAX_STUCK_BYTES_OF_ALL and nbytes > 1 << 20):
                total -= nbytes
                cut += 1
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
        return cut

    def close(self) -> None:
        self._watched.disable_monitor()
        self._events.close(linger=0)


def _received(number: int) -> int | None:
    """Bytes that have arrived on a connection by its file descriptor; None if it is none any more."""
    if sys.platform != "linux":
        return None
    try:
        with socket.socket(fileno=os.dup(number)) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    except OSError:
        return None
    return int(_RECEIVED.unpack_from(info, _RECEIVED_AT)[0]) if len(info) >= _RECEIVED_AT + 8 else None
