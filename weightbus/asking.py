"""Requests to the hub from outside: a shell, an HTTP server, or a rank on behalf of its replica."""

from __future__ import annotations

import secrets
import time
from types import TracebackType
from typing import Any

import zmq

from weightbus import messages as m
from weightbus.errors import HubError
from weightbus.keys import Keys, load_keys
from weightbus.link import Connection
from weightbus.start import listens

# A hub answers what it knows at once.
ANSWER_S = 5.0

# What a task may take beyond its own deadlines.
SLACK_S = 15.0


class Asking:
    """One client of the hub at ``address``, which is no rank: it never says hello."""

    def __init__(self, address: str, keys: Keys | None = None) -> None:
        """keys: from the environment by default. Raises HubError where nothing listens at ``address``, or where
        it needs keys and there are none."""
        keys = keys or load_keys()
        keys.check(address)
        if not listens(address):
            raise HubError(f"no hub listens at {address}")
        self.address = address
        self._context: zmq.Context[Any] = zmq.Context()
        self._connection = Connection(self._context, address, keys)

    def send(
        self,
        task: m.Task,
        *,
        wait_s: float,
        run_s: float,
        frames: list[m.Frame] | None = None,
        payloads: list[bytes] | None = None,
    ) -> str:
        """Ask for a task; returns the id of the answer."""
        ask = m.AskTask(
            id=secrets.token_hex(8),
            task=task,
            wait_s=wait_s,
            run_s=run_s,
            frames=frames or [],
            payloads=payloads or [],
        )
        self._connection.send(ask)
        return ask.id

    def receive(self, id: str, timeout_s: float) -> m.TaskEnd | m.Replicas | None:
        """The answer to ``id``, or None after ``timeout_s``. Raises HubError if the hub can't read the ask."""
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self._connection.receive(max(0.0, deadline - time.monotonic()))
            if isinstance(answer, m.Refused):
                raise HubError(f"the hub at {self.address} refused a request: {answer.reason}")
            if isinstance(answer, m.TaskEnd | m.Replicas) and answer.id == id:
                return answer
            if answer is None:
                return None

    def run(
        self,
        task: m.Task,
        *,
        wait_s: float,
        run_s: float,
        frames: list[m.Frame] | None = None,
        payloads: list[bytes] | None = None,
    ) -> m.TaskEnd:
        """Ask for a task and wait for its end. Raises HubError if no end comes in its time."""
        id = self.send(task, wait_s=wait_s, run_s=run_s, frames=frames, payloads=payloads)
        limit_s = wait_s + 4 * run_s + SLACK_S
        answer = self.receive(id, limit_s)
        if not isinstance(answer, m.TaskEnd):
            raise HubError(f"no answer from the hub at {self.address} for {limit_s:.0f} s")
        return answer

    def replicas(self) -> m.Replicas:
        """What the hub knows of the replicas. Raises HubError if it does not answer."""
        id = secrets.token_hex(8)
        self._connection.send(m.AskReplicas(id=id))
        answer = self.receive(id, ANSWER_S)
        if not isinstance(answer, m.Replicas):
            raise HubError(f"no answer from the hub at {self.address} for {ANSWER_S:.0f} s")
        return answer

    def close(self) -> None:
        self._connection.close()
        self._context.term()

    def __enter__(self) -> Asking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
