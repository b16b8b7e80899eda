"""Ranks at the hub, from hello to the end: by which connections they are known, what they say, who has gone."""

from __future__ import annotations

import logging
import secrets
from collections import Counter, OrderedDict
from typing import Any

from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.control.identity import host_name, is_running
from weightbus.errors import ProtocolError
from weightbus.hub.flood_guard import Guard
from weightbus.hub.jobs import Handler, Jobs, ServedJob
from weightbus.hub.members import Peer
from weightbus.hub.reassembly import MAX_IDLE_BYTES, Unfinished, check_objects
from weightbus.hub.roster import MAX_PEERS
from weightbus.hub.turns import Turns

log = logging.getLogger("weightbus.hub")

BEAT_S = 0.5

# What a rank may have the hub wait for.
MAX_RANK_S = 86400.0

# Bytes in the rendezvous of all jobs.
MAX_STORED_BYTES = 512 << 20

# Bytes of unfinished messages of all members.
MAX_PIECES_BYTES = 1 << 30

# What one beat adds to a count at most, whatever it says.
MAX_STALE = 1 << 20

# Hellos whose welcome has not been answered yet; the oldest go first.
MAX_HELLOS = 1024

# Of so many quiet ranks of a job it is seen at once whether their processes have ended.
MAX_QUIET = 256


