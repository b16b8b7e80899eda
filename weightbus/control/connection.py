"""One connection of a rank or a client to the hub."""

from __future__ import annotations

import secrets
import time
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.control.keys import Keys
from weightbus.errors import HubError

# A hub that takes no further piece of a long message for so long is not there.
PIECE_S = 10.0


# A host that has vanished is found by TCP. Not by ZMTP's heartbeats: where one is due on a connection that has
# ended while what it brought waits to be read, libzmq 4.3.5 ends the process (its issue 4364).
KEEPALIVE = (
    (zmq.TCP_KEEPALIVE, 1),
    (zmq.TCP_KEEPALIVE_IDLE, 2),
    (zmq.TCP_KEEPALIVE_INTVL, 2),
    (zmq.TCP_KEEPALIVE_CNT, 4),
    (zmq.TCP_MAXRT, 30_000),
)


class NotSent(HubError):
    """Nothing could be sent just now: there is no connection, as when keys do not match."""


class Connection:
    """One DEALER socket to the hub. For one thread at a time.

    It has a name that nobody guesses: by it the hub knows it again when the network has cut it. Names that
    ZeroMQ gives by itself are counted up, and whoever connects under one is sent what is for another.
    attempt: which of several keys the hub is expected to have. watched: ``closed_s`` is asked for.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        keys: Keys,
        *,
        attempt: int = 0,
        watched: bool = False,
    ) -> None:
        self.address = address
        self._socket = context.socket(zmq.DEALER)
        self._closed: float | None = None
        self.key_refused = False  # by the hub; where this connection is watched, and ``closed_s`` was asked for
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED
        self._events = self._socket.get_monitor_socket(events) if watched else None
        for option, value in (
            (zmq.LINGER, 500),
            (zmq.MAXMSGSIZE, m.MAX_MESSAGE_BYTES),
            # A hub that has much to read lets few in, and TCP would try ever more rarely.
            (zmq.CONNECT_TIMEOUT, 2000),
            (zmq.RECONNECT_IVL, 20),
            (zmq.RECONNECT_IVL_MAX, 500),
            *KEEPALIVE,
            (zmq.IPV6, 1),
            (zmq.ROUTING_ID, secrets.token_bytes(16)),
        ):
            self._socket.setsockopt(option, value)
        keys.protect_client(self._socket, attempt)
        self._socket.connect(address)

    def send(self, message: m.Message, peer: str = "") -> None:
        """peer: this rank's; long messages go in pieces, of which the hub takes some at a time."""
        try:
            for number, frames in enumerate(wire.encode_to_hub(message, peer)):
                if number:
                    self._socket.poll(round(PIECE_S * 1000), zmq.POLLOUT)
                self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again as error:
            raise NotSent(f"could not send {type(message).__name__} to {self.address}") from error

    def receive(self, timeout_s: float, *, spin_s: float = 0.0) -> wire.FromHub | None:
        """The next message, or None after ``timeout_s``. Raises ProtocolError.

        spin_s: how long to look again and again before waiting, which is woken up late.
        """
        if spin_s:
            until = time.monotonic() + min(spin_s, timeout_s)
            while not self._socket.poll(0) and time.monotonic() < until:
                pass
        if not self._socket.poll(max(0, round(timeout_s * 1000))):
            return None
        return wire.decode_from_hub(self._socket.recv_multipart())

    def closed_s(self) -> float:
        """For how long the hub has had the connection closed; 0 while it is open, or not yet open."""
        while self._events is not None and self._events.poll(0):
            event = parse_monitor_message(self._events.recv_multipart())
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._closed, self.key_refused = None, False
                continue
            self.key_refused |= event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            if self._closed is None:
                self._closed = time.monotonic()
        return 0.0 if self._closed is None else time.monotonic() - self._closed

    def close(self) -> None:
        if self._events is not None:
            self._socket.disable_monitor()
            self._events.close(linger=0)
        self._socket.close()
