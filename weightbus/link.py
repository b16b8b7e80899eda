"""A rank's connections to the hub: for messages, for heartbeats, and for rendezvous."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from weightbus import messages as m
from weightbus import wire
from weightbus.errors import HubError, ProtocolError
from weightbus.hub import DEAD_AFTER_S
from weightbus.identity import host_name, process_started
from weightbus.keys import Keys
from weightbus.rounds import Rounds
from weightbus.start import ensure_hub

log = logging.getLogger("weightbus")

# A hello may have gone to a hub that was just leaving.
HELLO_AGAIN_S = 3.0

# Trainer rank 0 starts a hub in place of one that has been silent for so long and does not listen.
REPLACE_AFTER_S = 1.5

# A hub that takes no further piece of a long message for so long is not there.
PIECE_S = 10.0

# A connection that the hub has closed, and that is not open again after so long, has no hub at its other end.
CLOSED_S = 0.4

# A rank tries for so long to find the hub again before a call fails with HubError.
REJOIN_S = 60.0


class NotSent(HubError):
    """Nothing could be sent just now: there is no connection, as when keys do not match."""


class HubLost(HubError):
    """The hub has gone, was replaced, or has dropped this rank; ``rejoin`` may bring it back."""


class Connection:
    """One DEALER socket to the hub. For one thread at a time. watched: ``closed_s`` is asked for."""

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        keys: Keys,
        identity: bytes = b"",
        *,
        watched: bool = False,
    ) -> None:
        self.address = address
        self._socket = context.socket(zmq.DEALER)
        self._closed: float | None = None
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        self._events = self._socket.get_monitor_socket(events) if watched else None
        for option, value in (
            (zmq.LINGER, 500),
            (zmq.MAXMSGSIZE, m.MAX_MESSAGE_BYTES),
            (zmq.RECONNECT_IVL, 20),
            (zmq.RECONNECT_IVL_MAX, 500),
            (zmq.HEARTBEAT_IVL, 2000),
            (zmq.HEARTBEAT_TIMEOUT, 10000),
            (zmq.IPV6, 1),
        ):
            self._socket.setsockopt(option, value)
        if identity:
            self._socket.setsockopt(zmq.ROUTING_ID, identity)
        keys.protect_client(self._socket)
        self._socket.connect(address)

    def send(self, message: m.Message, peer: str = "") -> None:
        """peer: this rank's; long messages go in pieces, of which the hub takes some at a time."""
        try:
            for number, frames in enumerate(wire.encode_to_hub(message, peer)):
                if number:
                    self._socket.poll(round(PIECE_S * 1000), zmq.POLLOUT)
                self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again as error:
            raise NotSent(f"could not send {type(message).__name__} to {self.address}") from error

    def receive(self, timeout_s: float, *, spin_s: float = 0.0) -> wire.FromHub | None:
        """The next message, or None after ``timeout_s``. Raises ProtocolError.

        spin_s: how long to look again and again before waiting, which is woken up late.
        """
        if spin_s:
            until = time.monotonic() + min(spin_s, timeout_s)
            while not self._socket.poll(0) and time.monotonic() < until:
                pass
        if not self._socket.poll(max(0, round(timeout_s * 1000))):
            return None
        return wire.decode_from_hub(self._socket.recv_multipart())

    def closed_s(self) -> float:
        """For how long the hub has had the connection closed; 0 while it is open, or not yet open."""
        while self._events is not None and self._events.poll(0):
            event = parse_monitor_message(self._events.recv_multipart())
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._closed = None
            elif self._closed is None:
                self._closed = time.monotonic()
        return 0.0 if self._closed is None else time.monotonic() - self._closed

    def close(self) -> None:
        if self._events is not None:
            self._socket.disable_monitor()
            self._events.close(linger=0)
        self._socket.close()


