"""One process's part in updates and checks, as trainer rank, as server rank, or as both.

``Session.follow`` is the whole of it: it hears the hub's messages from the offer to the outcome and
answers each. ``Publisher`` and ``Subscriber`` are its two faces.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
import torch

from weightbus import messages as m
from weightbus.bucket import Staging
from weightbus.client import Client
from weightbus.ends import Destination, Origin
from weightbus.errors import HubError, ProtocolError, SpecError, UpdateError
from weightbus.giving_up import failed, give_up
from weightbus.group import Group
from weightbus.hub import HUB_SPIN_S, SPIN_S
from weightbus.identity import address_of, job_of
from weightbus.keys import Keys
from weightbus.lanes import Lanes
from weightbus.link import REJOIN_S, HubLost, Link
from weightbus.loopback import PREFIX, Loopback
from weightbus.planned import Planned
from weightbus.report import Process
from weightbus.task_turn import MakeSave, TaskTurn, raise_for
from weightbus.turn import SLACK_S, Progress, SourceCopy, Turn, explain
from weightbus.wire import FromHub

log = logging.getLogger("weightbus")

# A rank that has run an update and lost the hub waits so long to hear, from a new one, how it ended.
UNHEARD_S = 20.0

POLL_S = 10.0

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
            self.link = Link(address, keys, job=job, held=self._held, state=self._state)
        self.reconnect_timeout_s = reconnect_timeout_s
        self.origin: Origin | None = None
        self.destination: Destination | None = None
        self._place(device, num_buckets)
        self._group: Group | None = None
        self._plans: dict[str, Planned] = {}
        self.recent: Planned | None = None  # the plan that ran last, if it still holds
        self._epoch = -1
        self._roles: set[m.Role] = set()
        # What a new hub has to know of an earlier one.
        self.members: list[m.Member] = []
        self._processes: tuple[list[m.Member], tuple[Process, ...]] = self.members, ()
        self.place = 0
        self._token = ""
        self._version: int | None = None
        self._sealed: tuple[bytes, m.Word] | None = None
        self._unheard: bytes | None = None
        self._polls = 0
        # Of a thread that serves while another one makes a publisher: the link is one thread's at a time.
        self._reading = threading.RLock()

    def join(self, role: m.Role, **arguments: Any) -> None:
        """Take a role at the hub; arguments as of ``Link.join``. A thread that serves waits meanwhile."""
        with self._reading:
            self.link.join(role=role, **arguments)

    def _place(self, device: torch.device, num_buckets: int) -> None:
        self.device = device
        self.staging = Staging(device, num_buckets)
        self.lanes = Lanes(device)

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
            elif session.device != device and not isinstance(session.link, Loopback):
                raise SpecError(f"device: expected {session.device} as the other end here, got {device}")
            elif session.device.type == "cpu" != device.type:
                session._place(device, num_buckets)  # between a CPU and a GPU, the GPU does the work
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
            self.origin = None
        else:
            self.destination = None
        try:
            self.link.leave(role)
        finally:
            if last:
                self.forget_plans()
                self.drop_group(abort=False)
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
            turn = Turn(self, progress, copied)
            with self.link.rounds.called():
                again = time.monotonic() < deadline
                outcome = self._to_the_end(turn, enter, enter.join_s + SLACK_S, again=again)
            if outcome is not None:
                return outcome

    def follow(self, offer: m.Offer, progress: Progress) -> m.Outcome:
        """Server ranks: from the offer to the outcome."""
        outcome = self._to_the_end(Turn(self, progress, None), offer, SLACK_S, again=False)
        assert outcome is not None, "only a trainer rank enters again"
        return outcome

    def _to_the_end(
        self, turn: Turn, start: m.Enter | m.Offer, wait_s: float, *, again: bool
    ) -> m.Outcome | None:
        """The outcome; None if the hub was lost before it had offered anything, and ``again`` is wished for.

        Whatever happens, the turn is told of one outcome: the only one that all are told, or, where the hub is
        not heard, that it has failed.
        """
        outcome: m.Outcome | None = None
        with contextlib.ExitStack() as stack:
            stack.callback(turn.close)
            try:
                outcome = self._follow(turn, start, wait_s, stack)
            except HubLost as lost:
                if again and turn.offer is None:
                    return None
                log.warning("%s", lost)
                outcome = failed(self.link.rounds, "hub", str(lost), moved=turn.moved)
                outcome = self._orphaned(turn) or outcome
            except BaseException as error:
                reason = explain(error)
                outcome = failed(self.link.rounds, turn.rank, reason, moved=turn.moved)
                outcome = self._give_up(reason, entered=turn.offer is None) or outcome
                raise
            finally:
                if turn.farewell is not None:
                    self.link.push_back(turn.farewell)
                if outcome is not None:
                    turn.ended(outcome)
        return outcome

    def _give_up(self, reason: str, *, entered: bool) -> m.Outcome | None:
        heard = False
        try:
            outcome = give_up(self.link, reason)
            heard = outcome is not None
        finally:
            if entered and not heard:
                self.link.forsake(f"this rank has given up a call: {reason}")
        return outcome

    def _follow(
        self, turn: Turn, start: m.Enter | m.Offer, wait_s: float, stack: contextlib.ExitStack
    ) -> m.Outcome:
        if isinstance(start, m.Offer):
            stack.enter_context(self.link.rounds.within(start))
            turn.offered(start)
        else:
            self.link.send(start)
            turn.look_ahead()
        while True:
            limit_s = turn.limit_s if turn.offer else wait_s
            # The end comes as soon as all are done, and a rank that sleeps hears it late.
            spin_s = HUB_SPIN_S if turn.seed is not None and turn.copied is None else SPIN_S
            message = self.link.receive(limit_s, spin_s=spin_s)
            match message:
                case None:
                    raise HubLost(f"no word from {self.link.address} for {limit_s:.0f} s in an update")
                case m.Offer():
                    if turn.offer is None:
                        stack.enter_context(self.link.rounds.within(message))
                    turn.offered(message)
                case m.Gathered():
                    turn.gathered(message)
                case m.Go():
                    if (ended := turn.go(message)) is not None:
                        return ended
                case m.Detail():
                    turn.detail(message)
                case m.Suspects():
                    turn.suspects(message)
                case m.Probe():
                    turn.probe(message)
                case m.Outcome():
                    return message
                case m.TaskOffer() if turn.offer is None:
                    self.take_part(message)
                case m.Farewell():
                    turn.farewell = message  # the outcome follows: this rank may be torn
                case _:
                    log.info("late: %s", type(message).__name__)  # as the answer to a poll that was given up

    def take_part(self, offer: m.TaskOffer) -> None:
        """In a task that somebody else has asked for; what became of it is said by state and callbacks."""
        try:
            TaskTurn(self, offer).follow()
        except HubLost as lost:
            log.warning("%s", lost)

    def _out_of_turn(self, message: FromHub) -> None:
        """The start of a round, heard while this rank waits for something else: it takes part, or says that it
        does not. Dropped in silence, both ends would wait for it until their deadlines."""
        if isinstance(message, m.TaskOffer):
            self.take_part(message)
        elif isinstance(message, m.Offer):
            if self.destination is not None:
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
    ) -> tuple[m.Outcome, TaskTurn]:
        """Ask for a task, on the rank that leads, and follow it to its outcome on this one.

        Updates and checks that come first are taken part in. Raises UpdateError if the hub refuses it or no
        offer comes in ``timeout_s``, HubError if the hub is lost.
        """
        deadline = time.monotonic() + timeout_s
        with contextlib.ExitStack() as stack:
            stack.callback(self.put_back)
            keys = None if isinstance(self.link, Loopback) else self.link.keys
            client = (
                stack.enter_context(Client(self.link.address, job=self.link.job, keys=keys)) if lead else None
            )
            id = client.send(task, wait_s=timeout_s, run_s=timeout_s) if client else ""
            while True:
                message = self.link.receive(0.05)
                if isinstance(message, m.TaskOffer):
                    turn = TaskTurn(self, message, report=report, expected=task, save=save)
                    outcome = turn.follow()
                    if client:
                        client.end(id, 1.0)  # the same outcome, as the client hears it
                    return outcome, turn
                if isinstance(message, m.Farewell):
                    stack.callback(self.link.push_back, message)  # a task needs no trainer
                elif message is not None:
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

    # -- a hub that is lost ------------------------------------------------------------------------

    def _orphaned(self, turn: Turn) -> m.Outcome | None:
        """The outcome of an update in which the hub was lost; None if it has failed.

        It may have been committed: where this rank has done its part, a new hub is asked, which learns it
        from any rank that has heard. Otherwise it has failed, and what was written is a mixture.
        """
        if not turn.finished or turn.seed is None:
            return None
        self._unheard, self.link.rounds.orphaned = turn.seed, True
        try:
            return self._await_outcome(time.monotonic() + UNHEARD_S)
        except HubError as error:
            log.warning("%s", error)
            return None
        finally:
            self._unheard, self.link.rounds.orphaned = None, False

    def _await_outcome(self, deadline: float) -> m.Outcome | None:
        while (left := deadline - time.monotonic()) > 0:
            try:
                if not self.link.rejoin(min(left, 1.0)):
                    continue
                message = self.link.receive(min(left, 0.5))
            except HubLost:
                continue
            if isinstance(message, m.Outcome):
                return message
            if message is not None:
                # The others have gone on to another update.
                self.link.rounds.opener = None
                self.link.push_back(message)
                return None
        return None

    def _held(self) -> m.Held:
        sealed = self._sealed or (None, "unverified")
        alive = self._group is not None
        header = self.link.rounds.header
        return m.Held(
            incarnation=header.incarnation,
            epoch=max(self._epoch, 0),
            place=self.place,
            members=len(self.members),
            group=self._token if alive else "",
            plans=list(self._plans)[-1024:] if alive else [],
            version=self._version,
            sealed=sealed[0],
            verdict=sealed[1],
            unheard=self._unheard,
            round=header.update,
        )

    def _state(self) -> tuple[m.State, int | None]:
        destination = self.destination
        return (destination.state, destination.version) if destination else ("", self._version)

    @property
    def committed(self) -> int | None:
        """The last version that was committed here."""
        return self._version

    def processes(self) -> tuple[Process, ...]:
        """All members of the last update; made once for each epoch."""
        if self._processes[0] is not self.members:
            self._processes = self.members, self._members_as_processes()
        return self._processes[1]

    def _members_as_processes(self) -> tuple[Process, ...]:
        return tuple(
            Process(
                ranks=str(member),
                host=member.host,
                pid=member.pid,
                started=member.started,
                serves=member.trainer is None,
            )
            for member in self.members
        )

    def seal(self, seed: bytes | None, outcome: m.Outcome, version: int) -> None:
        """An update, or a label, was committed here."""
        self._version = version
        if seed is not None:
            self._sealed = seed, outcome.verdict

    # -- what turns share --------------------------------------------------------------------------

    def enter_epoch(self, offer: m.Offer) -> m.Offer:
        """A new epoch makes the group and the plans of older ones useless. The offer with its members."""
        epoch = offer.epoch
        if epoch < self._epoch:
            raise ProtocolError(f"epoch: expected {self._epoch} or newer, got {epoch}")
        if epoch > self._epoch:
            self.drop_group(abort=True)
            self.forget_plans()
            self._epoch = epoch
        if offer.members:
            self.members = offer.members
        self._token = offer.group
        own = m.member_id(self.link.peer)
        self.place = next((i for i, x in enumerate(self.members) if x.peer == own), -1)
        if self.place < 0:
            raise ProtocolError(f"offer: expected this rank among the {len(self.members)} members")
        return msgspec.structs.replace(offer, members=self.members)

    def plan(self, token: str) -> Planned | None:
        return self._plans.get(token)

    def keep_plan(self, token: str, planned: Planned) -> None:
        self.forget_plan(token)
        self._plans[token] = planned

    def forget_plan(self, token: str) -> None:
        if (planned := self._plans.pop(token, None)) is not None:
            if planned is self.recent:
                self.recent = None
            planned.sharing.close()

    def forget_plans(self) -> None:
        """Drop all plans, and the memory of other processes that is mapped for them."""
        for token in list(self._plans):
            self.forget_plan(token)

    def join_group(self, rank: int, size: int, timeout_s: float) -> Group:
        if self._group is None:
            self._group = Group(
                self.link, epoch=self._epoch, rank=rank, size=size, device=self.device, timeout_s=timeout_s
            )
        return self._group

    def drop_group(self, *, abort: bool) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close(abort=abort)


def _forget_in_child() -> None:
    """A process that was forked has no place: those of its parent stay the parent's."""
    Session._open, Session._open_lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_forget_in_child)
