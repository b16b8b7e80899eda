"""Ask the hub, from a shell, an HTTP server or any process: status, updates, loads. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import zmq

from weightbus.control import client_messages as a
from weightbus.control import messages as m
from weightbus.control.connection import Connection, NotSent
from weightbus.control.identity import address_of, job_of
from weightbus.control.keys import Keys, load_keys
from weightbus.errors import HubError, ProtocolError

# Beyond a request's own time, for the answer to come; and beyond all steps of a task.
SLACK_S = 5.0

# How often a client that waits looks whether keys have changed.
RENEW_S = 0.25

# How often one that waits for a request's end asks whether the hub is still there.
LOOK_S = 2.0
TASK_SLACK_S = 15.0

# Tensors in a request: of one module, or of several by name.
Payload = bytes | Mapping[str, bytes]


class _Vigil:
    """Whether the hub that was asked is still there, while its answer is waited for.

    One that has closed the connection has forgotten the request, though another one, or itself, may be back.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        connection.closed_s()
        self._closings, self._heard = connection.closings, time.monotonic()
        self._next = self._heard + LOOK_S

    def heard(self) -> None:
        self._heard = time.monotonic()

    def look(self, job: str) -> None:
        """Ask it for a sign of life, now and then. Raises HubError once it has gone, or is silent."""
        now, doubt = time.monotonic(), "; what it was asked may have been done"
        self._connection.closed_s()
        if self._connection.closings > self._closings:
            raise HubError(f"the hub at {self._connection.address} has closed the connection{doubt}")
        if now - self._heard > m.DEAD_AFTER_S + LOOK_S:
            text = f"has not answered for {now - self._heard:.0f} s{doubt}"
            raise HubError(f"the hub at {self._connection.address} {text}")
        if now >= self._next:
            self._next = now + LOOK_S
            ask = a.AskStatus(id=secrets.token_hex(8), past=0)
            ask.job = job
            with contextlib.suppress(NotSent):
                self._connection.send(ask)