class Link:
    """One process's membership of a job at the hub at ``address``.

    held: what this process knows of an earlier hub, for the hello. state: its server rank's state and
    version, for the beats; called from the beats' thread.
    """

    def __init__(
        self,
        address: str,
        keys: Keys | None = None,
        *,
        job: str = "",
        held: Callable[[], m.Held] = m.Held,
        state: Callable[[], tuple[m.State, int | None]] = lambda: ("", None),
    ) -> None:
        self.keys = keys or Keys()
        self.keys.check(address)
        self.address, self.job = address, job
        self.rounds = Rounds(job)
        self.peer = ""
        self.process = uuid.uuid4().hex
        self.context: zmq.Context[Any] = zmq.Context()
        # Its own name for the connection: the hub knows it again when the network has cut it.
        self._connection = Connection(self.context, address, self.keys, secrets.token_bytes(16))
        self._held, self._state = held, state
        self._hellos: dict[str, m.Hello] = {}
        self._inbox: deque[wire.FromHub] = deque()
        self._hub = ""
        self._heard = time.monotonic()
        self._ended = 0.0  # when the hub was last found to have closed the connection
        self._lost = ""
        self._start_hub_dead_after_s: float | None = None
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None

    def connect(self) -> Connection:
        """A further connection, for another thread."""
        return Connection(self.context, self.address, self.keys)

    # -- joining -----------------------------------------------------------------------------------

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
        """Take a role; given ``start_hub_dead_after_s``, start a hub as long as none listens.

        start: what this rank shares with all others of its start of the job. model: in short.

        Raises HubError with the hub's reason, or if none answers in ``timeout_s``.
        """
        hello = m.Hello(
            job=self.job,
            process=self.process,
            host=host_name(),
            pid=os.getpid(),
            started=process_started(),
            model=model,
            start=start,
            device=device,  # type: ignore[arg-type]
            role=role,
            rank=rank,
            size=size,
            replica=replica,
        )
        if start_hub_dead_after_s is not None:
            self._start_hub_dead_after_s = start_hub_dead_after_s
        beat_s = self._take(hello, time.monotonic() + timeout_s, self._start_hub_dead_after_s)
        if beat_s is None:
            doubt = ", or keys do not match" if self.keys.client else ""
            raise HubError(f"no hub answered at {self.address} for {timeout_s:.0f} s{doubt}")
        self._hellos[role] = hello
        if self._beats is None:
            self._heard = time.monotonic()
            self._beats = threading.Thread(
                target=self._beat, args=(beat_s,), name="weightbus-beat", daemon=True
            )
            self._beats.start()

    def rejoin(self, timeout_s: float) -> bool:
        """Take the roles again where the hub was lost; whether this rank is a member (again).

        Raises HubError if the hub refuses.
        """
        if not self._lost:
            return True
        deadline = time.monotonic() + timeout_s
        # The beats look for the hub; no use in shouting, too.
        while self._heard < self._ended or time.monotonic() - self._heard > 2.0:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        self._inbox.clear()
        for hello in self._hellos.values():
            hello.held = self._held()
            if self._take(hello, max(deadline, time.monotonic() + 1.0), None) is None:
                return False
        self._lost = ""
        log.info("joined the hub at %s again", self.address)
        return True

    def _take(self, hello: m.Hello, deadline: float, start_hub_dead_after_s: float | None) -> float | None:
        """From hello to membership; seconds between beats, or None if no hub answered in time."""
        first = 0.0
        while True:
            if start_hub_dead_after_s is not None:
                ensure_hub(self.address, dead_after_s=start_hub_dead_after_s, keys=self.keys)
            limit = min(deadline, time.monotonic() + HELLO_AGAIN_S)
            answer: m.Welcome | m.Alive | m.Refused | None = None
            try:
                self._connection.send(hello)
                answer = self._await_answer(limit)
            except NotSent:
                time.sleep(0.1)
            if isinstance(answer, m.Welcome):
                welcome = answer
                # Who answers the welcome has heard it: only then is the role taken.
                state, version = self._state()
                self._connection.send(m.Beat(job=self.job, peer=welcome.peer, state=state, version=version))
                answer = self._await_answer(limit, welcome.peer)
                if isinstance(answer, m.Alive) and answer.known:
                    self.peer, self._hub = welcome.peer, welcome.hub
                    self.rounds.joined(answer.header)
                    return welcome.beat_s
            now = time.monotonic()
            if not isinstance(answer, m.Refused):
                if now > deadline:
                    return None
                continue
            first = first or now
            # The place may be held by a process that has died, which the hub learns only with time;
            # unless it has been heard since we first asked.
            alive = answer.silent_s is None or now - answer.silent_s > first + 1.0
            if alive or now + 0.5 > deadline:
                raise HubError(f"the hub at {self.address} refused: {answer.reason}")
            time.sleep(0.5)

    def _await_answer(self, deadline: float, peer: str = "") -> m.Welcome | m.Alive | m.Refused | None:
        """The answer to a hello, or, given ``peer``, to its first beat."""
        while True:
            answer = self._connection.receive(min(0.5, max(0.0, deadline - time.monotonic())))
            if isinstance(answer, m.Welcome) and not peer:
                return answer
            if isinstance(answer, m.Alive) and peer and answer.peer == peer:
                return answer
            # Refusals of anything else are of messages to an earlier hub.
            if isinstance(answer, m.Refused) and answer.of in ("hello", ""):
                return answer
            if answer is None and time.monotonic() > deadline:
                return None
            if answer is not None and not isinstance(answer, m.Welcome | m.Alive | m.Refused):
                self._inbox.append(answer)

    # -- messages ----------------------------------------------------------------------------------

    def send(self, message: m.Message) -> None:
        """As a message of the round that this rank is in."""
        message.stamp(self.rounds.header)
        self._connection.send(message, self.peer)

    def receive(self, timeout_s: float, *, spin_s: float = 0.0) -> wire.FromHub | None:
        """The next message, or None after ``timeout_s``. Raises HubLost until ``rejoin`` succeeds."""
        deadline = time.monotonic() + timeout_s
        while True:
            if self._lost and not self._inbox:
                raise HubLost(self._lost)
            left = deadline - time.monotonic()
            answer = self._next(min(0.5, max(0.0, left)), spin_s)
            spin_s = 0.0
            if isinstance(answer, m.Refused):
                raise ProtocolError(f"the hub at {self.address} refused a message: {answer.reason}")
            if isinstance(answer, m.Alive):
                if not answer.known and answer.peer == self.peer:
                    self._lost = f"the hub at {self.address} does not know this rank"
                continue
            if isinstance(answer, m.Welcome):
                continue  # to a hello that was said again
            if answer is not None and self.rounds.accepts(answer):
                return answer
            if isinstance(answer, m.Offer | m.TaskOffer):
                self.decline(answer, f"this rank is in round {self.rounds.header.update}")
            if left <= 0:
                return None

    def decline(self, offer: m.Offer | m.TaskOffer, reason: str) -> None:
        """A round that this rank takes no part in: the others need not wait for it."""
        with self.rounds.beside(offer):
            self.send(m.Refuse(peer=self.peer, reason=reason))

    def forsake(self, reason: str) -> None:
        """Leave, to join again with the next call: nothing that is still to come is then for this rank."""
        with contextlib.suppress(HubError):
            for role in self._hellos:
                self.send(m.Leave(peer=self.peer, role=role))  # type: ignore[arg-type]
        self._lost = self._lost or reason

    def _next(self, timeout_s: float, spin_s: float) -> wire.FromHub | None:
        return self._inbox.popleft() if self._inbox else self._connection.receive(timeout_s, spin_s=spin_s)

    def push_back(self, message: wire.FromHub) -> None:
        """The next ``receive`` returns ``message``."""
        self._inbox.appendleft(message)

    @property
    def lost(self) -> str:
        """Why this rank is no member just now; empty if it is one."""
        return self._lost

    @property
    def silent_s(self) -> float:
        """Seconds since the hub was last heard."""
        return time.monotonic() - self._heard

    def leave(self, role: m.Role) -> None:
        self._hellos.pop(role, None)
        if self.peer and not self._lost:
            self.send(m.Leave(peer=self.peer, role=role))

    def close(self) -> None:
        self._stop.set()
        if self._beats is not None:
            self._beats.join()
        self._connection.close()
        self.context.term()

    # -- beats -------------------------------------------------------------------------------------

    def _beat(self, beat_s: float) -> None:
        """Heartbeats, from a thread: a rank that is busy is not dead."""
        connection = Connection(self.context, self.address, self.keys, watched=True)
        try:
            while not self._stop.is_set():
                try:
                    self._one_beat(connection, beat_s)
                except Exception as error:  # without beats the hub would take this rank for dead
                    log.warning("heartbeat: %s: %s", type(error).__name__, error)
                    self._is_lost(f"a heartbeat has failed, {type(error).__name__}: {error}")
                self._stop.wait(beat_s)
        finally:
            connection.close()

    def _one_beat(self, connection: Connection, beat_s: float) -> None:
        state, version = self._state()
        stale = self.rounds.stale
        connection.send(m.Beat(job=self.job, peer=self.peer, state=state, version=version, stale=stale))
        answer = connection.receive(beat_s)
        now = time.monotonic()
        if isinstance(answer, m.Alive):
            self._heard = now
            # Not so if meanwhile this rank has joined again, as another peer.
            if not answer.known and answer.peer == self.peer:
                what = "has dropped this rank" if answer.hub == self._hub else "is a new one"
                self._lost = self._lost or f"the hub at {self.address} {what}"
            return
        if connection.closed_s() > CLOSED_S:
            self._ended = now
            self._lost = self._lost or f"the hub at {self.address} has closed the connection"
        self._is_lost("")
        replaces = self._start_hub_dead_after_s is not None and "trainer" in self._hellos
        if now - self._heard > REPLACE_AFTER_S and replaces:
            ensure_hub(self.address, dead_after_s=self._start_hub_dead_after_s, keys=self.keys)  # type: ignore[arg-type]

    def _is_lost(self, why: str) -> None:
        """After no answer to a beat: whether the hub counts as lost, and then as what."""
        silent = self.silent_s
        if silent > DEAD_AFTER_S:
            text = f"the hub at {self.address} has not answered for {silent:.1f} s"
            self._lost = self._lost or (f"{text}: {why}" if why else text)
