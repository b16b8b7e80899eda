"""A link to a hub that is not a process: for a trainer and a server that are one process, the only one.

The same coordinator decides, so updates, checks, states and reports are the same. Nothing is opened.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from typing import Any

from weightbus.control import messages as m
from weightbus.control.joining import hello_of
from weightbus.control.rounds import Rounds
from weightbus.control.wire import FromHub
from weightbus.errors import HubError, ProtocolError
from weightbus.hub.coordinator import Coordinator

PREFIX = "inproc://"

# The one peer is this process itself: it can't die without taking the coordinator with it.
_FOREVER_S = 1e18


class Loopback:
    """As ``Link``, with the coordinator in this process."""

    def __init__(self, address: str, job: str = "") -> None:
        self.address, self.job = address, job
        self.rounds = Rounds(job)
        self.peer = secrets.token_hex(8)
        self.process = secrets.token_hex(16)
        self.context: Any = None
        self._coordinator = Coordinator(dead_after_s=_FOREVER_S, job=job)
        self._inbox: deque[FromHub] = deque()

    def join(
        self,
        *,
        role: m.Role,
        rank: int,
        size: int,
        replica: int,
        device: str,
        timeout_s: float,
        start_hub_dead_after_s: float | None = None,
        start: str = "",
        model: m.Sketch | None = None,
    ) -> None:
        """Take a role. Raises HubError with the coordinator's reason."""
        hello = hello_of(self.job, self.process, role, rank, size, replica=replica, device=device, model=model)
        admitted = self._coordinator.roster.admit(hello, self.peer, time.monotonic())
        if isinstance(admitted, m.Refused):
            raise HubError(f"refused: {admitted.reason}")
        self.rounds.joined(self._coordinator.header())

    def send(self, message: m.Message) -> None:
        now = time.monotonic()
        message.stamp(self.rounds.header)
        match message:
            case m.Enter():
                self._coordinator.enter(message, now)
            case m.Facts() | m.Ready() | m.Refuse() | m.Done() | m.Sums() | m.Clues() | m.Probed():
                self._coordinator.answer(message, now)
            case _:
                raise ProtocolError(f"{type(message).__name__}: not for a process by itself")

    def receive(self, timeout_s: float, *, spin_s: float = 0.0) -> FromHub | None:
        """The next message. None, at once, where none can come any more."""
        self._take()
        if not self._inbox and timeout_s:
            # Only time can move a round that waits: for a replica, or for others' word of a failure.
            deadline = time.monotonic() + timeout_s
            while not self._inbox and self._coordinator.round and time.monotonic() < deadline:
                time.sleep(0.01)
                self._coordinator.advance(time.monotonic())
                self._take()
        while self._inbox:
            if self.rounds.accepts(message := self._inbox.popleft()):
                return message
        return None

    def _take(self) -> None:
        for _, message in self._coordinator.outbox:
            self._inbox.append(message)  # type: ignore[arg-type]
        self._coordinator.outbox.clear()

    def push_back(self, message: FromHub) -> None:
        self._inbox.appendleft(message)

    def decline(self, offer: m.Offer | m.TaskOffer, reason: str) -> None:
        with self.rounds.beside(offer):
            self.send(m.Refuse(peer=self.peer, reason=reason))

    def forsake(self, reason: str) -> None:
        self._inbox.clear()

    # Its hub can't be lost.
    lost = ""
    silent_s = 0.0

    def rejoin(self, timeout_s: float) -> bool:
        return True

    def leave(self, role: m.Role) -> None:
        roster = self._coordinator.roster
        for peer in roster.peers.values():
            if role in peer.roles:
                roster.take_role(peer, role)

    def close(self) -> None:
        self._inbox.clear()
