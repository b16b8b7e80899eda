"""One connection of a rank or a client to the hub."""

from __future__ import annotations

import secrets
import time
from collections import deque
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.control.keys import Keys
from weightbus.control.local_socket import LocalListener, LocalSocket
from weightbus.control.messages.tasks import MAX_PAYLOAD_BYTES, MAX_PAYLOADS
from weightbus.errors import HubError, ProtocolError

# Of a message from the hub by a Unix socket: an offer of a load, with all payloads that a request may have.
MAX_FRAMES = MAX_PAYLOADS + 2
MAX_BYTES = MAX_PAYLOAD_BYTES + m.MAX_MESSAGE_BYTES

# Who has connected where the hub is expected has so long to say what only the hub knows.
STRANGER_S = 0.2

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
    """One DEALER socket to the hub and, once ``expect`` was called and the hub is on this host, a Unix socket
    by which all then goes. For one thread at a time.

    It has a name that nobody guesses: by it the hub knows it again when the network has cut it. Names that
    ZeroMQ gives by itself are counted up, and whoever connects under one is sent what is for another.
    attempt: which of several keys the hub is expected to have. watched: ``closed_s`` is asked for; ``closings``
    is then how often the hub has closed the connection.
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
        self._local: LocalSocket | None = None
        self._listener: LocalListener | None = None  # until the hub has connected, or has answered without
        self._secret = ""  # which the hub says first
        self._inbox: deque[list[bytes]] = deque()  # frames of the messages that one look has brought
        self._closed: float | None = None
        self.closings = 0
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

    def expect(self, peer: str) -> str:
        """A name for the beat that takes a role, under which the hub may connect; empty where it has done so,
        or can't. peer: by which it will show that it is the hub."""
        if self._local is not None:
            return ""
        self._expect_no_more()
        self._listener, self._secret = LocalListener(), peer
        return self._listener.name

    def _expect_no_more(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    def send(self, message: m.Message, peer: str = "") -> None:
        """peer: this rank's; long messages go in pieces, of which the hub takes some at a time."""
        try:
            for number, frames in enumerate(wire.encode_to_hub(message, peer)):
                if self._local is not None:
                    try:
                        self._local.send(frames)
                        continue
                    except OSError:
                        self.end_local()
                if number:
                    self._socket.poll(round(PIECE_S * 1000), zmq.POLLOUT)
                self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again as error:
            raise NotSent(f"could not send {type(message).__name__} to {self.address}") from error

    def receive(self, timeout_s: float, *, spin_s: float = 0.0) -> wire.FromHub | None:
        """The next message, or None after ``timeout_s``. Raises ProtocolError.

        spin_s: how long to look again and again before waiting, which is woken up late.
        """
        until = time.monotonic() + timeout_s
        spin_until = time.monotonic() + min(spin_s, timeout_s) if spin_s else 0.0
        while True:
            if (message := self._look()) is not None:
                return message
            now = time.monotonic()
            if now < spin_until:
                continue
            if now >= until:
                return None
            self._wait(until - now)

    def _look(self) -> wire.FromHub | None:
        """The next message that is here."""
        if self._local is None and self._listener is not None:
            self._accept(self._listener)
        if self._local is not None and not self._inbox:
            try:
                self._local.flush()
                self._inbox += self._local.receive()
            except OSError:
                self.end_local()
        if self._inbox:
            return wire.decode_from_hub(self._inbox.popleft())
        if self._local is not None or not self._socket.poll(0):
            return None
        message = wire.decode_from_hub(self._socket.recv_multipart())
        if isinstance(message, m.Alive):
            self._expect_no_more()  # the hub has answered this way: it is on another host
        return message

    def _wait(self, timeout_s: float) -> None:
        """Until there may be something to look at."""
        if self._local is not None:
            self._local.wait(timeout_s)
        elif self._listener is None or not self._listener.name:
            self._socket.poll(round(timeout_s * 1000))
        else:
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            poller.register(self._listener.fileno(), zmq.POLLIN)
            poller.poll(round(timeout_s * 1000))

    def _accept(self, listener: LocalListener) -> None:
        """Who has connected, if that is the hub; any process of the host may have read the name."""
        found = listener.accept(max_frames=MAX_FRAMES, max_bytes=MAX_BYTES) if listener.name else None
        if found is None:
            return
        until = time.monotonic() + STRANGER_S
        try:
            while not (messages := found.receive()) and time.monotonic() < until:
                found.wait(until - time.monotonic())
            first = wire.decode_from_hub(messages[0]) if messages else None
        except (OSError, ProtocolError):
            first = None
        if isinstance(first, m.Alive) and first.peer == self._secret:
            self._local = found
            self._inbox += messages
            self._expect_no_more()
        else:
            found.close()

    def end_local(self) -> None:
        """Go by ZeroMQ again: the hub has gone, or this rank is no member any more."""
        local, self._local = self._local, None
        if local is not None:
            local.close()

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
                self.closings += 1
        return 0.0 if self._closed is None else time.monotonic() - self._closed

    def close(self) -> None:
        if self._events is not None:
            self._socket.disable_monitor()
            self._events.close(linger=0)
        self._expect_no_more()
        self.end_local()
        self._socket.close()