class Membership:
    """Who is a member, and by which connection.

    token: the hub's. counts: the hub's own. identities: the connection by which each member is sent to. pieces:
    messages of members that are not whole yet. ever: whether anybody has joined.
    """

    def __init__(self, jobs: Jobs, token: str, counts: Counter[str], turns: Turns, guard: Guard) -> None:
        self._jobs, self._token, self._counts, self._turns, self._guard = jobs, token, counts, turns, guard
        self.identities: dict[str, bytes] = {}
        self.pieces: Unfinished[str] = Unfinished(together=MAX_PIECES_BYTES)
        self.ever = False
        self._former: dict[str, bytes] = {}  # by which a member may still send what it has begun
        self._hellos: OrderedDict[bytes, tuple[str, m.Hello]] = OrderedDict()
        self._closed: dict[str, float] = {}  # members whose connections have all been closed, and since when
        self.handlers: dict[type[m.Message], Handler] = {
            m.Hello: self._hello,
            m.Beat: self._beat,
            **dict.fromkeys((m.Leave, m.Enter, m.Poll), self._from_member),
            **dict.fromkeys((m.Facts, m.Ready, m.Refuse, m.Done, m.Sums, m.Clues, m.Probed), self._from_member),
            **dict.fromkeys((m.Later, m.Await), self._from_member),
            **dict.fromkeys((m.StoreSet, m.StoreGet, m.StoreAdd), self._store),
            **dict.fromkeys((m.StoreCheck, m.StoreDelete, m.StoreCount), self._store),
        }

    # -- joining -----------------------------------------------------------------------------------

    def _hello(self, identity: bytes, hello: m.Hello, now: float) -> m.Message | None:
        """A welcome; the role is taken by the beat that answers it, which no replayed hello brings."""
        if not self._turns.take(identity):
            return None
        roster = self._jobs.find(hello.job).coordinator.roster
        refused = roster.refusal(hello, now)
        if refused is None and (self._guard.is_full() or self._jobs.peers >= MAX_PEERS):
            refused = m.Refused(reason=f"expected at most {self._jobs.peers} ranks at this hub", silent_s=0.0)
        if refused is not None:
            refused.of, refused.job = "hello", hello.job
            self._counts["refused"] += 1
            return refused
        known = roster.known(hello.process)
        token = known.id if known else secrets.token_hex(16)
        self._hellos[identity] = token, hello
        if len(self._hellos) > MAX_HELLOS:
            self._hellos.popitem(last=False)
        return m.Welcome(job=hello.job, peer=token, hub=self._token, beat_s=BEAT_S)

    def _beat(self, identity: bytes, beat: m.Beat, now: float) -> m.Message | None:
        waiting = self._hellos.get(identity)
        if waiting is not None and (waiting[0], waiting[1].job) == (beat.peer, beat.job):
            del self._hellos[identity]
            coordinator = self._jobs.open(beat.job, now).coordinator
            admitted = coordinator.roster.admit(waiting[1], beat.peer, now)
            if isinstance(admitted, m.Refused):
                admitted.of, admitted.job = "hello", beat.job
                return admitted
            self.identities[beat.peer] = identity
            self.ever = True
            log.info("joined: %s", admitted)
            coordinator.joined(admitted, now)
        job = self._jobs.get(beat.job)
        peer = job.coordinator.roster.peers.get(beat.peer) if job else None
        if job is None or peer is None:
            return self.unknown(identity, beat)
        self._guard.heard(identity, beat.peer)
        if beat.here and self.identities[beat.peer] != identity:
            self._former[beat.peer] = self.identities[beat.peer]
            self.identities[beat.peer] = identity
        peer.heard = now
        peer.state, peer.version = beat.state, beat.version
        self._counts["stale"] += min(max(0, beat.stale - peer.stale), MAX_STALE)
        peer.stale = beat.stale
        peer.looks = beat.looks
        alive = m.Alive(peer=beat.peer, hub=self._token, known=True)
        header = job.coordinator.header()
        alive.stamp(header._replace(incarnation=peer.start.incarnation) if peer.start else header)
        return alive

    # -- what members say --------------------------------------------------------------------------

    def find(self, identity: bytes, message: Any, now: float) -> tuple[ServedJob, Peer] | None:
        """The job and the member that a message is of, which has now been heard; None if it is of neither."""
        job = self._jobs.get(message.job)
        peer = job.coordinator.roster.peers.get(message.peer) if job else None
        known = self.identities.get(message.peer), self._former.get(message.peer)
        if job is None or peer is None or identity not in known:
            return None
        self._guard.heard(identity, message.peer)
        peer.heard = now
        return job, peer

    def unknown(self, identity: bytes, message: Any) -> m.Alive | None:
        """The answer to a peer that is not in the message's job."""
        self._counts["unknown"] += 1
        if not self._turns.take(identity):
            return None
        return m.Alive(job=message.job, peer=message.peer, hub=self._token, known=False)

    def add(self, job: ServedJob, piece: m.Piece, now: float) -> m.Message | None:
        """Take a piece of a message that is longer than a frame; the message, once it is whole."""
        each = m.MAX_MESSAGE_BYTES if job.coordinator.expects(piece.peer) else MAX_IDLE_BYTES
        whole = self.pieces.add(piece.peer, piece.blob, last=piece.last, each=each, now=now)
        if whole is None:
            return None
        check_objects(whole)
        message = wire.decode_to_hub([wire.HEADER, whole])
        if isinstance(message, m.Piece):
            raise ProtocolError("piece: expected a message in pieces, got a piece")
        return message

    def _from_member(self, identity: bytes, message: Any, now: float) -> m.Message | None:
        found = self.find(identity, message, now)
        if found is None:
            return self.unknown(identity, message)
        job, peer = found
        coordinator = job.coordinator
        match message:
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
                if not coordinator.answer(message, now):
                    # Twice or out of turn; or of another incarnation, epoch or round.
                    self._counts["late" if coordinator.is_current(message) else "stale"] += 1
        return None

    def _store(self, identity: bytes, call: m.StoreCall, now: float) -> m.Message | None:
        job = self._jobs.get(call.job)
        if job is None or call.peer not in job.coordinator.roster.peers:
            return self.unknown(identity, call)
        self._guard.heard(identity, call.peer)
        if isinstance(call, m.StoreSet) and self._jobs.stored + len(call.value) > MAX_STORED_BYTES:
            raise ProtocolError(f"store: expected at most {MAX_STORED_BYTES} bytes of all jobs")
        return job.rendezvous.call(call, job.coordinator.epoch, member=job.coordinator.is_in_group(call.peer))

    # -- who has gone ------------------------------------------------------------------------------

    def connection_ended(self, identity: bytes, peer: str, now: float) -> None:
        """A connection has been closed. identity, peer: whose it was; empty where that is not known."""
        if peer and not self._guard.is_connected(peer):
            self._closed.setdefault(peer, now)
        if identity and not self._guard.is_here(identity):
            self._hellos.pop(identity, None)

    def drop_closed(self, gone_s: float, now: float) -> None:
        """Drop members whose connections have all been closed for ``gone_s``, or whose process has ended."""
        for peer, since in list(self._closed.items()):
            member = self._jobs.of(peer)
            if member is None or self._guard.is_connected(peer):
                del self._closed[peer]
            elif now - since > gone_s or _has_ended(member[1]):
                del self._closed[peer]
                self.drop(*member, "died: its connection was closed", now)

    def drop_silent(self, job: ServedJob, now: float) -> None:
        for peer in job.coordinator.roster.silent(now):
            self.drop(job, peer, f"died: not heard for {now - peer.heard:.1f} s", now)

    def drop_ended(self, now: float) -> None:
        """Drop ranks of this host that have ended, and left their connections to a process that they had
        forked."""
        for job in self._jobs:
            quiet = [peer for peer in job.coordinator.roster.peers.values() if now - peer.heard > 2 * BEAT_S]
            for peer in quiet[:MAX_QUIET]:
                if _has_ended(peer):
                    self.drop(job, peer, "died: its process has ended", now)

    def is_sent_to(self, identity: bytes) -> bool:
        """Whether a member is sent to by this connection."""
        return identity in self.identities.values()

    def connections(self) -> list[bytes]:
        """Those by which members are sent to, or may still be heard."""
        return [*self.identities.values(), *self._former.values()]

    def are_back(self, since: float) -> bool:
        """Whether all members have connected again since then."""
        return all(self._guard.is_here(one, since=since) for one in self.identities.values())

    def drop(self, job: ServedJob, peer: Peer, reason: str, now: float) -> None:
        log.info("%s: %s", peer, reason)
        self._counts["dropped"] += reason != "left"
        job.coordinator.roster.remove(peer)
        self.identities.pop(peer.id, None)
        self._former.pop(peer.id, None)
        self.pieces.forget(peer.id)
        self._closed.pop(peer.id, None)
        job.coordinator.lost(peer, reason, now)

    def _leave(self, job: ServedJob, peer: Peer, role: str, now: float) -> None:
        if len(peer.roles) > 1 and role in peer.roles:
            leaving = job.coordinator.roster.take_role(peer, role)
            gone = Peer(
                id=peer.id, process=peer.process, host=peer.host, pid=peer.pid, started=peer.started, heard=now
            )
            gone.roles[role] = leaving
            job.coordinator.lost(gone, "left", now)
        else:
            self.drop(job, peer, "left", now)


def _has_ended(peer: Peer) -> bool:
    """Whether the process is one of this host, and runs no more."""
    return peer.host == host_name() and peer.started > 0 and not is_running(peer.pid, peer.started)
