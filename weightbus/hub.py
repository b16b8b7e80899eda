"""The hub: the one address that all ranks and tools talk to. A process of its own, without torch.

``python -m weightbus.hub --address tcp://127.0.0.1:5757``. It owns one ROUTER socket; it decodes what comes in,
lets ``Coordinator`` decide, and sends. Nothing that arrives can end it, and no peer can make it wait: it never
blocks on a send, and takes messages of all connections in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import secrets
import signal
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from weightbus import asks as a
from weightbus import messages as m
from weightbus import wire
from weightbus.door import ANY_ROLE, Door
from weightbus.errors import HubError, ProtocolError
from weightbus.guard import OVERHEAD_BYTES, Connection, Guard
from weightbus.identity import ADDRESS_VARIABLE, address_of, host_name, is_running
from weightbus.jobs import Jobs, ServedJob
from weightbus.keys import Keys, load_keys
from weightbus.overview import status_of
from weightbus.protocol import Coordinator
from weightbus.roles import may_send
from weightbus.roster import MAX_PEERS, Peer
from weightbus.unfinished import MAX_IDLE_BYTES, Unfinished, check_objects

log = logging.getLogger("weightbus.hub")

BEAT_S = 0.5
DEAD_AFTER_S = 10.0

# An ephemeral hub stays this long after its last peer, for those who are just coming.
LINGER_S = 2.0

# A hub that nobody has joined for this long after its start has no one to serve.
UNUSED_S = 60.0

# Messages that a connection may leave unread before it is dropped, and that are taken from it unseen.
MAX_UNREAD = 64

# Refusals, hellos and requests that one connection gets answered in a second; more are only counted.
MAX_ANSWERS_PER_S = 100

# Bytes in the rendezvous of all jobs.
MAX_STORED_BYTES = 512 << 20

# Bytes of unfinished messages of all members.
MAX_PIECES_BYTES = 1 << 30

# A member whose connections have all been closed has died, unless it is back within so long.
GONE_S = 2.0

# What a client may have the hub wait for; and a rank.
MAX_CLIENT_S = 3600.0
MAX_RANK_S = 86400.0

# A status of many ranks is made so often only.
STATUS_S = 0.25
MANY_PEERS = 256

# What one beat adds to a count at most, whatever it says.
MAX_STALE = 1 << 20

# Descriptors that a hub process takes, if it may: three for each rank, and some.
MAX_DESCRIPTORS = 1 << 16

# After a fault, so that one that comes again and again does not keep a core busy.
FAULT_PAUSE_S = 0.01

# Hellos whose welcome has not been answered yet; the oldest go first.
MAX_HELLOS = 1024

# From this size on, all recipients of a message share one copy of it.
SHARED_BYTES = 64 << 10

# In a round, the ranks look for the next message so long before they wait for it: being woken up costs more
# than all else that they do. Only where there are cores to spare.
SPIN_S = 0.001 if (os.cpu_count() or 1) >= 8 else 0.0

# The hub looks for so long after each message of a round, since ranks transfer meanwhile, or one update follows
# the other; and so do ranks that wait for the outcome. What comes at all times is no reason to.
HUB_SPIN_S = 100 * SPIN_S
ROUTINE = (m.Beat, m.Poll, m.StoreCheck, a.AskStatus)

Handler = Callable[[bytes, Any, float], m.Message | None]


class Hub:
    """Serves one address until it is stopped or, if ``ephemeral``, until its last peer has left.

    Raises HubError for an address that others could reach and no keys, or that can't be listened on.
    """

    def __init__(
        self,
        address: str,
        *,
        ephemeral: bool = False,
        dead_after_s: float = DEAD_AFTER_S,
        keys: Keys | None = None,
    ) -> None:
        keys = keys or Keys()
        keys.check(address)
        if keys.client and not keys.hub_secret:
            raise HubError("keys: expected hub.secret where the hub runs, got a client's keys only")
        self.jobs = Jobs(dead_after_s=dead_after_s)
        self.ephemeral = ephemeral
        self.counts: Counter[str] = Counter()
        self.token = secrets.token_hex(16)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 500),
            (zmq.IPV6, 1),
            (zmq.MAXMSGSIZE, m.MAX_FRAME_BYTES),
            (zmq.SNDHWM, MAX_UNREAD),
            (zmq.RCVHWM, MAX_UNREAD),
            # A full or vanished connection is an error at once, not a wait or a silent loss.
            (zmq.ROUTER_MANDATORY, 1),
            # A rank that connects again takes over from its own half-open connection.
            (zmq.ROUTER_HANDOVER, 1),
            (zmq.HANDSHAKE_IVL, 5000),
            (zmq.HEARTBEAT_IVL, 2000),
            (zmq.HEARTBEAT_TIMEOUT, 10000),
        ):
            self._socket.setsockopt(option, value)
        self._door = Door(self._context, keys) if keys.hub_secret else None
        if self._door:
            self._door.protect(self._socket)
        self._guard = Guard(self._socket)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._close()
            raise HubError(f"address: can't listen on {address}: {error}") from error
        self._identities: dict[str, bytes] = {}
        self._hellos: OrderedDict[bytes, tuple[str, m.Hello]] = OrderedDict()
        self._pieces: Unfinished[str] = Unfinished(together=MAX_PIECES_BYTES)
        self._asked: Unfinished[bytes] = Unfinished(together=m.MAX_PAYLOAD_BYTES)
        # Members whose connections have all been closed, and since when.
        self._closed: dict[str, float] = {}
        self._statuses: dict[str, tuple[float, a.Status]] = {}
        self._slow: set[str] = set()
        self._answered: Counter[bytes] = Counter()
        self._key_role = ""  # of the message in hand
        self._logged = 0
        self._started = time.monotonic()
        self._joined = False
        self._last_peer = 0.0
        self._stopping = False
        self._next_tick = self._next_second = 0.0
        self._spin_until = 0.0
        self._handlers: dict[type[m.Message], Handler] = {
            m.Hello: self._hello,
            m.Beat: self._beat,
            a.AskStatus: self._status,
            a.AskPause: self._pause,
            a.AskResume: self._resume,
            m.AskTask: self._ask_task,
            m.AskReplicas: self._ask_replicas,
            **dict.fromkeys((a.AskUpdate, a.AskCheck, a.AskVersion), self._request),
            **dict.fromkeys((m.Leave, m.Piece, m.Enter, m.Poll), self._from_member),
            **dict.fromkeys((m.Facts, m.Ready, m.Refuse, m.Done, m.Sums, m.Clues, m.Probed), self._from_member),
            **dict.fromkeys((m.StoreSet, m.StoreGet, m.StoreAdd), self._store),
            **dict.fromkeys((m.StoreCheck, m.StoreDelete, m.StoreCount), self._store),
        }

    @property
    def coordinator(self) -> Coordinator:
        """That of the job without a name."""
        return self.jobs.unnamed.coordinator

    def stop(self) -> None:
        self._stopping = True

    def serve(self) -> None:
        try:
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            poller.register(self._guard.events, zmq.POLLIN)
            if self._door:
                poller.register(self._door.socket, zmq.POLLIN)
            while not self._stopping and not self._deserted():
                self._contained(self._step, poller)
        finally:
            self._close()

    def _contained(self, step: Callable[..., None], *arguments: Any) -> None:
        """A fault of ours, wherever it is, must not end the hub for all the others."""
        try:
            step(*arguments)
        except Exception as error:
            self._fault(error)
            time.sleep(FAULT_PAUSE_S)

    def _fault(self, error: Exception) -> None:
        self.counts["errors"] += 1
        self._logged += 1
        if self._logged <= MAX_ANSWERS_PER_S:
            log.error("a fault of the hub's own", exc_info=error)

    def _step(self, poller: zmq.Poller) -> None:
        """Wait for something to do, do it, and see to the clock."""
        until = self._spin_until
        while not int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            if time.monotonic() >= until:
                poller.poll(50)
                break
        if self._door:
            self._contained(self._door.answer)
        self._contained(self._watch)
        # Bounded, so that a flood does not keep the clock from ticking. The socket itself takes
        # one message of each connection in turn, so that it does not keep others waiting.
        for _ in range(200):
            try:
                frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            self._receive(frame)
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + 0.05
            self._contained(self._tick, now)
            if now >= self._next_second or self._guard.has_grown():
                self._contained(self._cut, now)
        if now >= self._next_second:
            self._next_second = now + 1.0
            self._contained(self._look_for_ended, now)
            self._answered.clear()
            self._logged = 0

    def _close(self) -> None:
        self._guard.close()
        self._socket.close()
        if self._door:
            self._door.close()
        self._context.term()

    def _watch(self) -> None:
        """Connections that have come and gone."""
        now = time.monotonic()
        for connection in self._guard.look(now):
            self._ended(connection, now)
        self.counts["spared"] += self._guard.spare()

    def _look_for_ended(self, now: float) -> None:
        """Ranks of this host that have ended, and left their connections to a process that they had forked."""
        for job in self.jobs:
            quiet = [peer for peer in job.coordinator.roster.peers.values() if now - peer.heard > 2 * BEAT_S]
            for peer in quiet[:MANY_PEERS]:
                if _has_ended(peer):
                    self._drop(job, peer, "died: its process has ended", now)

    def _cut(self, now: float) -> None:
        self.counts["cut"] += self._guard.cut(now)

    def _ended(self, connection: Connection, now: float) -> None:
        """A connection has been closed. What its client asked for is of no use to anyone any more."""
        identity, peer = connection.identity, connection.peer
        if peer and not self._guard.is_connected(peer):
            self._closed.setdefault(peer, now)
        if identity and not self._guard.is_here(identity):
            self._hellos.pop(identity, None)
            self._asked.forget(identity)
            for job in self.jobs:
                job.coordinator.requests.gone(identity)
                job.coordinator.tasks.gone(identity, now)

    def _tick(self, now: float) -> None:
        for peer, since in list(self._closed.items()):
            member = self.jobs.of(peer)
            if member is None or self._guard.is_connected(peer):
                del self._closed[peer]
            elif now - since > GONE_S or _has_ended(member[1]):
                del self._closed[peer]
                self._drop(*member, "died: its connection was closed", now)
        self._asked.expire(now)
        self._pieces.expire(now)
        for job in self.jobs:
            self._contained(self._tick_job, job, now)
        self._flush(now)

    def _tick_job(self, job: ServedJob, now: float) -> None:
        for peer in job.coordinator.roster.silent(now):
            self._drop(job, peer, f"died: not heard for {now - peer.heard:.1f} s", now)
        job.coordinator.requests.expire(now)
        job.coordinator.advance(now)

    def _deserted(self) -> bool:
        now = time.monotonic()
        if not self.ephemeral:
            return False
        if not self.jobs.is_empty:
            self._last_peer = now
            return False
        return now - self._last_peer > LINGER_S if self._joined else now - self._started > UNUSED_S

    # -- what comes in -----------------------------------------------------------------------------

    def _receive(self, frame: zmq.Frame) -> None:
        """One message, of which ``frame`` is the first: the connection's identity."""
        identity = frame.bytes
        try:
            number = int(frame.get(zmq.SRCFD))
        except zmq.ZMQError:
            number = -1  # ZMTP 1.0 or 2.0: what comes by these is read, and forgotten
        self._key_role = ""
        if self._door:
            try:
                user = str(frame.get("User-Id"))
                self._key_role = "" if user == ANY_ROLE else user
            except zmq.ZMQError:
                number = -1  # no key that the door has looked at
        frames: list[bytes] = []
        nbytes = OVERHEAD_BYTES
        while frame.more:
            frame = self._socket.recv(copy=False)
            nbytes += len(frame)
            # No message has more than two: what is behind them is read, and forgotten.
            if len(frames) < 3:
                frames.append(frame.bytes)
        self.counts["messages"] += 1
        if number < 0:
            self.counts["refused"] += 1
            return
        now = time.monotonic()
        try:
            for connection in self._guard.took(number, identity, nbytes, now):
                self._ended(connection, now)
            self._take(identity, frames, now)
            self._flush(now)
        except Exception as error:
            self._fault(error)

    def _take(self, identity: bytes, frames: list[bytes], now: float) -> None:
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
            self._answer(identity, answer)

    def _handle(self, identity: bytes, message: m.Message, now: float) -> m.Message | None:
        if not may_send(self._key_role, message):
            self.counts["not_allowed"] += 1
            what = f"hello of a {message.role}" if isinstance(message, m.Hello) else type(message).__name__
            raise ProtocolError(f"{what}: not allowed with a {self._key_role}'s key; expected another role's")
        return self._handlers[type(message)](identity, message, now)

    def _refused(self, identity: bytes, reason: str, of: str = "") -> m.Refused | None:
        """Counted; said to the sender unless it has been told often enough."""
        self.counts["refused"] += 1
        if not self._has_turn(identity):
            return None
        self._logged += 1
        if self._logged <= MAX_ANSWERS_PER_S:
            log.warning("refused: %a", reason[:500])
        return m.Refused(reason=reason[:1000], of=of)

    def _has_turn(self, identity: bytes) -> bool:
        """Whether this connection may cost the hub another answer in this second."""
        if self._answered[identity] >= MAX_ANSWERS_PER_S:
            self.counts["muted"] += 1
            return False
        self._answered[identity] += 1
        return True

    def _hello(self, identity: bytes, hello: m.Hello, now: float) -> m.Message | None:
        """A welcome; the role is taken by the beat that answers it, which no replayed hello brings."""
        if not self._has_turn(identity):
            return None
        roster = self.jobs.find(hello.job).coordinator.roster
        refused = roster.refusal(hello, now)
        if refused is None and (self._guard.is_full() or self.jobs.peers >= MAX_PEERS):
            refused = m.Refused(reason=f"expected at most {self.jobs.peers} ranks at this hub", silent_s=0.0)
        if refused is not None:
            refused.of, refused.job = "hello", hello.job
            self.counts["refused"] += 1
            return refused
        known = roster.known(hello.process)
        token = known.id if known else secrets.token_hex(16)
        self._hellos[identity] = token, hello
        if len(self._hellos) > MAX_HELLOS:
            self._hellos.popitem(last=False)
        return m.Welcome(job=hello.job, peer=token, hub=self.token, beat_s=BEAT_S)

    def _beat(self, identity: bytes, beat: m.Beat, now: float) -> m.Message | None:
        waiting = self._hellos.get(identity)
        if waiting is not None and (waiting[0], waiting[1].job) == (beat.peer, beat.job):
            del self._hellos[identity]
            coordinator = self.jobs.open(beat.job, now).coordinator
            admitted = coordinator.roster.admit(waiting[1], beat.peer, now)
            if isinstance(admitted, m.Refused):
                admitted.of, admitted.job = "hello", beat.job
                return admitted
            self._identities[beat.peer] = identity
            self._joined = True
            log.info("joined: %s", admitted)
            coordinator.joined(admitted, now)
        job = self.jobs.get(beat.job)
        peer = job.coordinator.roster.peers.get(beat.peer) if job else None
        if job is None or peer is None:
            return self._unknown(identity, beat)
        self._guard.heard(identity, beat.peer)
        peer.heard = now
        peer.state, peer.version = beat.state, beat.version
        self.counts["stale"] += min(max(0, beat.stale - peer.stale), MAX_STALE)
        peer.stale = beat.stale
        return self._alive(job, beat.peer)

    def _alive(self, job: ServedJob, peer: str) -> m.Alive:
        alive = m.Alive(peer=peer, hub=self.token, known=True)
        header = job.coordinator.header()
        of = job.coordinator.roster.peers.get(peer)
        alive.stamp(header._replace(incarnation=of.start.incarnation) if of and of.start else header)
        return alive

    def _unknown(self, identity: bytes, message: Any) -> m.Alive | None:
        """Of a peer that is not in the message's job."""
        self.counts["unknown"] += 1
        if not self._has_turn(identity):
            return None
        return m.Alive(job=message.job, peer=message.peer, hub=self.token, known=False)

    def _from_member(self, identity: bytes, message: Any, now: float) -> m.Message | None:
        if isinstance(message, m.Piece) and not message.peer:
            return self._client_piece(identity, message, now)
        job = self.jobs.get(message.job)
        peer = job.coordinator.roster.peers.get(message.peer) if job else None
        if job is None or peer is None or self._identities.get(message.peer) != identity:
            return self._unknown(identity, message)
        coordinator = job.coordinator
        self._guard.heard(identity, message.peer)
        peer.heard = now
        match message:
            case m.Piece():
                return self._piece(identity, job, message, now)
            case m.Leave():
                self._leave(job, peer, message.role, now)
            case m.Enter() | m.Poll():
                if (trainer := peer.trainer) is None:
                    raise ProtocolError(f"{type(message).__name__}: expected a trainer rank, got {peer}")
                if isinstance(message, m.Enter):
                    for name in ("join_s", "ready_s", "transfer_s"):
                        setattr(message, name, min(getattr(message, name), MAX_RANK_S))
                    coordinator.enter(message, now)
                    return None
                trainers = coordinator.roster.trainers()
                size = (
                    trainer.size if trainers.get(trainer.rank) is peer and len(trainers) == trainer.size else 0
                )
                number, committed = message.number, coordinator.floor
                coordinator.requests.poll(identity, trainer.rank, number, size, committed)
            case _:
                current = coordinator.is_current(message)
                if not coordinator.answer(message, now):
                    # Twice or out of turn; or of another incarnation, epoch or round.
                    self.counts["late" if current else "stale"] += 1
        return None

    def _piece(self, identity: bytes, job: ServedJob, piece: m.Piece, now: float) -> m.Message | None:
        """Of a message that is longer than a frame; from a member, and one at a time."""
        each = m.MAX_MESSAGE_BYTES if job.coordinator.expects(piece.peer) else MAX_IDLE_BYTES
        whole = self._pieces.add(piece.peer, piece.blob, last=piece.last, each=each, now=now)
        if whole is None:
            return None
        check_objects(whole)
        message = wire.decode_to_hub([wire.HEADER, whole])
        if isinstance(message, m.Piece):
            raise ProtocolError("piece: expected a message in pieces, got a piece")
        return self._handle(identity, message, now)

    def _client_piece(self, identity: bytes, piece: m.Piece, now: float) -> m.Message | None:
        """Of a request that carries tensors. All that are not whole yet share the room of one."""
        whole = self._asked.add(identity, piece.blob, last=piece.last, each=m.MAX_PAYLOAD_BYTES, now=now)
        if whole is None:
            return None
        check_objects(whole)
        message = wire.decode_to_hub([wire.HEADER, whole])
        if not isinstance(message, m.AskTask):
            raise ProtocolError(f"piece: expected a request with tensors, got {type(message).__name__}")
        return self._handle(identity, message, now)

    def _leave(self, job: ServedJob, peer: Peer, role: str, now: float) -> None:
        if len(peer.roles) > 1 and role in peer.roles:
            leaving = job.coordinator.roster.take_role(peer, role)
            gone = Peer(
                id=peer.id, process=peer.process, host=peer.host, pid=peer.pid, started=peer.started, heard=now
            )
            gone.roles[role] = leaving
            job.coordinator.lost(gone, "left", now)
        else:
            self._drop(job, peer, "left", now)

    def _drop(self, job: ServedJob, peer: Peer, reason: str, now: float) -> None:
        log.info("%s: %s", peer, reason)
        self.counts["dropped"] += reason != "left"
        job.coordinator.roster.remove(peer)
        self._identities.pop(peer.id, None)
        self._pieces.forget(peer.id)
        self._closed.pop(peer.id, None)
        job.coordinator.lost(peer, reason, now)

    def _store(self, identity: bytes, call: m.StoreCall, now: float) -> m.Message | None:
        job = self.jobs.get(call.job)
        if job is None or call.peer not in job.coordinator.roster.peers:
            return self._unknown(identity, call)
        self._guard.heard(identity, call.peer)
        if isinstance(call, m.StoreSet) and self.jobs.stored + len(call.value) > MAX_STORED_BYTES:
            raise ProtocolError(f"store: expected at most {MAX_STORED_BYTES} bytes of all jobs")
        return job.rendezvous.call(call, job.coordinator.epoch, member=job.coordinator.is_in_group(call.peer))

    # -- requests from outside ---------------------------------------------------------------------

    def _ask_task(self, identity: bytes, ask: m.AskTask, now: float) -> m.Message | None:
        if not self._has_turn(identity):
            return None
        if (refused := self._stranger(ask)) is not None:
            failure = m.Failure(rank="hub", tensor=None, reason=refused.reason.removeprefix("hub: "))
            return m.TaskEnd(id=ask.id, ok=False, verdict="failed", failures=[failure])
        ask.wait_s, ask.run_s = min(ask.wait_s, MAX_CLIENT_S), min(ask.run_s, MAX_CLIENT_S)
        coordinator = self.jobs.find(ask.job).coordinator
        coordinator.tasks.ask(identity, ask, now)
        coordinator.advance(now)
        return None

    def _ask_replicas(self, identity: bytes, ask: m.AskReplicas, now: float) -> m.Message | None:
        if not self._has_turn(identity):
            return None
        coordinator = self.jobs.find(ask.job).coordinator
        return coordinator.tasks.replicas(ask.id, coordinator.round is not None)

    def _status(self, identity: bytes, ask: a.AskStatus, now: float) -> m.Message | None:
        if not self._has_turn(identity):
            return None
        made, status = self._statuses.get(ask.job, (0.0, None))
        if status is None or now - made > STATUS_S or ask.past:
            counts = dict(self.counts) | {
                "not_allowed": self.counts["not_allowed"] + (self._door.refused if self._door else 0)
            }
            up_s, jobs = now - self._started, self.jobs.here
            coordinator = self.jobs.find(ask.job).coordinator
            status = status_of(coordinator, ask, self.token, up_s, counts, jobs, now)
            self._statuses.pop(ask.job, None)
            if len(status.peers) > MANY_PEERS:
                self._statuses[ask.job] = now, msgspec.structs.replace(status, past=[])
        return msgspec.structs.replace(status, id=ask.id)

    def _request(self, identity: bytes, ask: a.AskUpdate | a.AskCheck | a.AskVersion, now: float) -> m.Message:
        if (refused := self._stranger(ask)) is not None:
            return refused
        coordinator = self.jobs.find(ask.job).coordinator
        if isinstance(ask, a.AskVersion) and (reason := coordinator.unfit_version(ask.version)):
            return a.Answer(id=ask.id, ok=False, verdict="failed", reason=reason)
        ask.wait_s = min(ask.wait_s, MAX_CLIENT_S)
        return coordinator.requests.add(identity, ask, now)

    def _pause(self, identity: bytes, ask: a.AskPause, now: float) -> m.Message:
        if (refused := self._stranger(ask)) is not None:
            return refused
        for_s = min(ask.for_s, MAX_CLIENT_S)
        self.jobs.find(ask.job).coordinator.paused_until = now + for_s
        return a.Answer(id=ask.id, ok=True, reason=f"updates are held back for {for_s:.0f} s")

    def _resume(self, identity: bytes, ask: a.AskResume, now: float) -> m.Message:
        if (refused := self._stranger(ask)) is not None:
            return refused
        coordinator = self.jobs.find(ask.job).coordinator
        coordinator.paused_until = 0.0
        coordinator.advance(now)
        return a.Answer(id=ask.id, ok=True, reason="updates go on")

    def _stranger(self, ask: a.Command | m.AskTask) -> a.Answer | None:
        """What was recorded, at this hub's predecessor or elsewhere, or is for a job that is not here, is not
        done."""
        if ask.hub != self.token:
            reason = "hub: expected this hub's token"
        elif self.jobs.serves(ask.job):
            return None
        else:
            reason = f"job {ask.job!r}: expected one that has ranks here, {self.jobs.here}"
        self.counts["refused"] += 1
        return a.Answer(id=ask.id, ok=False, verdict="failed", reason=reason)

    # -- what goes out -----------------------------------------------------------------------------

    def _flush(self, now: float) -> None:
        """Send what the coordinators have decided. Who does not read is dropped, which decides anew."""
        while True:
            for job in self.jobs:
                self._flush_job(job.coordinator)
            if not self._slow:
                return
            found = self.jobs.of(self._slow.pop())
            if found is not None:
                self.counts["slow"] += 1
                self._drop(*found, f"reads too slowly: {MAX_UNREAD} messages unread", now)

    def _flush_job(self, coordinator: Coordinator) -> None:
        if coordinator.outbox:
            outbox = coordinator.outbox[:]
            coordinator.outbox.clear()
            last: m.Message | None = None
            frames: list[Any] = []
            for peer, message in outbox:
                if message is not last:
                    last, frames = message, _shared(wire.encode(message))
                if peer in self._identities and not self._send(self._identities[peer], frames, member=True):
                    self._slow.add(peer)
        answers, coordinator.requests.outbox = coordinator.requests.outbox, []
        for client, answer in [*answers, *coordinator.tasks.replies]:
            answer.job = coordinator.job
            self._answer(client, answer)
        coordinator.tasks.replies.clear()

    def _answer(self, identity: bytes, answer: m.Message) -> None:
        self._send(identity, wire.encode(answer))

    def _send(self, identity: bytes, frames: list[Any], *, member: bool = False) -> bool:
        """False if the connection has too much unread. One that is gone is left to its heartbeats."""
        nbytes = sum(len(frame) for frame in frames)
        if not self._guard.has_room(identity, nbytes, member=member):
            self.counts["unread"] += 1
            return False
        try:
            plain = all(isinstance(frame, bytes) for frame in frames)
            self._socket.send_multipart([identity, *frames], zmq.NOBLOCK, copy=plain)
        except zmq.Again:
            self.counts["unread"] += 1
            return False
        except zmq.ZMQError:
            self.counts["unsent"] += 1
        else:
            self._guard.gave(identity, nbytes)
        return True


