"""One process at the hub, as trainer rank, as server rank, or as both.

``Publisher`` and ``Subscriber`` are its two faces. A ``Round`` follows each update and check to its outcome.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from weightbus.control import messages as m
from weightbus.control.client import Client
from weightbus.control.identity import address_of, job_of
from weightbus.control.keys import Keys
from weightbus.control.link import REJOIN_S, HubLost, Link
from weightbus.control.wire import FromHub
from weightbus.errors import HubError, SpecError, UpdateError
from weightbus.hub.in_process import PREFIX, Loopback
from weightbus.hub.server import SPIN_S
from weightbus.session.context import Context
from weightbus.session.hearing import SLACK_S
from weightbus.session.origin import SourceCopy
from weightbus.session.participant import Participant
from weightbus.session.progress import Progress
from weightbus.session.results import raise_for
from weightbus.session.round import Round
from weightbus.session.standing import Standing
from weightbus.session.task_participant import MakeSave, TaskParticipant, take_part

log = logging.getLogger("weightbus")

POLL_S = 10.0

# A hub says at once what it knows, to a rank that has joined.
KNOWN_S = 5.0

# A thread that serves lets another one have the link after so long.
SLICE_S = 0.2


class Session:
    """Everything that a process's publisher and subscriber share: link, group, staging and plans."""

    _open: ClassVar[dict[tuple[str, str], Session]] = {}
    _open_lock = threading.Lock()

    def __init__(
        self,
        address: str,
        job: str,
        device: torch.device,
        num_buckets: int,
        keys: Keys,
        reconnect_timeout_s: float,
    ) -> None:
        self.link: Link | Loopback
        if address.startswith(PREFIX):
            self.link = Loopback(address, job)
        else:
            self.link = Link(
                address,
                keys,
                job=job,
                held=lambda: self.standing.held(),
                state=lambda: self.standing.state(),
            )
        self.reconnect_timeout_s = reconnect_timeout_s
        self.context = Context(self.link, device, num_buckets)
        self.standing = Standing(self.context)
        self._roles: set[m.Role] = set()
        self._waits = self._polls = 0  # their numbers
        # Of a thread that serves while another one makes a publisher: the link is one thread's at a time.
        self._reading = threading.RLock()

    def join(self, role: m.Role, **arguments: Any) -> None:
        """Take a role at the hub; arguments as of ``Link.join``. A thread that serves waits meanwhile."""
        with self._reading:
            self.link.join(role=role, **arguments)

    def last_known(self) -> int | None:
        """Trainer ranks, as they have joined: the last version that the hub knows of."""
        if isinstance(self.link, Loopback):
            return None
        behind: list[FromHub] = []
        known: m.Known | None = None
        deadline = time.monotonic() + KNOWN_S
        with self._reading:
            while known is None and (left := deadline - time.monotonic()) > 0:
                message = self.link.receive(left)
                if isinstance(message, m.Known):
                    known = message
                elif message is not None:
                    behind.append(message)
            for one in reversed(behind):
                self.link.push_back(one)
        return known.version if known else None

    @classmethod
    def open(
        cls,
        role: m.Role,
        address: str | None,
        job: str | None,
        device: torch.device,
        num_buckets: int,
        keys: Keys,
        reconnect_timeout_s: float = REJOIN_S,
    ) -> Session:
        """The process's session of ``job`` at ``address``: a publisher and a subscriber there share one.

        Raises SpecError for a second one of either that would take the first one's place.
        """
        address, job = address_of(address), job_of(job)
        with cls._open_lock:
            session = cls._open.get((address, job))
            if session is None:
                session = cls(address, job, device, num_buckets, keys, reconnect_timeout_s)
                cls._open[address, job] = session
            elif role in session._roles:
                end = "publisher" if role == "trainer" else "subscriber"
                raise SpecError(
                    f"{end}: this process has one of job {job!r} at {address} already; expected it to be closed"
                    f" first, or another job= for this one"
                )
            elif session.context.device != device and not isinstance(session.link, Loopback):
                raise SpecError(
                    f"device: expected {session.context.device} as the other end here, got {device}"
                )
            elif session.context.device.type == "cpu" != device.type:
                session.context.use(device, num_buckets)  # between a CPU and a GPU, the GPU does the work
            session._roles.add(role)
            return session

    def close(self, role: m.Role) -> None:
        """Give up a role; the last one closes link and group."""
        with self._open_lock:
            self._roles.discard(role)
            last = not self._roles
            if last:
                self._open.pop((self.link.address, self.link.job), None)
        if role == "trainer":
            self.context.origin = None
        else:
            self.context.destination = None
        try:
            self.link.leave(role)
        finally:
            if last:
                self.context.plans.clear()
                self.context.drop_group(abort=False)
                self.link.close()

    # -- following the hub -------------------------------------------------------------------------

    def call(self, enter: m.Enter, progress: Progress, copied: SourceCopy | None = None) -> m.Outcome:
        """Trainer ranks: enter an update or a check and follow it to its outcome.

        copied: what is sent, instead of the live source.
        Raises HubError if there is no hub. One that is lost before the offer is looked for again.
        """
        deadline = time.monotonic() + enter.join_s
        while True:
            if not self.link.rejoin(self.reconnect_timeout_s):
                raise HubError(self.link.lost)
            enter.peer = self.link.peer
            round = Round(Participant(self.context, progress, copied), self.standing, enter)
            with self.link.rounds.called():
                outcome = round.run(enter.join_s + SLACK_S, again=time.monotonic() < deadline)
            if outcome is not None:
                return outcome

    def follow(self, offer: m.Offer, progress: Progress, *, until: float = math.inf) -> m.Outcome | None:
        """Server ranks: from the offer to the outcome; None if it was over before this rank looked.

        until: when this rank would rather go on with something else, if no byte moves yet and others of its
        replica are not there (as of ``time.monotonic``).
        """
        participant = Participant(self.context, progress, None)
        outcome = Round(participant, self.standing, offer).run(SLACK_S, until=until)
        return outcome if participant.offer is not None else None

    def cancel(self, reason: str) -> bool:
        """Trainer ranks, from any thread: end what waits; whether anything did.

        Raises HubError if the hub does not answer.
        """
        if isinstance(self.link, Loopback):
            return False  # nobody waits: what is called is done by the caller itself
        connection = self.link.connect()
        try:
            connection.send(m.Cancel(job=self.link.job, peer=self.link.peer, reason=reason))
            deadline = time.monotonic() + POLL_S
            while (left := deadline - time.monotonic()) > 0 and not self.link.lost:
                match connection.receive(min(left, 0.5)):
                    case m.Cancelled(ended=ended):
                        return ended
                    case m.Refused(reason=why):
                        raise HubError(f"cancel: {why}")
            raise HubError(f"cancel: {self.link.lost or f'no answer from {self.link.address}'}")
        finally:
            connection.close()

    def _out_of_turn(self, message: FromHub) -> None:
        """The start of a round, heard while this rank waits for something else: it takes part, or says that it
        does not. Dropped in silence, both ends would wait for it until their deadlines."""
        if isinstance(message, m.TaskOffer):
            take_part(self.context, message)
        elif isinstance(message, m.Offer):
            if self.context.destination is not None:
                self.follow(message, Progress())
            else:
                self.link.decline(message, "this trainer rank has given up its call")
        else:
            log.info("late: %s", type(message).__name__)

    def put_back(self) -> None:
        """An offer that was heard, where an interrupt came before it was answered: to be heard again."""
        opener, self.link.rounds.opener = self.link.rounds.opener, None
        if opener is not None:
            self.link.push_back(opener)

    def call_task(
        self,
        task: m.Task,
        *,
        lead: bool,
        timeout_s: float,
        report: Callable[[int, int], None] | None = None,
        save: MakeSave | None = None,
    ) -> tuple[m.Outcome, TaskParticipant]:
        """Ask for a task, on the rank that leads, and follow it to its outcome on this one.

        Updates and checks that come first are taken part in. Raises UpdateError if the hub refuses it or no
        offer comes in ``timeout_s``, HubError if the hub is lost.
        """
        deadline = time.monotonic() + timeout_s
        with contextlib.ExitStack() as stack:
            stack.callback(self.put_back)
            stack.callback(self.context.aside.give_back)
            keys = None if isinstance(self.link, Loopback) else self.link.keys
            client = (
                stack.enter_context(Client(self.link.address, job=self.link.job, keys=keys)) if lead else None
            )
            id = client.send(task, wait_s=timeout_s, run_s=timeout_s) if client else ""
            while True:
                message = self.link.receive(0.05)
                if isinstance(message, m.TaskOffer):
                    participant = TaskParticipant(
                        self.context, message, report=report, expected=task, save=save
                    )
                    outcome = participant.follow()
                    if client:
                        client.end(id, 1.0)  # the same outcome, as the client hears it
                    return outcome, participant
                if message is not None:
                    if not self.context.aside.take(message):  # a task needs no trainer
                        self._out_of_turn(message)
                elif client and (end := client.end(id, 0.0)) is not None:
                    raise_for(end, "task")
                if time.monotonic() > deadline + SLACK_S:
                    raise UpdateError(f"task: expected rank 0 to ask for it within {timeout_s:.0f} s")

    def receive(self, timeout_s: float) -> FromHub | None:
        """Server ranks, between updates: the next message, or None after ``timeout_s``.

        A hub that is lost is looked for; raises HubError once none has answered for
        ``reconnect_timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self._reading:
                if "trainer" in self._roles:
                    return None  # its calls hear what comes
                left = deadline - time.monotonic()
                message = self._receive(min(max(0.0, left), SLICE_S))
            if message is not None or left <= SLICE_S:
                return message

    def _receive(self, timeout_s: float) -> FromHub | None:
        try:
            return self.link.receive(timeout_s, spin_s=SPIN_S)
        except HubLost as lost:
            if self.link.rejoin(timeout_s):
                return self.link.receive(0)
            if self.link.silent_s > self.reconnect_timeout_s:
                raise HubError(str(lost)) from lost
            return None

    def poll(self) -> m.Asked | None:
        """Trainer ranks: what a client has asked for, the same on all of them."""
        if isinstance(self.link, Loopback):
            return None  # nobody can ask
        self._polls += 1
        try:
            if not self.link.rejoin(0.0):
                return None
            ask = m.Poll(peer=self.link.peer, number=self._polls)
            self.link.send(ask)
            deadline = time.monotonic() + POLL_S
            while (left := deadline - time.monotonic()) > 0:
                message = self.link.receive(left)
                if isinstance(message, m.Polled) and message.number == self._polls:
                    return message.task
                if message is not None:
                    self._out_of_turn(message)
                    # Its answer may have come meanwhile; to the same number there is one only.
                    self.link.send(ask)
                    deadline = time.monotonic() + POLL_S
        except HubLost as lost:
            log.warning("%s", lost)
        finally:
            self.put_back()
        return None

    @property
    def committed(self) -> int | None:
        """The last version that was committed here."""
        return self.standing.version

    def draw_wait(self) -> int:
        """The next number of a wait."""
        self._waits += 1
        self.context.aside.waited = None
        return self._waits


def _forget_in_child() -> None:
    """A process that was forked has no place: those of its parent stay the parent's."""
    Session._open, Session._open_lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_forget_in_child)
