"""One worker's subscriber, driven by an engine's remote calls: start, receive, finish."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from weightbus.control.client import Client
from weightbus.control.client_messages import Status
from weightbus.control.keys import Keys
from weightbus.errors import HubError, TornError, UpdateError
from weightbus.session.destination import State
from weightbus.subscriber import Subscriber
from weightbus.tensors.layout import Source

log = logging.getLogger("weightbus")

POLL_S = 0.5
"""How long a worker waits for an offer before it asks the hub whether one will come."""

AGAIN_S = 3.0
"""How long a worker waits, after an update that failed, for the trainer to try again without those at fault."""

GONE_S = 10.0
"""A worker that waits goes on when the hub has had no trainer for so long."""


class Receiver:
    """Takes the versions that an engine is told to take, one at a time, on one of its workers.

    For engines whose workers are called (``start``, ``receive``, ``finish``) on all ranks of a replica at once.
    Such a call keeps the worker, so it ends with each way that an update may end, also where this is refused on
    the trainer and so is never offered to servers.

    target, options: a Subscriber's. torn: the weights are known to be a mixture, until the next commit.
    Raises what a Subscriber does.
    """

    def __init__(
        self,
        target: Source,
        *,
        address: str | None = None,
        job: str | None = None,
        keys: Keys | str | os.PathLike[str] | None = None,
        insecure: bool = False,
        torn: bool = False,
        **options: Any,
    ) -> None:
        self._committed: int | None = None
        self._received: int | None = None
        self._wrong = torn  # or as a check has found, until the next commit, or check that finds it right
        self._known: set[tuple[int, float]] = set()
        self.subscriber = Subscriber(
            target,
            address=address,
            job=job,
            keys=keys,
            insecure=insecure,
            on_commit=self._commit,
            **options,
        )
        self._client = Client(address, job=job, keys=keys, insecure=insecure, timeout_s=5.0)

    @property
    def state(self) -> State:
        """The subscriber's; ``torn``, too, where a check has found other bytes than were committed."""
        return "torn" if self._wrong else self.subscriber.state

    def start(self) -> None:
        """An update begins: what has ended at the hub until now is none of it. Before the trainer calls."""
        self._received = None
        self._known = set(self._ended(self._status()))

    def receive(self, version: int, timeout_s: float) -> None:
        """Take part in the update to ``version``, for whose offer it waits ``timeout_s``.

        Raises UpdateError if nothing was written on this rank, TornError if its weights are a mixture, HubError
        if the hub is lost.
        """
        self._committed = self._received = None
        before, failed, until = self.subscriber.error, None, 0.0
        deadline, gone = time.monotonic() + timeout_s, 0.0
        while self._committed is None:
            took_part = self.subscriber.poll(POLL_S)
            if (error := self.subscriber.error) is not None and error is not before:
                before = error
                if self.subscriber.tried != version:
                    continue  # an offer that had come before this worker was told to wait
                if not self.subscriber.again:
                    raise error
                failed, until = error, time.monotonic() + AGAIN_S
            if took_part:
                continue
            if failed is not None:
                if time.monotonic() > until:
                    raise failed
                continue
            status = self._status()
            for key, reason in self._ended(status).items():
                if key[0] == version and key not in self._known:
                    raise UpdateError(f"version {version} was {reason}")
            gone = gone + POLL_S if status and all(peer.state for peer in status.peers) else 0.0
            if gone >= GONE_S or self.subscriber.left:
                raise UpdateError(f"version {version}: expected an offer, but the trainer has left the hub")
            if time.monotonic() > deadline:
                raise UpdateError(f"version {version}: expected an offer within {timeout_s:g} s, got none")
        if self._committed != version:
            raise UpdateError(f"expected version {version}, got version {self._committed} of the trainer's")
        self._received = version

    def check(self, timeout_s: float) -> str:
        """Take part in the trainer's next check, for whose offer it waits ``timeout_s``; its word.

        Raises TornError if this rank does not hold the bytes that were committed, or UpdateError.
        """
        self._received = None
        try:
            word = self.subscriber.wait_for_check(timeout_s)
        except TornError:
            self._wrong = True
            raise
        self._wrong = False
        self._received = self.subscriber.version
        return word

    def finish(self) -> int:
        """The version that was received since ``start``, or checked. Raises UpdateError if none was."""
        if self._received is None:
            raise UpdateError(
                f"finish: expected a version received since the update began, got none; "
                f"this rank is {self.state}" + (f": {self.subscriber.error}" if self.subscriber.error else "")
            )
        return self._received

    def close(self) -> None:
        """Leave the hub."""
        self._client.close()
        self.subscriber.close()

    def _commit(self, version: int | None) -> None:
        self._wrong = False
        if version is not None:
            self._committed = version

    def _status(self) -> Status | None:
        try:
            return self._client.status(past=16)
        except HubError:
            return None  # the subscriber notices by itself

    @staticmethod
    def _ended(status: Status | None) -> dict[tuple[int, float], str]:
        """Updates that have ended, by version and beginning; what became of each, if this rank took no part."""
        return {
            (one.version, one.began): "refused before servers heard of it: " + "; ".join(map(str, one.failures))
            if one.verdict == "failed"
            else "committed without this replica, which the hub leaves out for now"
            for one in (status.past if status else ())
            if one.kind == "update"
        }