def _has_ended(peer: Peer) -> bool:
    """Whether the process is one of this host, and runs no more."""
    return peer.host == host_name() and peer.started > 0 and not is_running(peer.pid, peer.started)


def _shared(frames: list[bytes]) -> list[Any]:
    return [frame if len(frame) < SHARED_BYTES else zmq.Frame(frame) for frame in frames]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="weightbus hub", description="Run the hub until it is stopped.")
    parser.add_argument("--address", help=f"tcp://host:port to listen on; else {ADDRESS_VARIABLE}")
    parser.add_argument("--ephemeral", action="store_true", help="leave with the last peer")
    parser.add_argument(
        "--dead-after", type=float, default=DEAD_AFTER_S, metavar="SECONDS", help="drop a silent peer after"
    )
    parser.add_argument("--keys", metavar="DIR", help="CURVE keys (weightbus keygen); else WEIGHTBUS_KEYS")
    parser.add_argument("--insecure", action="store_true", help="listen on any address without keys")
    options = parser.parse_args(arguments)
    # A hub that a trainer started has nobody who reads along.
    level = logging.ERROR if options.ephemeral else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s")
    try:
        keys = load_keys(options.keys, insecure=options.insecure)
        hub = Hub(
            address_of(options.address), ephemeral=options.ephemeral, dead_after_s=options.dead_after, keys=keys
        )
    except HubError as error:
        log.error("%s", error)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: hub.stop())
    _take_descriptors()
    hub.serve()
    return 0


def _take_descriptors() -> None:
    """As many as this process may have: connections of strangers take some of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    raise SystemExit(main())
