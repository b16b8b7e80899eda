"""What the hub sends. It never blocks: a connection that has too much unread gets no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import zmq

from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.hub.coordinator import Coordinator
from weightbus.hub.flood_guard import Guard
from weightbus.hub.local_sockets import LocalSockets

# From this size on, all recipients of a message share one copy of it.
SHARED_BYTES = 64 << 10


class Sender:
    """Sends over the hub's socket, or by the Unix socket of a connection that has one.

    guard: knows what each connection has unread. counts: the hub's own. slow: members that could not be sent
    to, which the hub drops.
    """

    def __init__(
        self, socket: zmq.Socket[Any], local: LocalSockets, guard: Guard, counts: Counter[str]
    ) -> None:
        self._socket, self._local, self._guard, self._counts = socket, local, guard, counts
        self.slow: set[str] = set()

    def flush(self, coordinator: Coordinator, identities: Mapping[str, bytes]) -> None:
        """Send what a coordinator has decided. identities: the connection of each member."""
        if coordinator.outbox:
            outbox = coordinator.outbox[:]
            coordinator.outbox.clear()
            last: m.Message | None = None
            frames: list[Any] = []
            for peer, message in outbox:
                if message is not last:
                    last, frames = message, _shared(wire.encode(message))
                if peer in identities and not self.send(identities[peer], frames, member=True):
                    self.slow.add(peer)
        answers, coordinator.requests.outbox = coordinator.requests.outbox, []
        for client, answer in [*answers, *coordinator.tasks.replies]:
            answer.job = coordinator.job
            self.answer(client, answer)
        coordinator.tasks.replies.clear()

    def answer(self, identity: bytes, answer: m.Message) -> None:
        self.send(identity, wire.encode(answer))

    def send(self, identity: bytes, frames: list[Any], *, member: bool = False) -> bool:
        """False if the connection has too much unread. One that is gone is left to TCP."""
        if identity in self._local and (has_room := self._local.send(identity, frames)) is not None:
            self._counts["unread"] += not has_room
            return has_room
        nbytes = sum(len(frame) for frame in frames)
        if not self._guard.has_room(identity, nbytes, member=member):
            self._counts["unread"] += 1
            return False
        try:
            plain = all(isinstance(frame, bytes) for frame in frames)
            self._socket.send_multipart([identity, *frames], zmq.NOBLOCK, copy=plain)
        except zmq.Again:
            self._counts["unread"] += 1
            return False
        except zmq.ZMQError:
            self._counts["unsent"] += 1
        else:
            self._guard.gave(identity, nbytes)
        return True


def _shared(frames: list[bytes]) -> list[Any]:
    return [frame if len(frame) < SHARED_BYTES else zmq.Frame(frame) for frame in frames]
