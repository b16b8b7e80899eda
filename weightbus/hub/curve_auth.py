"""Who may connect: answers ZeroMQ's authentication requests (RFC 27, ZAP) from the list of allowed keys."""

from __future__ import annotations

import logging
from typing import Any

import zmq
from zmq.utils import z85

from weightbus.control.keys import Keys

# How often the files of keys are looked at for changes.
LOOK_S = 0.25

log = logging.getLogger("weightbus.hub")


class CurveAuth:
    """Makes a socket a CURVE server, and lets in whom the list of allowed keys names, as it is at the moment.

    Lives in the hub's own loop: ``socket`` is polled beside the main one, and ``answer`` called. The user id
    of a message is its sender's public key; ``role`` tells what that may do now.
    """

    def __init__(self, context: zmq.Context[Any], keys: Keys) -> None:
        self.refused = 0
        self._keys = keys
        self._secret = keys.hub_secret
        self._next_look = 0.0
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind("inproc://zeromq.zap.01")

    def protect(self, socket: zmq.Socket[Any]) -> None:
        """Before ``bind``: by the secret as it is now."""
        self._secret = self._keys.hub_secret
        socket.curve_secretkey = self._secret.encode()
        socket.curve_server = True

    def look(self, now: float) -> None:
        """Take up what has changed in the files."""
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self._keys = self._keys.renewed()

    @property
    def has_new_secret(self) -> bool:
        """Whether the hub's own key is another one than the socket was bound with."""
        return bool(self._keys.hub_secret) and self._keys.hub_secret != self._secret

    def role(self, public: str) -> str | None:
        """What a key is limited to, \"\" if to nothing; None for one that is not, or no more, let in."""
        return self._keys.allowed.get(public)

    def answer(self) -> None:
        """Answer all requests that wait."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._keys = self._keys.renewed()
            self.socket.send_multipart(self._decide(frames))

    def _decide(self, frames: list[bytes]) -> list[bytes]:
        version, request = (*frames, b"", b"")[:2]
        code, text, user = b"400", b"not allowed", b""
        if len(frames) == 7 and version == b"1.0" and frames[5] == b"CURVE" and len(frames[6]) == 32:
            public = z85.encode(frames[6])
            if self.role(public.decode()) is not None:
                code, text, user = b"200", b"OK", public
        if code != b"200":
            self.refused += 1
        return [b"1.0", request, code, text, user, b""]

    def close(self) -> None:
        self.socket.close()
