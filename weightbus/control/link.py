"""A rank's connections to the hub: for messages, for heartbeats, and for rendezvous."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.control.connection import Connection
from weightbus.control.joining import HELLO_AGAIN_S, hello_of, take_role
from weightbus.control.keys import Keys
from weightbus.control.messages import DEAD_AFTER_S
from weightbus.control.patience import Patience
from weightbus.control.rounds import Rounds
from weightbus.control.start import end_hub, ensure_hub
from weightbus.errors import HubError, ProtocolError

log = logging.getLogger("weightbus")

# Trainer rank 0 starts a hub in place of one that has been silent for so long and does not listen.
REPLACE_AFTER_S = 1.5

# A connection that the hub has closed, and that is not open again after so long, has no hub at its other end.
CLOSED_S = 0.4

# A rank whose thread that follows rounds has not been here for so long is busy elsewhere.
IDLE_S = 1.0

# A rank tries for so long to find the hub again before a call fails with HubError.
REJOIN_S = 60.0

KEY_REFUSED = "lets this rank's key in no more: it was retired, or never allowed; copy the newest .secret here"


class HubLost(HubError):
    """The hub has gone, was replaced, or has dropped this rank; ``rejoin`` may bring it back."""


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
        self._attempt = 0
        self._looks = 0  # for messages, by the thread that follows rounds
        self._connection = self.connect()
        self._fresh: Connection | None = None  # made by the beats, for this rank's messages from now on
        self._anew = False  # over it this rank has joined again: what the old one still brings is void
        self._moving = False
        # One thread at a time takes roles; when the one that follows rounds was last here.
        self._joining = threading.Lock()
        self._touched = 0.0
        self._held, self._state = held, state
        self._hellos: dict[str, m.Hello] = {}
        self._inbox: deque[wire.FromHub] = deque()
        self._hub = ""
        self._heard = time.monotonic()
        self._unanswered_s = 0.0  # of beats in a row, over a connection that is open
        self._beaten = self._heard  # when the last beat was sent
        self._tried_s = 0.0  # which joining again has taken since
        self._ended = 0.0  # when the hub was last found to have closed the connection
        self._lost = ""
        self._start_hub_dead_after_s: float | None = None
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None

    def connect(self) -> Connection:
        """A further connection, for another thread."""
        return Connection(self.context, self.address, self.keys, attempt=self._attempt)

    def _move(self) -> None:
        """Go on over the connection that the beats have made, for renewed keys or to join again, if any."""
        fresh, self._fresh = self._fresh, None
        if fresh is None:
            return
        anew, self._anew = self._anew, False
        while (message := self._connection.receive(0)) is not None:
            if not anew:
                self._inbox.append(message)
        self._connection.close()
        self._connection = fresh
        if anew and self.rounds.header.update:
            self._lost = (
                "this rank has begun a round of the hub that it has lost, and has joined again meanwhile"
            )
        elif self.rounds.entered:
            raise HubLost("this rank's connection was made anew while it waited for an offer")

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
        hello = hello_of(
            self.job, self.process, role, rank, size, replica=replica, device=device, start=start, model=model
        )
        if start_hub_dead_after_s is not None:
            self._start_hub_dead_after_s = start_hub_dead_after_s
        beat_s = self._take_by_any_key(hello, time.monotonic() + timeout_s, self._start_hub_dead_after_s)
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
        self._touched = time.monotonic()
        if not self._lost:
            with contextlib.suppress(HubLost):
                self._move()
            return True
        with self._joining:
            return self._rejoin(timeout_s)

    def _rejoin(self, timeout_s: float) -> bool:
        with contextlib.suppress(HubLost):
            self._move()
        if not self._lost:
            return True  # as the beats have done so
        deadline = time.monotonic() + timeout_s
        patience = Patience(time.monotonic())
        # The beats look for the hub; no use in shouting, too.
        while self._heard < self._ended or time.monotonic() - self._heard > 2.0:
            if patience.is_over(time.monotonic()):
                log.warning("looking for the hub for %.0f s: %s", time.monotonic() - patience.since, self._lost)
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        self._inbox.clear()
        self._connection.end_local()
        for hello in self._hellos.values():
            hello.held = self._held()
            if self._take_by_any_key(hello, max(deadline, time.monotonic() + 1.0), None) is None:
                return False
        self._lost = ""
        log.info("joined the hub at %s again", self.address)
        void = [message for message in self._inbox if isinstance(message, m.Offer | m.TaskOffer)]
        self._inbox = deque(message for message in self._inbox if message not in void)
        for offer in void:
            self.decline(offer, "this rank has joined again since")
        return True

    def _come_back(self) -> None:
        """As ``rejoin``, by the beats, while this rank is busy elsewhere: others may wait for what it knows."""
        inside = self.rounds.header.update or self.rounds.entered
        idle = not inside and time.monotonic() - self._touched > IDLE_S
        if not (self._lost and idle and self._joining.acquire(blocking=False)):
            return
        fresh: Connection | None = self.connect()
        try:
            self._inbox.clear()
            for hello in self._hellos.values():
                hello.held = self._held()
                if fresh and self._take(fresh, hello, time.monotonic() + HELLO_AGAIN_S, None) is None:
                    return
            self._anew = True
            fresh, self._fresh = self._fresh, fresh
            self._lost = ""
            log.info("joined the hub at %s again, while this rank was busy", self.address)
        except HubError as error:
            log.warning("%s", error)
        finally:
            if fresh is not None:
                fresh.close()
            self._joining.release()

    def _take_by_any_key(
        self, hello: m.Hello, deadline: float, start_hub_dead_after_s: float | None
    ) -> float | None:
        """As ``_take``, with each of the keys in turn that the hub may have."""
        while True:
            several = len(self.keys.hub_publics) > 1
            limit = min(deadline, time.monotonic() + HELLO_AGAIN_S) if several else deadline
            beat_s = self._take(self._connection, hello, limit, start_hub_dead_after_s)
            if beat_s is not None or time.monotonic() >= deadline:
                return beat_s
            self._attempt += 1
            self._connection.close()
            self._connection = self.connect()

    def _take(
        self, connection: Connection, hello: m.Hello, deadline: float, start_hub_dead_after_s: float | None
    ) -> float | None:
        """From hello to membership; seconds between beats, or None if no hub answered in time."""

        def start_hub() -> None:
            if start_hub_dead_after_s is not None:
                ensure_hub(self.address, dead_after_s=start_hub_dead_after_s, keys=self.keys)

        joined = take_role(
            connection,
            hello,
            deadline,
            state=self._state,
            start_hub=start_hub,
            keep=self._inbox.append,
        )
        if joined is None:
            return None
        self.peer, self._hub = joined.welcome.peer, joined.welcome.hub
        self.rounds.joined(joined.header)
        return joined.welcome.beat_s

    # -- messages ----------------------------------------------------------------------------------

    def send(self, message: m.Message) -> None:
        """As a message of the round that this rank is in."""
        self._move()
        message.stamp(self.rounds.header)
        self._connection.send(message, self.peer)

    def receive(self, timeout_s: float, *, spin_s: float = 0.0) -> wire.FromHub | None:
        """The next message, or None after ``timeout_s``. Raises HubLost until ``rejoin`` succeeds."""
        deadline = time.monotonic() + timeout_s
        self._looks += 1
        while True:
            self._touched = time.monotonic()
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
        self._move()
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
        if self._fresh is not None:
            self._fresh.close()
        self._connection.close()
        self.context.term()

    # -- beats -------------------------------------------------------------------------------------

    def _beat(self, beat_s: float) -> None:
        """Heartbeats, from a thread: a rank that is busy is not dead."""
        connection = self._watched()
        try:
            while not self._stop.is_set():
                try:
                    if self._must_renew(connection):
                        connection.close()
                        connection = self._watched()
                    self._one_beat(connection, beat_s)
                    begun = time.monotonic()
                    self._come_back()
                    self._tried_s = min(time.monotonic() - begun, HELLO_AGAIN_S)
                except Exception as error:  # without beats the hub would take this rank for dead
                    log.warning("heartbeat: %s: %s", type(error).__name__, error)
                    if connection.closed_s() and connection.key_refused:
                        self._lost = self._lost or f"the hub at {self.address} {KEY_REFUSED}"
                    self._is_lost(f"a heartbeat has failed, {type(error).__name__}: {error}")
                self._stop.wait(beat_s)
        finally:
            connection.close()

    def _watched(self) -> Connection:
        return Connection(self.context, self.address, self.keys, attempt=self._attempt, watched=True)

    def _must_renew(self, connection: Connection) -> bool:
        """Whether the files have other keys now, or the hub may have another of several.

        Then this rank's messages go by a new connection, too, as soon as the hub has answered to a beat.
        """
        keys = self.keys.renewed()
        if keys is not self.keys:
            changed = (keys.hub_public, keys.client_secret) != (self.keys.hub_public, self.keys.client_secret)
            self.keys, self._attempt = keys, 0
            self._moving |= changed
            return changed
        if len(keys.hub_publics) > 1 and connection.closed_s() > 0:
            self._attempt += 1
            self._moving = True
            return True
        return False

    def _one_beat(self, connection: Connection, beat_s: float) -> None:
        state, version = self._state()
        beat = m.Beat(job=self.job, peer=self.peer, state=state, version=version)
        beat.stale, beat.looks = self.rounds.stale, self._looks
        connection.send(beat)
        # This process may have been stopped itself: of a pause only what beats and joining again take counts.
        beaten, self._beaten = self._beaten, time.monotonic()
        since_s = min(self._beaten - beaten, 2 * beat_s + self._tried_s)
        answer = connection.receive(beat_s)
        # Beats that were kept while no hub was there are all answered by the next one. Taken singly, these
        # answers would let it seem alive for as long again.
        while (later := connection.receive(0)) is not None:
            answer = later
        now = time.monotonic()
        if isinstance(answer, m.Alive):
            self._heard, self._unanswered_s = now, 0.0
            if self._moving and self._fresh is None:
                self._moving = False
                fresh = self.connect()
                fresh.send(m.Beat(job=self.job, peer=self.peer, state=state, version=version, here=True))
                self._fresh = fresh
            # Not so if meanwhile this rank has joined again, as another peer.
            if not answer.known and answer.peer == self.peer:
                what = "has dropped this rank" if answer.hub == self._hub else "is a new one"
                self._lost = self._lost or f"the hub at {self.address} {what}"
            return
        if isinstance(answer, m.Refused):
            self._lost = self._lost or f"the hub at {self.address} has refused a heartbeat: {answer.reason}"
        if connection.closed_s() > CLOSED_S:
            self._ended = now
            self._lost = self._lost or f"the hub at {self.address} has closed the connection"
        self._is_lost("")
        # A hub that is well closes what it can't answer.
        self._unanswered_s = 0.0 if connection.closed_s() else self._unanswered_s + since_s
        replaces = self._start_hub_dead_after_s is not None and "trainer" in self._hellos
        if self._unanswered_s > DEAD_AFTER_S and replaces:
            end_hub(self.address)
        if now - self._heard > REPLACE_AFTER_S and replaces:
            ensure_hub(self.address, dead_after_s=self._start_hub_dead_after_s, keys=self.keys)  # type: ignore[arg-type]

    def _is_lost(self, why: str) -> None:
        """After no answer to a beat: whether the hub counts as lost, and then as what."""
        silent = self.silent_s
        if silent > DEAD_AFTER_S:
            text = f"the hub at {self.address} has not answered for {silent:.1f} s"
            self._lost = self._lost or (f"{text}: {why}" if why else text)
