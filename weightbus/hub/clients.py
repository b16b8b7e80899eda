"""Requests from outside: what clients ask of the hub, and of the trainer and servers through it."""

from __future__ import annotations

import time
from collections import Counter

import msgspec

from weightbus.control import client_messages as a
from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.errors import ProtocolError
from weightbus.hub.curve_auth import CurveAuth
from weightbus.hub.jobs import Handler, Jobs
from weightbus.hub.reassembly import Unfinished, check_objects
from weightbus.hub.requests import Request
from weightbus.hub.status import status_of
from weightbus.hub.turns import Turns

# What a client may have the hub wait for.
MAX_CLIENT_S = 3600.0

# A status of many ranks is made so often only.
STATUS_S = 0.25
MANY_PEERS = 256


class Clients:
    """Answers clients, who never say hello.

    token: the hub's, which whoever changes something names. counts: the hub's own. asked: requests with tensors
    that are not whole yet; all of them share the room of one.
    """

    def __init__(
        self, jobs: Jobs, token: str, counts: Counter[str], turns: Turns, auth: CurveAuth | None
    ) -> None:
        self._jobs, self._token, self._counts, self._turns, self._auth = jobs, token, counts, turns, auth
        self.asked: Unfinished[bytes] = Unfinished(together=m.MAX_PAYLOAD_BYTES)
        self._statuses: dict[str, tuple[float, a.Status]] = {}
        self._started = time.monotonic()
        self.handlers: dict[type[m.Message], Handler] = {
            a.AskStatus: self._status,
            a.AskPause: self._pause,
            a.AskResume: self._resume,
            m.AskTask: self._task,
            m.AskReplicas: self._replicas,
            **dict.fromkeys((a.AskUpdate, a.AskCheck, a.AskVersion), self._request),
        }

    def gone(self, identity: bytes, now: float) -> None:
        """A connection has been closed: what its client asked for is of no use to anyone any more."""
        self.asked.forget(identity)
        for job in self._jobs:
            job.coordinator.requests.gone(identity)
            job.coordinator.tasks.gone(identity, now)

    def add(self, identity: bytes, piece: m.Piece, now: float) -> m.Message | None:
        """Take a piece of a request that carries tensors; the request, once it is whole."""
        whole = self.asked.add(identity, piece.blob, last=piece.last, each=m.MAX_PAYLOAD_BYTES, now=now)
        if whole is None:
            return None
        check_objects(whole)
        message = wire.decode_to_hub([wire.HEADER, whole])
        if not isinstance(message, m.AskTask):
            raise ProtocolError(f"piece: expected a request with tensors, got {type(message).__name__}")
        return message

    def _task(self, identity: bytes, ask: m.AskTask, now: float) -> m.Message | None:
        if not self._turns.take(identity):
            return None
        if (refused := self._stranger(ask)) is not None:
            failure = m.Failure(rank="hub", tensor=None, reason=refused.reason.removeprefix("hub: "))
            return m.TaskEnd(id=ask.id, ok=False, verdict="failed", failures=[failure])
        ask.wait_s, ask.run_s = min(ask.wait_s, MAX_CLIENT_S), min(ask.run_s, MAX_CLIENT_S)
        coordinator = self._jobs.find(ask.job).coordinator
        coordinator.tasks.ask(identity, ask, now)
        coordinator.advance(now)
        return None

    def _replicas(self, identity: bytes, ask: m.AskReplicas, now: float) -> m.Message | None:
        if not self._turns.take(identity):
            return None
        coordinator = self._jobs.find(ask.job).coordinator
        return coordinator.tasks.replicas(ask.id, coordinator.round is not None)

    def _status(self, identity: bytes, ask: a.AskStatus, now: float) -> m.Message | None:
        if not self._turns.take(identity):
            return None
        made, status = self._statuses.get(ask.job, (0.0, None))
        if status is None or now - made > STATUS_S or ask.past:
            refused = self._auth.refused if self._auth else 0
            counts = dict(self._counts) | {"not_allowed": self._counts["not_allowed"] + refused}
            up_s, jobs = now - self._started, self._jobs.here
            coordinator = self._jobs.find(ask.job).coordinator
            status = status_of(coordinator, ask, self._token, up_s, counts, jobs, now)
            self._statuses.pop(ask.job, None)
            if len(status.peers) > MANY_PEERS:
                self._statuses[ask.job] = now, msgspec.structs.replace(status, past=[])
        return msgspec.structs.replace(status, id=ask.id)

    def _request(self, identity: bytes, ask: Request, now: float) -> m.Message:
        if (refused := self._stranger(ask)) is not None:
            return refused
        coordinator = self._jobs.find(ask.job).coordinator
        if isinstance(ask, a.AskVersion) and (reason := coordinator.unfit_version(ask.version)):
            return a.Answer(id=ask.id, ok=False, verdict="failed", reason=reason)
        ask.wait_s = min(ask.wait_s, MAX_CLIENT_S)
        return coordinator.requests.add(identity, ask, now)

    def _pause(self, identity: bytes, ask: a.AskPause, now: float) -> m.Message:
        if (refused := self._stranger(ask)) is not None:
            return refused
        for_s = min(ask.for_s, MAX_CLIENT_S)
        self._jobs.find(ask.job).coordinator.paused_until = now + for_s
        return a.Answer(id=ask.id, ok=True, reason=f"updates are held back for {for_s:.0f} s")

    def _resume(self, identity: bytes, ask: a.AskResume, now: float) -> m.Message:
        if (refused := self._stranger(ask)) is not None:
            return refused
        coordinator = self._jobs.find(ask.job).coordinator
        coordinator.paused_until = 0.0
        coordinator.advance(now)
        return a.Answer(id=ask.id, ok=True, reason="updates go on")

    def _stranger(self, ask: a.Command | m.AskTask) -> a.Answer | None:
        """What was recorded, at this hub's predecessor or elsewhere, or is for a job that is not here, is not
        done."""
        if ask.hub != self._token:
            reason = "hub: expected this hub's token"
        elif self._jobs.serves(ask.job):
            return None
        else:
            reason = f"job {ask.job!r}: expected one that has ranks here, {self._jobs.here}"
        self._counts["refused"] += 1
        return a.Answer(id=ask.id, ok=False, verdict="failed", reason=reason)
