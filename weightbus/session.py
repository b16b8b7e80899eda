"""One process's part in updates and checks, as trainer rank, as server rank, or as both.

``Session.follow`` is the whole of it: it hears the hub's messages from the offer to the outcome and
answers each. ``Publisher`` and ``Subscriber`` are its two faces.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import ClassVar

import torch

from weightbus import messages as m
from weightbus.asking import Asking
from weightbus.bucket import Staging
from weightbus.ends import Destination, Origin
from weightbus.errors import HubError, ProtocolError, SpecError, UpdateError
from weightbus.group import Group
from weightbus.hub import SPIN_S
from weightbus.lanes import Lanes
from weightbus.link import Link
from weightbus.loopback import PREFIX, Loopback
from weightbus.planned import Planned
from weightbus.task_turn import MakeSave, TaskTurn, raise_for
from weightbus.turn import SLACK_S, Progress, SourceCopy, Turn


class Session:
    """Everything that a process's publisher and subscriber share: link, group, staging and plans."""

    _open: ClassVar[dict[str, Session]] = {}
    _open_lock = threading.Lock()

    def __init__(self, address: str, device: torch.device, num_buckets: int) -> None:
        self.link: Link | Loopback = Loopback(address) if address.startswith(PREFIX) else Link(address)
        self.origin: Origin | None = None
        self.destination: Destination | None = None
        self._place(device, num_buckets)
        self._group: Group | None = None
        self._plans: dict[str, Planned] = {}
        self.recent: Planned | None = None  # the plan that ran last, if it still holds
        self._epoch = -1
        self._users = 0

    def _place(self, device: torch.device, num_buckets: int) -> None:
        self.device = device
        self.staging = Staging(device, num_buckets)
        self.lanes = Lanes(device)

    @classmethod
    def open(cls, address: str, device: torch.device, num_buckets: int) -> Session:
        """The process's session at ``address``: a publisher and a subscriber there share one."""
        with cls._open_lock:
            session = cls._open.get(address)
            if session is None:
                session = cls._open[address] = cls(address, device, num_buckets)
            elif session.device != device and not isinstance(session.link, Loopback):
                raise SpecError(f"device: expected {session.device} as the other end here, got {device}")
            elif session.device.type == "cpu" != device.type:
                session._place(device, num_buckets)  # between a CPU and a GPU, the GPU does the work
            session._users += 1
            return session

    def close(self, role: m.Role) -> None:
        """Give up a role; the last one closes link and group."""
        with self._open_lock:
            self._users -= 1
            last = self._users == 0
            if last:
                self._open.pop(self.link.address, None)
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
        """
        self.link.send(enter)
        return self.follow(None, progress, enter.join_s + SLACK_S, copied)

    def follow(
        self,
        offer: m.Offer | None,
        progress: Progress,
        wait_s: float = SLACK_S,
        copied: SourceCopy | None = None,
    ) -> m.Outcome:
        """From the offer to the outcome. Raises HubError if the hub is lost."""
        turn = Turn(self, progress, copied)
        try:
            return self._follow(turn, offer, wait_s)
        finally:
            turn.close()
            if turn.farewell is not None:
                self.link.push_back(turn.farewell)

    def _follow(self, turn: Turn, offer: m.Offer | None, wait_s: float) -> m.Outcome:
        if offer is not None:
            turn.offered(offer)
        else:
            turn.look_ahead()
        while True:
            limit_s = turn.limit_s if turn.offer else wait_s
            message = self.link.receive(limit_s, spin_s=SPIN_S)
            match message:
                case None:
                    raise HubError(f"no word from {self.link.address} for {limit_s:.0f} s in an update")
                case m.Offer():
                    turn.offered(message)
                case m.Gathered():
                    turn.gathered(message)
                case m.Go():
                    if (ended := turn.go(message)) is not None:
                        return turn.ended(ended)
                case m.Detail():
                    turn.detail(message)
                case m.Suspects():
                    turn.suspects(message)
                case m.Probe():
                    turn.probe(message)
                case m.Outcome():
                    return turn.ended(message)
                case m.TaskOffer() if turn.offer is None:
                    self.take_part(message)
                case m.Farewell():
                    turn.farewell = message  # the outcome follows: this rank may be torn
                case _:
                    raise ProtocolError(f"expected a message of an update, got {type(message).__name__}")

    def take_part(self, offer: m.TaskOffer) -> m.Outcome:
        """In a task that somebody has asked for."""
        return TaskTurn(self, offer).follow()

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
            asking = stack.enter_context(Asking(self.link.address)) if lead else None
            id = asking.send(task, wait_s=timeout_s, run_s=timeout_s) if asking else ""
            while True:
                message = self.link.receive(0.05)
                if isinstance(message, m.TaskOffer):
                    turn = TaskTurn(self, message, report=report, expected=task, save=save)
                    outcome = turn.follow()
                    if asking:
                        asking.receive(id, 1.0)  # the same outcome, as the client hears it
                    return outcome, turn
                if isinstance(message, m.Offer):
                    self.follow(message, Progress())
                elif isinstance(message, m.Farewell):
                    stack.callback(self.link.push_back, message)  # a task needs no trainer
                elif asking and isinstance(end := asking.receive(id, 0.0), m.TaskEnd):
                    raise_for(end, "task")
                if time.monotonic() > deadline + SLACK_S:
                    raise UpdateError(f"task: expected rank 0 to ask for it within {timeout_s:.0f} s")

    # -- what turns share --------------------------------------------------------------------------

    def enter_epoch(self, epoch: int) -> None:
        """A new epoch makes the group and the plans of older ones useless."""
        if epoch < self._epoch:
            raise ProtocolError(f"epoch: expected {self._epoch} or newer, got {epoch}")
        if epoch > self._epoch:
            self.drop_group(abort=True)
            self.forget_plans()
            self._epoch = epoch

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
