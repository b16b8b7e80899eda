"""A server that half-open and idle connections do not starve: each has a time for its head, and the oldest of
too many gives way. Bodies are bounded in ``http_guard``."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0
"""From a connection, or the answer before, to the end of a request's headers."""

MAX_CONNECTIONS = 256


class PatientProtocol(H11Protocol):
    """One connection."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        connections = [
            one
            for one in self.connections
            if isinstance(one, PatientProtocol) and not one.transport.is_closing()
        ]
        if len(connections) > MAX_CONNECTIONS:
            waiting = [one for one in connections if one.awaits_client and one is not self]
            oldest = min(waiting or [self], key=lambda one: one.since)
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    @property
    def awaits_client(self) -> bool:
        """Whether it is the client's turn: to ask, or to send the rest of a body."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _wait(self) -> None:
        self._stop_waiting()
        self.since = self.loop.time()
        self._late = self.loop.call_later(HEAD_S, self._end)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _end(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def serve(app: FastAPI, host: str, port: int) -> None:
    uvicorn.run(app, host=host, port=port, log_level="warning", http=PatientProtocol)
