"""The hub's socket: its options and keys, where it listens, and how one message is read from it."""

from __future__ import annotations

import ctypes
import secrets
import time
from collections.abc import Iterable, Sized
from dataclasses import dataclass

import zmq

from weightbus.control import messages as m
from weightbus.control.connection import KEEPALIVE
from weightbus.control.keys import Keys
from weightbus.errors import HubError
from weightbus.hub.curve_auth import CurveAuth
from weightbus.hub.flood_guard import Guard
from weightbus.hub.tcp_connection import framed

# Messages that a connection may leave unread before it is dropped.
MAX_UNREAD = 64

_POLLIN = int(zmq.POLLIN)  # as a plain number, which is much faster to compare with

# To have the address again where the hub listens anew.
BIND_S = 5.0


@dataclass(slots=True, kw_only=True)
class Received:
    """What one message brought besides its connection's identity.

    number: of the connection's descriptor; -1 where the message is to be forgotten. user: the sender's public
    key, by which ``Listener.key_role`` tells what it may do; empty without keys. nbytes: on the wire.
    """

    number: int
    user: str
    frames: list[bytes]
    nbytes: int


class Listener:
    """One ROUTER socket, bound to ``address``, with what guards it.

    Raises HubError for an address that others could reach and no keys, or that can't be listened on.
    """

    def __init__(self, address: str, keys: Keys) -> None:
        keys.check(address)
        if keys.client and not keys.hub_secret:
            raise HubError("keys: expected hub.secret where the hub runs, got a client's keys only")
        # libzmq counts up from C's rand() the names of connections that give none, and ends the process where a
        # peer has taken the next one: unseeded, that is 0x6b8b4567.
        ctypes.CDLL(None).srand(secrets.randbits(32))
        self._address = address
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 500),
            (zmq.IPV6, 1),
            (zmq.MAXMSGSIZE, m.MAX_FRAME_BYTES),
            (zmq.SNDHWM, MAX_UNREAD),
            (zmq.RCVHWM, 0),  # Guard's business
            # A full or vanished connection is an error at once, not a wait or a silent loss.
            (zmq.ROUTER_MANDATORY, 1),
            # A rank that connects again takes over from its own half-open connection.
            (zmq.ROUTER_HANDOVER, 1),
            (zmq.HANDSHAKE_IVL, 5000),
            *KEEPALIVE,
            # With one, libzmq refuses ZMTP 1.0 and 2.0, for which it takes whatever else is sent, as HTTP.
            (zmq.ZAP_DOMAIN, b"weightbus"),
        ):
            self.socket.setsockopt(option, value)
        self.auth = CurveAuth(self._context, keys) if keys.hub_secret else None
        if self.auth:
            self.auth.protect(self.socket)
        self.guard = Guard(self.socket)
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise HubError(f"address: can't listen on {address}: {error}") from error

    def poller(self) -> zmq.Poller:
        """Of all that comes by the socket."""
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self.guard.events, zmq.POLLIN)
        if self.auth:
            poller.register(self.auth.socket, zmq.POLLIN)
        return poller

    def listen_again(self) -> None:
        """Close all connections, and listen with the hub's key as it is now.

        Raises HubError if the address is not free in time: it is once ZeroMQ's own thread has closed it.
        """
        self.socket.unbind(self._address)
        if self.auth:
            self.auth.protect(self.socket)
        deadline = time.monotonic() + BIND_S
        while True:
            try:
                self.socket.bind(self._address)
                return
            except zmq.ZMQError as error:
                if time.monotonic() > deadline:
                    raise HubError(f"address: can't listen on {self._address} again: {error}") from error
                time.sleep(0.002)

    def is_ready(self) -> bool:
        """Whether there is a message to take."""
        return bool(int(self.socket.get(zmq.EVENTS)) & _POLLIN)

    def take(self) -> zmq.Frame | None:
        """The first frame of the next message, which is its connection's identity; None if there is none."""
        try:
            return self.socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None

    def skip(self, first: zmq.Frame) -> int:
        """Forget the rest of a message; its bytes on the wire."""
        return self._wire_bytes(self.socket.recv_multipart() if first.more else [])

    def read(self, first: zmq.Frame) -> Received:
        """The rest of a message."""
        try:
            number = int(first.get(zmq.SRCFD))
        except zmq.ZMQError:
            number = -1  # ZMTP 1.0 or 2.0: what comes by these is read, and forgotten
        user = ""
        if self.auth:
            try:
                user = str(first.get("User-Id"))
            except zmq.ZMQError:
                number = -1  # no key that was looked at
        frames: list[bytes] = []
        nbytes = 0
        frame = first
        while frame.more:
            frame = self.socket.recv(copy=False)
            nbytes += self._wire_bytes((frame,))
            # No message has more than two: what is behind them is read, and forgotten.
            if len(frames) < 3:
                frames.append(frame.bytes)
        return Received(number=number, user=user, frames=frames, nbytes=nbytes)

    def key_role(self, user: str) -> str | None:
        """What a sender's key is limited to, "" if to nothing; None if the key was retired."""
        return self.auth.role(user) if self.auth else ""

    def _wire_bytes(self, frames: Iterable[Sized]) -> int:
        return sum(framed(len(frame), curve=self.auth is not None) for frame in frames)

    def close(self) -> None:
        self.guard.close()
        self.socket.close()
        if self.auth:
            self.auth.close()
        self._context.term()