class Client:
    """A connection that asks and never joins. For one thread at a time.

    address: the hub's, else ``WEIGHTBUS_ADDRESS``. job: whose; else ``WEIGHTBUS_JOB``.
    keys, insecure: as the publisher's. timeout_s: for the hub to answer at all.
    ``check``, ``update`` and ``set_version`` need the trainer: they run at its next ``publisher.poll()`` or
    at the end of its next ``update()``, and wait ``wait_s`` for that; ``on_wait`` is called with what the hub
    says they wait for. Loads need a replica's ranks only, each in ``poll`` or ``serve``. All methods raise
    HubError if no hub answers, or if it goes while they wait: what it was asked may then have been done.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        job: str | None = None,
        keys: Keys | str | os.PathLike[str] | None = None,
        insecure: bool = False,
        timeout_s: float = 10.0,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self.address, self.job, self.timeout_s = address_of(address), job_of(job), timeout_s
        self._on_wait = on_wait
        keys = keys if isinstance(keys, Keys) else load_keys(keys, insecure=insecure)
        keys.check(self.address)
        self._keys = keys
        self._context: zmq.Context[Any] = zmq.Context()
        self._attempt = 0
        self._connection = self._connect()

    def _connect(self) -> Connection:
        return Connection(self._context, self.address, self._keys, attempt=self._attempt, watched=True)

    def _renew(self) -> bool:
        """Connect anew if the files have other keys now, or the hub may have another of several; whether so."""
        keys = self._keys.renewed()
        if keys is self._keys and (len(keys.hub_publics) < 2 or not self._connection.closed_s()):
            return False
        self._attempt = self._attempt + 1 if keys is self._keys else 0
        self._keys = keys
        self._connection.close()
        self._connection = self._connect()
        return True

    def status(self, past: int = 1, *, job: str | None = None) -> a.Status:
        """Ranks, states, versions, the epoch, and the ``past`` last updates and checks (16 at most).

        job: another than this client's; ``jobs`` in the answer names those that have ranks at the hub.
        """
        answer = self._ask(a.AskStatus(id=secrets.token_hex(8), past=past), 0.0, job)
        if not isinstance(answer, a.Status):
            raise HubError(f"status: expected one, got {type(answer).__name__}")
        return answer

    def update(
        self,
        version: int | None = None,
        *,
        modules: Sequence[str] | None = None,
        verify: bool = True,
        wait_s: float = 600.0,
    ) -> a.Answer:
        """Publish the trainer's weights, as ``version`` or the next one.

        An update that the trainer makes by itself meanwhile is an answer, too.
        """
        names = None if modules is None else list(modules)
        ask = a.AskUpdate(
            id=secrets.token_hex(8),
            hub=self._hub(),
            version=version,
            modules=names,
            verify=verify,
            wait_s=wait_s,
        )
        return self._answered(ask, wait_s)

    def check(self, *, wait_s: float = 600.0) -> a.Answer:
        """Digest every live shard of the servers, and compare with the committed versions' sums."""
        return self._answered(a.AskCheck(id=secrets.token_hex(8), hub=self._hub(), wait_s=wait_s), wait_s)

    def set_version(self, version: int, *, wait_s: float = 600.0) -> a.Answer:
        """What trainer and servers hold counts as ``version`` from now on; no weight moves.

        The next update's version must be above it. Refused while a server rank is torn.
        """
        ask = a.AskVersion(id=secrets.token_hex(8), hub=self._hub(), version=version, wait_s=wait_s)
        return self._answered(ask, wait_s)

    def pause(self, for_s: float = 600.0) -> a.Answer:
        """Hold updates back, for at most ``for_s``; one that is going on is not touched. Checks go on."""
        return self._answered(a.AskPause(id=secrets.token_hex(8), hub=self._hub(), for_s=for_s), 0.0)

    def resume(self) -> a.Answer:
        """Let updates go on."""
        return self._answered(a.AskResume(id=secrets.token_hex(8), hub=self._hub()), 0.0)

    def update_from_disk(
        self,
        path: str | os.PathLike[str],
        *,
        replica: int | None = None,
        modules: Sequence[str] | None = None,
        version: int | None = None,
        atomic: bool = False,
        verify: bool = True,
        timeout_s: float = 600.0,
    ) -> m.TaskEnd:
        """Have a replica's ranks load safetensors files, as ``Subscriber.update_from_disk`` does.

        replica: by default the only complete one. timeout_s: to wait for other rounds, and for each step.
        The answer is ``ok``, or has ``failures``; ranks may hold a mixture only if it says ``moved``.
        """
        task = m.LoadTask(
            replica=replica,
            path=os.path.abspath(path),
            modules=None if modules is None else list(modules),
            version=version,
            atomic=atomic,
            verify=verify,
        )
        return self.run(task, wait_s=timeout_s, run_s=timeout_s)

    def update_from_tensor(
        self,
        payloads: Payload | Sequence[Payload],
        *,
        replica: int | None = None,
        modules: Sequence[str] | None = None,
        version: int | None = None,
        format: m.PayloadFormat = "safetensors",
        timeout_s: float = 600.0,
    ) -> m.TaskEnd:
        """Have a replica's ranks write named tensors; others stay as they are. Arguments and answer as above.

        payloads: one for all ranks, or a sequence of one for each rank, in order. Each is the bytes of a
        safetensors file, of a ``flattened_bucket``, or what ``share_tensors`` gives, as ``format`` says
        (docs/loading.md); or a mapping of module names to such bytes.
        """
        given = [payloads] if isinstance(payloads, bytes | Mapping) else payloads
        named = [
            (place, module, data)
            for place, payload in enumerate(given)
            for module, data in (payload.items() if isinstance(payload, Mapping) else [(None, payload)])
        ]
        task = m.LoadTask(
            replica=replica,
            modules=None if modules is None else list(modules),
            version=version,
            format=format,
            partial=True,
        )
        frames = [m.Frame(place=place, module=module, nbytes=len(data)) for place, module, data in named]
        payload_bytes = [data for _, _, data in named]
        return self.run(task, wait_s=timeout_s, run_s=timeout_s, frames=frames, payloads=payload_bytes)

    def run(
        self,
        task: m.Task,
        *,
        wait_s: float,
        run_s: float,
        frames: Sequence[m.Frame] = (),
        payloads: Sequence[bytes] = (),
    ) -> m.TaskEnd:
        """Ask for a task and wait for its end. Raises HubError if no end comes in its time."""
        id = self.send(task, wait_s=wait_s, run_s=run_s, frames=frames, payloads=payloads)
        limit_s = wait_s + 4 * run_s + TASK_SLACK_S
        deadline, vigil = time.monotonic() + limit_s, _Vigil(self._connection)
        while (left := deadline - time.monotonic()) > 0:
            if (end := self.end(id, min(left, LOOK_S), vigil)) is not None:
                return end
            vigil.look(self.job)
        raise HubError(f"no answer from the hub at {self.address} for {limit_s:.0f} s")

    def send(
        self,
        task: m.Task,
        *,
        wait_s: float,
        run_s: float,
        frames: Sequence[m.Frame] = (),
        payloads: Sequence[bytes] = (),
    ) -> str:
        """Ask for a task; returns the id of its end."""
        ask = m.AskTask(
            id=secrets.token_hex(8),
            hub=self._hub(),
            task=task,
            wait_s=wait_s,
            run_s=run_s,
            frames=list(frames),
            payloads=list(payloads),
        )
        ask.job = self.job
        self._connection.send(ask)
        return ask.id

    def end(self, id: str, timeout_s: float, vigil: _Vigil | None = None) -> m.TaskEnd | None:
        """How the task with this id has ended; None if it has not in ``timeout_s``. vigil: told what comes."""
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self._connection.receive(max(0.0, deadline - time.monotonic()))
            if vigil and answer is not None:
                vigil.heard()
            if isinstance(answer, m.Refused):
                raise HubError(f"the hub at {self.address} refused a request: {answer.reason}")
            if isinstance(answer, m.TaskEnd) and answer.id == id:
                return answer
            if answer is None:
                return None

    def replicas(self) -> m.Replicas:
        """What the hub knows of the replicas."""
        answer = self._ask(m.AskReplicas(id=secrets.token_hex(8)), 0.0)
        if not isinstance(answer, m.Replicas):
            raise HubError(f"replicas: expected them, got {type(answer).__name__}")
        return answer

    def _hub(self) -> str:
        """The token of the hub that is there now: what was asked of another is not done by this one."""
        return self.status(past=0).hub

    def _answered(self, ask: a.Command, wait_s: float) -> a.Answer:
        answer = self._ask(ask, wait_s)
        if not isinstance(answer, a.Answer):
            raise HubError(f"{type(ask).__name__}: expected an answer, got {type(answer).__name__}")
        return answer

    def _ask(
        self, ask: a.AskStatus | a.Command | m.AskReplicas, wait_s: float, job: str | None = None
    ) -> m.Message:
        deadline = time.monotonic() + self.timeout_s
        sent, vigil = False, None
        ask.job = self.job if job is None else job_of(job)
        while True:
            left = deadline - time.monotonic()
            answer = None
            try:
                # A status may be asked twice, and is asked before all else.
                if isinstance(ask, a.AskStatus) and self._renew():
                    sent = False
                if not sent:
                    self._connection.send(ask)
                sent = True
                answer = self._connection.receive(min(max(0.0, left), RENEW_S))
            except NotSent:
                time.sleep(0.1)
            if answer is None:
                if vigil:
                    vigil.look(ask.job)
                if left > 0:
                    continue
                doubt = ", or keys do not match" if self._keys.client else ""
                raise HubError(f"no hub answered at {self.address} in time{doubt}")
            if isinstance(answer, m.Refused):
                raise ProtocolError(f"the hub at {self.address} refused: {answer.reason}")
            if vigil:
                vigil.heard()
            if getattr(answer, "id", None) != ask.id:
                continue  # late, to a request that was given up
            if not isinstance(answer, a.Waiting):
                return answer
            deadline, vigil = time.monotonic() + wait_s + SLACK_S, _Vigil(self._connection)
            if self._on_wait:
                self._on_wait(answer.reason)

    def close(self) -> None:
        self._connection.close()
        self._context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
