"""The hub: the one address that all ranks and tools talk to. A process of its own, without torch.

``python -m weightbus.hub --address tcp://127.0.0.1:5757``. It decodes what comes in by its one socket, lets
``Coordinator`` decide, and sends. A fault is contained where it arises; docs/security.md says what can end
the process still, in libzmq. It never blocks on a send, and takes messages of all connections in turn.
Members of its own host are also heard, and sent to, by Unix sockets that the hub has connected to.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import zmq

from weightbus.control import client_messages as a
from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.control.keys import Keys
from weightbus.control.roles import may_send
from weightbus.errors import HubError, ProtocolError
from weightbus.hub.clients import Clients
from weightbus.hub.coordinator import Coordinator
from weightbus.hub.flood_guard import MAX_UNREAD_BYTES_OF_MEMBER
from weightbus.hub.jobs import Handler, Jobs, ServedJob
from weightbus.hub.listener import MAX_UNREAD, Listener
from weightbus.hub.local_sockets import LocalSockets
from weightbus.hub.membership import Membership
from weightbus.hub.sender import Sender
from weightbus.hub.tcp_connection import Connection
from weightbus.hub.turns import Turns

log = logging.getLogger("weightbus.hub")

# An ephemeral hub stays this long after its last peer, for those who are just coming.
LINGER_S = 2.0

# A hub that nobody has joined for this long after its start has no one to serve.
UNUSED_S = 60.0

# Messages that are read before the clock is looked at again; after how many without a pause the hub is behind.
MAX_AT_ONCE = 200
MAX_UNDRAINED = 1000

# How often what is inside the socket is looked at, where there is reason to.
LOOK_S = 0.005

# A member whose connections have all been closed has died, unless it is back within so long.
GONE_S = 2.0

# After it has listened anew, members have so long to connect again, and rounds wait.
BACK_S = 10.0

# Connections that have been shut, and that libzmq keeps all the same, before the hub listens anew.
MAX_GHOSTS = 1000

# Of a message to the hub, by a Unix socket.
MAX_FRAMES = 3
MAX_LOCAL_BYTES = m.MAX_FRAME_BYTES + 64

# After a fault, so that one that comes again and again does not keep a core busy.
FAULT_PAUSE_S = 0.01

# In a round, the ranks look for the next message so long before they wait for it: being woken up costs more
# than all else that they do. Only where there are cores to spare.
SPIN_S = 0.001 if (os.cpu_count() or 1) >= 8 else 0.0

# The hub looks for so long after each message of a round, since ranks transfer meanwhile, or one update follows
# the other; and so do ranks that wait for the outcome. What comes at all times is no reason to.
HUB_SPIN_S = 100 * SPIN_S
ROUTINE = (m.Beat, m.Poll, m.StoreCheck, a.AskStatus)


class Hub:
    """Serves one address until it is stopped or, if ``ephemeral``, until its last peer has left.

    Raises HubError for an address that others could reach and no keys, or that can't be listened on.
    """

    def __init__(
        self,
        address: str,
        *,
        ephemeral: bool = False,
        dead_after_s: float = m.DEAD_AFTER_S,
        keys: Keys | None = None,
    ) -> None:
        self._listener = Listener(address, keys or Keys())
        self._guard, self._auth = self._listener.guard, self._listener.auth
        self.jobs = Jobs(dead_after_s=dead_after_s)
        self.ephemeral = ephemeral
        self.counts: Counter[str] = Counter()
        self.token = secrets.token_hex(16)
        self._turns = Turns(self.counts)
        self.members = Membership(self.jobs, self.token, self.counts, self._turns, self._guard)
        self.clients = Clients(self.jobs, self.token, self.counts, self._turns, self._auth)
        self._local = LocalSockets(
            max_frames=MAX_FRAMES,
            max_bytes=MAX_LOCAL_BYTES,
            max_unsent=MAX_UNREAD,
            max_unsent_bytes=MAX_UNREAD_BYTES_OF_MEMBER,
        )
        self.sender = Sender(self._listener.socket, self._local, self._guard, self.counts)
        self._anew = 0.0  # since when it has listened anew, until members are back
        self._user = ""  # whose key the message in hand came with
        self._started = time.monotonic()
        self._last_peer = 0.0
        self._stopping = False
        self._next_tick = self._next_second = self._next_look = 0.0
        self._undrained = 0  # messages since the socket had none left
        self._drained = True  # since the last look
        self._spin_until = 0.0
        self._handlers: dict[type[m.Message], Handler] = {
            **self.members.handlers,
            **self.clients.handlers,
            m.Piece: self._piece,
            m.Cancel: self.jobs.cancel,
        }

    @property
    def coordinator(self) -> Coordinator:
        """That of the job without a name."""
        return self.jobs.unnamed.coordinator

    def stop(self) -> None:
        self._stopping = True

    # -- the loop ----------------------------------------------------------------------------------

    def serve(self) -> None:
        try:
            poller = self._listener.poller()
            if (number := self._local.fileno()) >= 0:
                poller.register(number, zmq.POLLIN)
            while not self._stopping and not self._deserted():
                self._contained(self._step, poller)
        finally:
            self._close()

    def _close(self) -> None:
        self._local.close()
        self._listener.close()

    def _contained(self, step: Callable[..., None], *arguments: Any) -> None:
        """A fault of ours, wherever it is, must not end the hub for all the others."""
        try:
            step(*arguments)
        except Exception as error:
            self._fault(error)
            time.sleep(FAULT_PAUSE_S)

    def _fault(self, error: Exception) -> None:
        self.counts["errors"] += 1
        if self._turns.may_log():
            log.error("a fault of the hub's own", exc_info=error)

    def _step(self, poller: zmq.Poller) -> None:
        """Wait for something to do, do it, and see to the clock."""
        until = self._spin_until
        while not (self._local.is_ready() or self._listener.is_ready()):
            if time.monotonic() >= until:
                poller.poll(50)
                break
        for identity, user, frames in self._local.receive(MAX_AT_ONCE):
            self.counts["messages"] += 1
            self._contained(self._take, identity, user, frames, time.monotonic())
        if self._auth:
            self._contained(self._auth.answer)
        self._take_some()
        # Behind the messages, which ranks wait for: what they say of a connection is looked up with each.
        now = time.monotonic()
        if now >= self._next_look:
            self._contained(self._watch, now)
            alert = self._guard.is_alert(now)
            if alert or self._guard.holds or self._is_behind or now >= self._next_second:
                self._contained(self._bound, now, alert)
            self._next_look = max(now + LOOK_S, now + 5 * (time.monotonic() - now))
        if now >= self._next_tick:
            self._next_tick = now + 0.05
            self._contained(self._tick, now)
        if now >= self._next_second:
            self._next_second = now + 1.0
            self._contained(self._look_for_ended, now)
            self._turns.next_second()

    def _take_some(self) -> None:
        """What has come by the hub's socket. Bounded, so that a flood does not keep the clock from ticking. The
        socket itself takes one message of each connection in turn, so that it does not keep others waiting."""
        for _ in range(MAX_AT_ONCE):
            if not self._listener.is_ready() or (first := self._listener.take()) is None:
                self._undrained = 0
                self._drained = True
                return
            self._undrained += 1
            self._receive(first)

    def _deserted(self) -> bool:
        now = time.monotonic()
        if not self.ephemeral:
            return False
        if not self.jobs.is_empty:
            self._last_peer = now
            return False
        return now - self._last_peer > LINGER_S if self.members.ever else now - self._started > UNUSED_S

    # -- connections -------------------------------------------------------------------------------

    def _watch(self, now: float, *, sweep: bool = False) -> None:
        """Connections that have come and gone."""
        for connection in self._guard.look(now, sweep=sweep):
            self._ended(connection, now)
        self.counts["spared"] += self._guard.spare(now)

    def _look_for_ended(self, now: float) -> None:
        """Connections that have gone unheard, and ranks."""
        self._watch(now, sweep=True)
        self.members.drop_ended(now)
        self._local.keep(self.members.connections())

    @property
    def _is_behind(self) -> bool:
        return self._undrained >= MAX_UNDRAINED

    def _bound(self, now: float, alert: bool) -> None:
        """See to what is inside the socket."""
        drained, self._drained = self._drained, False
        self.counts["cut"] += self._guard.bound(now, drained=drained, behind=self._is_behind, alert=alert)

    def _ended(self, connection: Connection, now: float) -> None:
        """A connection has been closed."""
        identity = connection.identity
        self.members.connection_ended(identity, connection.peer, now)
        if identity and not self._guard.is_here(identity):
            self.clients.gone(identity, now)

    def _listen_anew(self, now: float) -> None:
        """Where the hub's own key has changed, or libzmq keeps many connections that have ended: listen again,
        between rounds, when all has been read. Rounds are held until the members have connected again.
        """
        coordinators = [job.coordinator for job in self.jobs]
        has_new_key = self._auth is not None and self._auth.has_new_secret
        if has_new_key or self._guard.ghosts > MAX_GHOSTS:
            for coordinator in coordinators:
                coordinator.held_until = now + BACK_S
            if any(coordinator.is_moving for coordinator in coordinators) or self._guard.unread_by_members():
                return
            try:
                self._listener.listen_again()
            except HubError:
                self.stop()  # ranks that can't reach a hub start or wait for another
                raise
            self._guard.ghosts = 0
            self._anew = now
            log.info("listening with the hub's new key" if has_new_key else "listening again")
            for coordinator in coordinators:
                coordinator.reconnecting = True
        elif self._anew:
            if now < self._anew + BACK_S and not self.members.are_back(self._anew):
                return
            self._anew = 0.0
            for coordinator in coordinators:
                coordinator.held_until, coordinator.reconnecting = 0.0, False

    # -- the clock ---------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        self.members.drop_closed(BACK_S if self._anew else GONE_S, now)
        self.clients.asked.expire(now)
        self.members.pieces.expire(now)
        if self._auth:
            self._auth.look(now)
        self._listen_anew(now)
        for job in self.jobs:
            self._contained(self._tick_job, job, now)
        self._flush(now)

    def _tick_job(self, job: ServedJob, now: float) -> None:
        self.members.drop_silent(job, now)
        job.coordinator.requests.expire(now)
        job.coordinator.advance(now)

    # -- messages ----------------------------------------------------------------------------------

    def _receive(self, first: zmq.Frame) -> None:
        """One message, of which ``first`` is the first frame: the connection's identity."""
        identity = first.bytes
        self.counts["messages"] += 1
        if self._turns.is_muted(identity) and not (
            self._guard.is_of_member(identity) or identity in self.clients.asked
        ):
            self._guard.took_of(identity, self._listener.skip(first))
            self.counts["muted"] += 1
            return
        received = self._listener.read(first)
        if received.number < 0:
            self.counts["refused"] += 1
            return
        now = time.monotonic()
        try:
            for connection in self._guard.took(received.number, identity, received.nbytes, now):
                self._ended(connection, now)
            self._take(identity, received.user, received.frames, now)
        except Exception as error:
            self._fault(error)

    def _take(self, identity: bytes, user: str, frames: list[bytes], now: float) -> None:
        """One message, whichever way it has come. user: the key of the connection that it is of."""
        self._user = user
        answer: m.Message | None
        job: ServedJob | None = None
        try:
            message = wire.decode_to_hub(frames)
            job = self.jobs.get(message.job)
            in_round = job is not None and job.coordinator.round is not None
            answer = self._handle(identity, message, now)
            if (in_round or (job is not None and job.coordinator.round is not None)) and not isinstance(
                message, ROUTINE
            ):
                self._spin_until = now + HUB_SPIN_S
        except ProtocolError as error:
            answer = self._refused(identity, str(error))
        except Exception as error:
            self._fault(error)
            answer = m.Refused(reason=f"{type(error).__name__} in the hub: {error}"[:1000])
        if answer is not None:
            if job is not None:
                answer.job = job.name
            self.sender.answer(identity, answer)
        self._flush(now)

    def _handle(self, identity: bytes, message: m.Message, now: float) -> m.Message | None:
        key_role = self._listener.key_role(self._user)
        if key_role is None:
            return self._retired(message, now)
        if not may_send(key_role, message):
            self.counts["not_allowed"] += 1
            what = f"hello of a {message.role}" if isinstance(message, m.Hello) else type(message).__name__
            raise ProtocolError(f"{what}: not allowed with a {key_role}'s key; expected another role's")
        answer = self._handlers[type(message)](identity, message, now)
        if isinstance(message, m.Beat) and message.local_socket and self.members.is_sent_to(identity):
            self._local.open(identity, message.local_socket, self._user)
        return answer

    def _piece(self, identity: bytes, piece: m.Piece, now: float) -> m.Message | None:
        """Of a message that is longer than a frame: a member's, or a client's, which has no peer."""
        if piece.peer:
            found = self.members.find(identity, piece, now)
            if found is None:
                return self.members.unknown(identity, piece)
            whole = self.members.add(found[0], piece, now)
        else:
            whole = self.clients.add(identity, piece, now)
        return None if whole is None else self._handle(identity, whole, now)

    def _retired(self, message: m.Message, now: float) -> m.Message:
        """Of a connection whose key is in the list no more: it counts as closed, also for a member."""
        self.counts["not_allowed"] += 1
        member = self.jobs.of(getattr(message, "peer", ""))
        if member is not None and isinstance(message, m.Beat):
            self.members.drop(*member, "its key was retired", now)
        raise ProtocolError(
            "this connection's key was retired; expected the newest of its name: copy its .secret to this host"
        )

    def _refused(self, identity: bytes, reason: str) -> m.Refused | None:
        """Counted; said to the sender unless it has been told often enough."""
        self.counts["refused"] += 1
        if not self._turns.take(identity):
            return None
        if self._turns.may_log():
            log.warning("refused: %a", reason[:500])
        return m.Refused(reason=reason[:1000])

    def _flush(self, now: float) -> None:
        """Send what the coordinators have decided. Who does not read is dropped, which decides anew."""
        while True:
            for job in self.jobs:
                self.sender.flush(job.coordinator, self.members.identities)
            if not self.sender.slow:
                return
            found = self.jobs.of(self.sender.slow.pop())
            if found is not None:
                self.counts["slow"] += 1
                self.members.drop(*found, f"reads too slowly: {MAX_UNREAD} messages unread", now)
