"""Who may ask over HTTP, and how much: decided before a request's body is read, or while it is."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.security.utils import get_authorization_scheme_param

from weightbus.storage.bounded_json import check_values
from weightbus.storage.opened import short

BODY_VALUES = 1 << 18
"""JSON values of a request: digests of 1,000 tensors for each of 128 ranks have 130,000."""

PAUSE_S = 10.0
"""Between two pieces of a body."""

SLOWEST_BYTES_S = 1 << 20
"""Of a body, after its first PAUSE_S."""

MAX_REQUESTS = 16
"""Going on at a time; each waits for its task in a thread of the app's pool."""


class Refusal(Exception):
    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.status = message, status


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """token: what to ask for; None is none. hosts: names of the server, beside localhost and addresses."""

    token: str | None
    hosts: Collection[str] = ()

    def check(self, headers: Mapping[str, str]) -> None:
        """Raise Refusal, by the request's headers alone.

        A page in a browser can send requests to this host, by its address or by a name of its own that leads
        here. It can't hide its origin, nor the name.
        """
        host = headers.get("host", "")
        name = _hostname(host)
        # An own name of an attacker leads here only with a name in it. Who knows a token is no such page.
        known = name in self.hosts or name == "localhost" or _is_address(name)
        if host and not known and (self.token is None or self.hosts):
            raise Refusal(
                f"host: expected localhost, an address or a name given as hosts=, got {short(repr(host))}", 403
            )
        site, origin = headers.get("sec-fetch-site", "none"), headers.get("origin")
        same = origin is None or _place(origin) == host.lower() or _hostname(_place(origin)) in self.hosts
        if site not in ("none", "same-origin") or not same:
            raise Refusal(
                f"origin: expected no page of another site, got {short(repr(origin))} ({short(site)})", 403
            )
        if self.token is not None:
            self._check_token(self.token, headers.get("authorization"))

    def _check_token(self, token: str, header: str | None) -> None:
        if not token.strip():
            raise Refusal("authorization: this server was given an empty token, which lets nobody in", 401)
        scheme, given = get_authorization_scheme_param(header)
        right = hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())
        if scheme.lower() != "bearer" or not right:
            raise Refusal("authorization: expected the bearer token of this server, got another or none", 401)


def _hostname(host: str) -> str:
    """Without the port; "" for what can't be read as one."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _place(origin: str) -> str:
    """Host and port of an origin; "" for what can't be read as one."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Intake:
    """Bodies of the requests that are going on: each is bounded, and so are all together."""

    def __init__(self, body_bytes: int) -> None:
        """body_bytes: of one; all together may have twice as many."""
        self._limit, self._room = body_bytes, 2 * body_bytes
        self._requests = 0
        self._held = 0

    def enter(self) -> None:
        """Raises Refusal where enough requests are going on; else ``leave`` is due."""
        if self._requests >= MAX_REQUESTS:
            raise Refusal(f"busy: expected at most {MAX_REQUESTS} requests at a time; try again", 503)
        self._requests += 1

    def leave(self, body_bytes: int) -> None:
        self._requests -= 1
        self._held -= body_bytes

    async def read(self, request: Request, taken: list[bytes]) -> bytes:
        """The body; what has come is put into ``taken`` meanwhile, whose bytes count until ``leave``.

        Raises Refusal for one that is too large, announced or not, that comes too slowly, that is no JSON by
        its type, or has too many values.
        """
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._limit:
            raise Refusal(f"body: expected at most {self._limit} bytes, got {short(announced)}", 413)
        loop, seen = asyncio.get_running_loop(), 0
        begun = loop.time()
        while True:
            left = begun + PAUSE_S + seen / SLOWEST_BYTES_S - loop.time()
            try:
                message = await asyncio.wait_for(request.receive(), min(PAUSE_S, left))
            except asyncio.TimeoutError:
                text = f"body: expected a piece each {PAUSE_S:g} s, and {SLOWEST_BYTES_S} bytes/s; got {seen}"
                raise Refusal(text, 408) from None
            if message["type"] == "http.disconnect":
                raise Refusal("body: expected all of it, got an end of the connection")
            piece = message.get("body", b"")
            seen += len(piece)
            if seen > self._limit:
                raise Refusal(f"body: expected at most {self._limit} bytes, got more", 413)
            self._held += len(piece)
            taken.append(piece)
            if self._held > self._room:
                raise Refusal(f"busy: expected at most {self._room} bytes of all requests; try again", 503)
            if not message.get("more_body"):
                break
        body = b"".join(taken)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and kind != "application/json":
            raise Refusal(f"content-type: expected application/json, got {short(repr(kind))}", 415)
        try:
            check_values("body", body, BODY_VALUES)
        except ValueError as error:
            raise Refusal(str(error), 413) from error
        return body
