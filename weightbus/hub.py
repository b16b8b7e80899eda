"""The hub: the one address that all ranks and tools talk to. A process of its own, without torch.

``python -m weightbus.hub --address tcp://127.0.0.1:5757``. It owns one ROUTER socket, and a Unix socket for
ranks of its own host; it decodes what comes in, lets ``Coordinator`` decide, and sends. Nothing that arrives
can end it, and no peer can make it wait: it never blocks on a send, and takes messages of all connections in
turn.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import zmq

from weightbus import asks as a
from weightbus import messages as m
from weightbus import wire
from weightbus.door import Door
from weightbus.errors import HubError, ProtocolError
from weightbus.guard import OVERHEAD_BYTES, Guard
from weightbus.identity import ADDRESS_VARIABLE, address_of
from weightbus.jobs import Jobs, ServedJob
from weightbus.keys import Keys, load_keys
from weightbus.local import LocalServer
from weightbus.overview import status_of
from weightbus.protocol import Coordinator
from weightbus.roster import Peer

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

# A client's request that carries tensors comes in pieces; one that stops coming is forgotten after so long.
STALLED_S = 30.0

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
        self._local = LocalServer(max_frames=2, max_bytes=m.MAX_FRAME_BYTES, max_unsent=MAX_UNREAD)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._close()
            raise HubError(f"address: can't listen on {address}: {error}") from error
        self._identities: dict[str, bytes] = {}
        self._hellos: OrderedDict[bytes, tuple[str, m.Hello]] = OrderedDict()
        self._pieces: dict[str, bytearray] = {}
        # Requests of clients that are not whole yet, and when their last piece came.
        self._asked: dict[bytes, tuple[bytearray, float]] = {}
        self._slow: set[str] = set()
        self._answered: Counter[bytes] = Counter()
        self._logged = 0
        self._started = time.monotonic()
        self._joined = False
        self._last_peer = 0.0
        self._stopping = False
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
            if self._local.name:
                poller.register(self._local, zmq.POLLIN)
            if self._door:
                poller.register(self._door.socket, zmq.POLLIN)
            next_tick = next_second = 0.0
            while not self._stopping and not self._deserted():
                until = self._spin_until
                if not self._receive_local():
                    while not (int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN or self._receive_local()):
                        if time.monotonic() >= until:
                            poller.poll(50)
                            break
                if self._door:
                    self._door.answer()
                # Bounded, so that a flood does not keep the clock from ticking. The socket itself takes
                # one message of each connection in turn, so that it does not keep others waiting.
                for _ in range(200):
                    try:
                        frame = self._socket.recv(zmq.NOBLOCK, copy=False)
                    except zmq.Again:
                        break
                    self._receive(frame)
                now = time.monotonic()
                if now >= next_tick:
                    next_tick = now + 0.05
                    self._tick(now)
                if now >= next_second:
                    next_second = now + 1.0
                    self._answered.clear()
                    self._logged = 0
                    self.counts["cut"] += self._guard.cut()
        finally:
            self._close()

    def _close(self) -> None:
        self._guard.close()
        self._local.close_all()
        self._socket.close()
        if self._door:
            self._door.close()
        self._context.term()

    def _tick(self, now: float) -> None:
        self._guard.look()
        self._local.expire()
        for job in self.jobs:
            for peer in job.coordinator.roster.silent(now):
                self._drop(job, peer, f"died: not heard for {now - peer.heard:.1f} s", now)
        for identity in [i for i, (_, came) in self._asked.items() if now - came > STALLED_S]:
            del self._asked[identity]
        for job in self.jobs:
            job.coordinator.requests.expire(now)
            job.coordinator.advance(now)
        self._flush(now)

    def _deserted(self) -> bool:
        now = time.monotonic()
        if not self.ephemeral:
            return False
        if not self.jobs.is_empty:
            self._last_peer = now
            return False
        return now - self._last_peer > LINGER_S if self._joined else now - self._started > UNUSED_S

    # -- what comes in -----------------------------------------------------------------------------

    def _receive_local(self) -> bool:
        """What ranks of this host have sent; whether there was anything. The end of such a rank is known by
        that of its connection."""
        found = False
        for identity, frames in self._local.receive():
            found = True
            if frames is not None:
                self._take(identity, frames)
                if self._local.is_stranger(identity):
                    self._local.close(identity)
                continue
            gone = next((peer for peer, its in self._identities.items() if its == identity), None)
            if gone is not None and (member := self.jobs.of(gone)) is not None:
                now = time.monotonic()
                self._drop(*member, "died: its connection was closed", now)
                self._flush(now)
        return found

    def _receive(self, frame: zmq.Frame) -> None:
        """One message, of which ``frame`` is the first: the connection's identity."""
        identity, number = frame.bytes, int(frame.get(zmq.SRCFD))
        frames: list[bytes] = []
        nbytes = OVERHEAD_BYTES
        while frame.more:
            frame = self._socket.recv(copy=False)
            nbytes += len(frame)
            # No message has more than two: what is behind them is read, and forgotten.
            if len(frames) < 3:
                frames.append(frame.bytes)
        self._guard.taken[number] += nbytes
        self._take(identity, frames)

    def _take(self, identity: bytes, frames: list[bytes]) -> None:
        now = time.monotonic()
        self.counts["messages"] += 1
        answer: m.Message | None
        job: ServedJob | None = None
        try:
            message = wire.decode_to_hub(frames)
            job = self.jobs.get(message.job)
            in_round = job is not None and job.coordinator.round is not None
            if self._local.is_stranger(identity):
                self._attach(identity, message)
                answer = None
            else:
                answer = self._handlers[type(message)](identity, message, now)
            if (in_round or (job is not None and job.coordinator.round is not None)) and not isinstance(
                message, ROUTINE
            ):
                self._spin_until = now + HUB_SPIN_S
        except ProtocolError as error:
            answer = self._refused(identity, str(error))
        except Exception as error:  # a fault of ours must not end the hub for all the others
            self.counts["errors"] += 1
            log.exception("a message could not be handled")
            answer = m.Refused(reason=f"{type(error).__name__} in the hub: {error}"[:1000])
        if answer is not None:
            if job is not None:
                answer.job = job.name
            self._send(identity, wire.encode(answer))
        self._flush(now)

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
        if refused is not None:
            refused.of, refused.job = "hello", hello.job
            self.counts["refused"] += 1
            return refused
        known = next((peer.id for peer in roster.peers.values() if peer.process == hello.process), None)
        token = known or secrets.token_hex(16)
        self._hellos[identity] = token, hello
        if len(self._hellos) > MAX_HELLOS:
            self._hellos.popitem(last=False)
        return m.Welcome(job=hello.job, peer=token, hub=self.token, beat_s=BEAT_S, local=self._local.name)

    def _beat(self, identity: bytes, beat: m.Beat, now: float) -> m.Message | None:
        waiting = self._hellos.get(identity)
        if waiting is not None and (waiting[0], waiting[1].job) == (beat.peer, beat.job):
            del self._hellos[identity]
            coordinator = self.jobs.open(beat.job, now).coordinator
            admitted = coordinator.roster.admit(waiting[1], beat.peer, now)
            if isinstance(admitted, m.Refused):
                admitted.of, admitted.job = "hello", beat.job
                return admitted
            if self._identities.get(beat.peer, b"") not in self._local:
                self._identities[beat.peer] = identity
            self._joined = True
            log.info("joined: %s", admitted)
            coordinator.joined(admitted, now)
        job = self.jobs.get(beat.job)
        peer = job.coordinator.roster.peers.get(beat.peer) if job else None
        if job is None or peer is None:
            return self._unknown(identity, beat)
        peer.heard = now
        peer.state, peer.version = beat.state, beat.version
        self.counts["stale"] += max(0, beat.stale - peer.stale)
        peer.stale = beat.stale
        return self._alive(job, beat.peer)

    def _alive(self, job: ServedJob, peer: str) -> m.Alive:
        alive = m.Alive(peer=peer, hub=self.token, known=True)
        header = job.coordinator.header()
        of = job.coordinator.roster.peers.get(peer)
        alive.stamp(header._replace(incarnation=of.start.incarnation) if of and of.start else header)
        return alive

    def _attach(self, identity: bytes, message: m.Message) -> None:
        """The first message of a Unix socket: whose it is. Keys do not guard it, so nothing else is heard."""
        former = self._identities.get(message.peer) if isinstance(message, m.Beat) else None
        job = self.jobs.get(message.job)
        if not isinstance(message, m.Beat) or job is None or former is None or former in self._local:
            raise ProtocolError(f"local: expected a beat of a member first, got {type(message).__name__}")
        self._identities[message.peer] = identity
        self._local.admit(identity)
        # The answer is the last message by the way so far: so none overtakes another.
        self._send(former, wire.encode(self._alive(job, message.peer)))

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
        peer.heard = now
        match message:
            case m.Piece():
                return self._piece(identity, message, now)
            case m.Leave():
                self._leave(job, peer, message.role, now)
            case m.Enter() | m.Poll():
                if (trainer := peer.trainer) is None:
                    raise ProtocolError(f"{type(message).__name__}: expected a trainer rank, got {peer}")
                if isinstance(message, m.Enter):
                    coordinator.enter(message, now)
                    return None
                trainers = coordinator.roster.trainers()
                size = (
                    trainer.size if trainers.get(trainer.rank) is peer and len(trainers) == trainer.size else 0
                )
                number, committed = message.number, coordinator.committed
                coordinator.requests.poll(identity, trainer.rank, number, size, committed)
            case _:
                current = coordinator.is_current(message)
                if not coordinator.answer(message, now):
                    # Twice or out of turn; or of another incarnation, epoch or round.
                    self.counts["late" if current else "stale"] += 1
        return None

    def _piece(self, identity: bytes, piece: m.Piece, now: float) -> m.Message | None:
        """Of a message that is longer than a frame; from a member, and one at a time."""
        whole = self._pieces.setdefault(piece.peer, bytearray())
        if len(whole) + len(piece.blob) > m.MAX_MESSAGE_BYTES:
            del self._pieces[piece.peer]
            raise ProtocolError(f"piece: expected at most {m.MAX_MESSAGE_BYTES} bytes in one message")
        whole += piece.blob
        if not piece.last:
            return None
        del self._pieces[piece.peer]
        message = wire.decode_to_hub([wire.HEADER, bytes(whole)])
        if isinstance(message, m.Piece):
            raise ProtocolError("piece: expected a message in pieces, got a piece")
        return self._handlers[type(message)](identity, message, now)

    def _client_piece(self, identity: bytes, piece: m.Piece, now: float) -> m.Message | None:
        """Of a request that carries tensors. All that are not whole yet share the room of one."""
        whole, _ = self._asked.pop(identity, (bytearray(), now))
        room = m.MAX_PAYLOAD_BYTES - sum(len(other) for other, _ in self._asked.values())
        if len(whole) + len(piece.blob) > room:
            raise ProtocolError(f"piece: expected at most {room} bytes in one request just now")
        whole += piece.blob
        if not piece.last:
            self._asked[identity] = whole, now
            return None
        message = wire.decode_to_hub([wire.HEADER, bytes(whole)])
        if not isinstance(message, m.AskTask):
            raise ProtocolError(f"piece: expected a request with tensors, got {type(message).__name__}")
        return self._ask_task(identity, message, now)

    def _leave(self, job: ServedJob, peer: Peer, role: str, now: float) -> None:
        if len(peer.roles) > 1 and role in peer.roles:
            leaving = peer.roles.pop(role)
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
        del job.coordinator.roster.peers[peer.id]
        self._local.close(self._identities.pop(peer.id, b""))
        self._pieces.pop(peer.id, None)
        job.coordinator.lost(peer, reason, now)

    def _store(self, identity: bytes, call: m.StoreCall, now: float) -> m.Message | None:
        job = self.jobs.get(call.job)
        if job is None or call.peer not in job.coordinator.roster.peers:
            return self._unknown(identity, call)
        return job.rendezvous.call(call, job.coordinator.epoch)

    # -- requests from outside ---------------------------------------------------------------------

    def _ask_task(self, identity: bytes, ask: m.AskTask, now: float) -> m.Message | None:
        if not self._has_turn(identity):
            return None
        if (refused := self._stranger(ask)) is not None:
            failure = m.Failure(rank="hub", tensor=None, reason=refused.reason.removeprefix("hub: "))
            return m.TaskEnd(id=ask.id, ok=False, verdict="failed", failures=[failure])
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
        counts = dict(self.counts) | {"not_allowed": self._door.refused if self._door else 0}
        up_s, jobs = now - self._started, self.jobs.here
        return status_of(self.jobs.find(ask.job).coordinator, ask, self.token, up_s, counts, jobs, now)

    def _request(self, identity: bytes, ask: a.AskUpdate | a.AskCheck | a.AskVersion, now: float) -> m.Message:
        return self._stranger(ask) or self.jobs.find(ask.job).coordinator.requests.add(identity, ask, now)

    def _pause(self, identity: bytes, ask: a.AskPause, now: float) -> m.Message:
        if (refused := self._stranger(ask)) is not None:
            return refused
        self.jobs.find(ask.job).coordinator.paused_until = now + ask.for_s
        return a.Answer(id=ask.id, ok=True, reason=f"updates are held back for {ask.for_s:.0f} s")

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
                if peer in self._identities and not self._send(self._identities[peer], frames):
                    self._slow.add(peer)
        if coordinator.requests.outbox:
            answers, coordinator.requests.outbox = coordinator.requests.outbox, []
            for client, answer in answers:
                answer.job = coordinator.job
                self._send(client, wire.encode(answer))
        if coordinator.tasks.replies:
            replies = coordinator.tasks.replies[:]
            coordinator.tasks.replies.clear()
            for client, reply in replies:
                reply.job = coordinator.job
                self._send(client, wire.encode(reply))

    def _send(self, identity: bytes, frames: list[Any]) -> bool:
        """False if the connection has too much unread. One that is gone is left to its heartbeats."""
        if identity in self._local:
            buffers = [frame.buffer if isinstance(frame, zmq.Frame) else frame for frame in frames]
            return self._local.send(identity, buffers)
        try:
            plain = all(isinstance(frame, bytes) for frame in frames)
            self._socket.send_multipart([identity, *frames], zmq.NOBLOCK, copy=plain)
        except zmq.Again:
            self.counts["unread"] += 1
            return False
        except zmq.ZMQError:
            self.counts["unsent"] += 1
        return True


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
    hub.serve()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
