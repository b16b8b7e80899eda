"""Who may connect: answers ZeroMQ's authentication requests (RFC 27, ZAP) from the list of allowed keys."""

from __future__ import annotations

import logging
from typing import Any

import zmq
from zmq.utils import z85

from weightbus.errors import HubError
from weightbus.keys import Keys
from weightbus.roles import KEY_ROLES

# ZeroMQ carries no empty user id.
ANY_ROLE = "any"

log = logging.getLogger("weightbus.hub")


class Door:
    """Makes a socket a CURVE server, and lets in whom ``keys.admits()`` names.

    Lives in the hub's own loop: ``socket`` is polled beside the main one, and ``answer`` called.
    """

    def __init__(self, context: zmq.Context[Any], keys: Keys) -> None:
        self.refused = 0
        self._keys = keys
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind("inproc://zeromq.zap.01")

    def protect(self, socket: zmq.Socket[Any]) -> None:
        """Before ``bind``."""
        socket.curve_secretkey = self._keys.hub_secret.encode()
        socket.curve_server = True
        socket.zap_domain = b"weightbus"

    def answer(self) -> None:
        """Answer all requests that wait."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.socket.send_multipart(self._decide(frames))

    def _decide(self, frames: list[bytes]) -> list[bytes]:
        version, request = (*frames, b"", b"")[:2]
        code, text, user = b"400", b"not allowed", b""
        if len(frames) == 7 and version == b"1.0" and frames[5] == b"CURVE" and len(frames[6]) == 32:
            public = z85.encode(frames[6]).decode()
            try:
                if (role := self._keys.roles().get(public)) is not None:
                    code, text, user = b"200", b"OK", _user(role)
            except HubError as error:  # the list can't be read just now
                log.error("%s", error)
                code, text = b"300", b"try again"
        if code != b"200":
            self.refused += 1
        return [b"1.0", request, code, text, user, b""]

    def close(self) -> None:
        self.socket.close()


def _user(role: str) -> bytes:
    """What the socket gives as the user id of each message; a word that is no role gives no rights."""
    return (role if role in KEY_ROLES else "unknown").encode() if role else ANY_ROLE.encode()
