"""The hub's part in tasks: what ranks do together outside updates and checks, asked for by a client.

A task is one round, and a round is this table: in each step every rank of it answers once, and when all
have, the last column follows.

    load, of a replica's ranks   PREPARE  Facts   relay what each takes and has digested to all
                                 READY    Ready   go
                                 RUN      Done    outcome
    save, of the trainer ranks   PREPARE  Facts   relay what each holds to all
                                 READY    Ready   go
                                 WRITE    Facts   relay the digests of what each has written
                                 RUN      Done    outcome
    probe, of a replica's ranks  PREPARE  Facts   outcome, with the answers for the client

A refusal, a death or a deadline ends it in any step; up to READY, where nothing has been written, so does the
end of the client's connection. Tasks of the same ranks wait for each other, and all of them for updates; one
that can't start yet keeps none behind it. An update waits, before its offer, for the tasks that are going on.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from weightbus.control import messages as m
from weightbus.hub.members import Peer, some
from weightbus.hub.roster import Roster, first_absent

MAX_WAITING = 64
MAX_OF_ONE = 16

# Once one rank has failed, the others may still say within this time what they know of it.
GRACE_S = 1.0

# Of one task so many are noted.
MAX_FAILURES = 1000

Answer = m.Facts | m.Ready | m.Refuse | m.Done
Known = Literal["empty", "ready", "torn"]
_TORN: tuple[Known, int | None] = "torn", None


class Step(Enum):
    PREPARE = auto()
    READY = auto()
    WRITE = auto()
    RUN = auto()


ANSWERS: dict[Step, tuple[type[m.Message], ...]] = {
    Step.PREPARE: (m.Facts, m.Refuse),
    Step.READY: (m.Ready, m.Refuse),
    Step.WRITE: (m.Facts, m.Refuse),
    Step.RUN: (m.Done,),
}
STEPS: dict[type[m.Task], tuple[Step, ...]] = {
    m.LoadTask: (Step.PREPARE, Step.READY, Step.RUN),
    m.SaveTask: (Step.PREPARE, Step.READY, Step.WRITE, Step.RUN),
    m.ProbeTask: (Step.PREPARE,),
}


@dataclass(slots=True, kw_only=True)
class Waiting:
    """A request that has not started. client: to be answered at the end."""

    client: bytes
    ask: m.AskTask
    deadline: float


@dataclass(slots=True, kw_only=True)
class Going:
    """The task that is going on."""

    request: Waiting
    update: int
    started: float
    deadline: float
    members: list[m.Member]
    header: m.Header
    step: Step = Step.PREPARE
    answers: dict[str, m.Message] = field(default_factory=dict)
    failures: list[m.Failure] = field(default_factory=list)

    @property
    def task(self) -> m.Task:
        return self.request.ask.task

    def member(self, peer: str) -> m.Member | None:
        return next((member for member in self.members if member.peer == peer), None)


class Tasks:
    """All requests at the hub: those that are going on, each with ranks of its own, and those that wait.

    outbox: (peer, message) for ranks. number: the next number of a round; header: its header.
    replies: (connection, message) for clients.
    """

    def __init__(
        self,
        roster: Roster,
        outbox: list[tuple[str, m.Message]],
        number: Callable[[], int],
        header: Callable[[int], m.Header],
    ) -> None:
        self._roster, self._outbox, self._number, self._header = roster, outbox, number, header
        self.replies: list[tuple[bytes, m.Message]] = []
        self.running: list[Going] = []
        self._waiting: deque[Waiting] = deque()
        self._known: dict[int, tuple[Known, int | None]] = {}
        self.touched: set[int] = set()  # replicas that hold what a task has written

    @property
    def waiting(self) -> int:
        """How many requests have not started."""
        return len(self._waiting)

    # -- what comes in -----------------------------------------------------------------------------

    def ask(self, client: bytes, ask: m.AskTask, now: float) -> None:
        request = Waiting(client=client, ask=ask, deadline=now + ask.wait_s)
        nbytes = sum(frame.nbytes for one in [ask, *(w.ask for w in self._waiting)] for frame in one.frames)
        longest = max((frame.nbytes for frame in ask.frames), default=0)
        if longest > m.MAX_MESSAGE_BYTES:
            text = f"payloads: expected at most {m.MAX_MESSAGE_BYTES} bytes in each, got {longest}"
            self._refuse(request, text)
        elif sum(w.client == client for w in self._waiting) >= MAX_OF_ONE:
            self._refuse(request, f"expected at most {MAX_OF_ONE} requests of one client to wait, got one more")
        elif len(self._waiting) >= MAX_WAITING:
            self._refuse(request, f"expected at most {MAX_WAITING} requests to wait, got one more")
        elif nbytes > m.MAX_PAYLOAD_BYTES:
            text = f"expected at most {m.MAX_PAYLOAD_BYTES} bytes of payloads in all that wait, got {nbytes}"
            self._refuse(request, text)
        else:
            self._waiting.append(request)

    def replicas(self, id: str, busy: bool) -> m.Replicas:
        """What is known of all replicas that have a rank here."""
        found = []
        for replica, ranks in sorted(self._roster.replicas().items()):
            size = next(peer.server.size for peer in ranks.values() if peer.server)
            state, version = self._known.get(replica, ("empty", None))
            if state == "torn" and all(peer.state == "ready" for peer in ranks.values()):
                state, version = "ready", next(peer.version for peer in ranks.values())
            found.append(
                m.ReplicaInfo(replica=replica, size=size, joined=len(ranks), state=state, version=version)
            )
        return m.Replicas(id=id, replicas=found, busy=busy or bool(self.running))

    def saw(
        self, replicas: Iterable[int], ok: bool, moved: bool, version: int | None, *, complete: bool = True
    ) -> None:
        """An update or a load of these replicas has ended. complete: it was not of some modules only, beside
        which others may still hold a mixture; whether they do, the ranks' beats tell."""
        for replica in replicas:
            if ok and (complete or self._known.get(replica) != _TORN):
                self._known[replica] = "ready", version
            elif moved and not ok:
                self._known[replica] = _TORN
                for peer in self._roster.replicas().get(replica, {}).values():
                    peer.state = "torn"  # as its next beat will say

    def answer(self, message: m.Message, now: float) -> bool:
        """A rank's answer; False if it is of no use (late, repeated, out of turn, or of an update)."""
        going = next((going for going in self.running if message.header == going.header), None)
        if going is None or not isinstance(message, Answer):
            return False
        member = going.member(message.peer)
        if member is None or (not isinstance(message, m.Refuse) and message.peer in going.answers):
            return False
        if isinstance(going.answers.get(message.peer), m.Refuse):
            return False
        if not isinstance(message, (m.Refuse, *ANSWERS[going.step])):
            return False
        going.answers[message.peer] = message
        reason = message.reason if isinstance(message, m.Refuse) else getattr(message, "error", "")
        if reason:
            self._note(going, str(member), reason, now)
        return True

    def lost(self, peer: Peer, reason: str, now: float) -> None:
        """A peer left or died, with the roles that it has."""
        if peer.server and peer.server.replica not in self._roster.replicas():
            self._known.pop(peer.server.replica, None)
        for going in self.running:
            member = going.member(peer.id)
            saves = isinstance(going.task, m.SaveTask)
            if member is not None and (peer.trainer if saves else peer.server) is not None:
                going.answers.pop(peer.id, None)
                going.members.remove(member)
                self._note(going, str(peer), reason, now)

    def gone(self, client: bytes, now: float) -> None:
        """A client has closed its connection: nobody hears how what it asked for ends. What has begun to write
        goes on to its end."""
        self._waiting = deque(request for request in self._waiting if request.client != client)
        for going in list(self.running):
            if going.request.client == client and going.step in (Step.PREPARE, Step.READY):
                reason = "the client that asked for it has gone"
                going.failures.append(m.Failure(rank="hub", tensor=None, reason=reason))
                self._end(going, "failed", now)

    # -- what follows ------------------------------------------------------------------------------

    def advance(self, now: float, *, free: bool) -> None:
        """Take the next step of each. free: no update is going on, or could be."""
        for going in list(self.running):
            self._step(going, now)
        for request in list(self._waiting):
            members = self._members(request.ask.task)
            if now >= request.deadline:
                self._waiting.remove(request)
                why = "another task was going on" if free else "an update was going on"
                self._refuse(request, members if isinstance(members, str) else why)
            elif not free:
                continue
            elif isinstance(members, str):
                if not self._coming(request.ask.task):
                    self._waiting.remove(request)
                    self._refuse(request, members)
            elif not any(going.member(member.peer) for going in self.running for member in members):
                self._waiting.remove(request)
                if reason := _unfit(request.ask, len(members)):
                    self._refuse(request, reason)
                else:
                    self._start(request, members, now)

    def _members(self, task: m.Task) -> list[m.Member] | str:
        """Who takes part, in order; or why the task can't start."""
        if isinstance(task, m.SaveTask):
            trainers = self._roster.trainers()
            size = next((peer.trainer.size for peer in trainers.values() if peer.trainer), 0)
            if len(trainers) < size or not size:
                gone = ", ".join(f"trainer rank {rank}" for rank in first_absent(size, trainers))
                return f"expected all {size} trainer ranks; {gone or 'all of them'} not joined"
            return [peer.member() for _, peer in sorted(trainers.items())]
        replicas, complete = self._roster.replicas(), self._roster.complete()
        if task.replica is None and len(complete) != 1:
            return f"replica: expected one of the complete replicas {some(complete)}, got none"
        replica = complete[0] if task.replica is None else task.replica
        if replica not in complete:
            joined = some(replicas.get(replica, {}))
            there = some(complete)
            return f"replica: expected one of the complete replicas {there}, got {replica} (ranks {joined})"
        return [peer.member() for _, peer in sorted(replicas[replica].items())]

    def _coming(self, task: m.Task) -> bool:
        """Whether some of its ranks are here, and the others may be just coming."""
        if isinstance(task, m.SaveTask):
            return True
        replicas, complete = self._roster.replicas(), self._roster.complete()
        if task.replica is None:
            return bool(replicas) and not complete
        return task.replica in replicas and task.replica not in complete

    def _start(self, request: Waiting, members: list[m.Member], now: float) -> None:
        ask, number = request.ask, self._number()
        going = Going(
            request=request,
            update=number,
            header=self._header(number),
            started=now,
            deadline=now + ask.run_s,
            members=members,
        )
        self.running.append(going)
        told = m.public(members)
        places = {frame.place for frame in ask.frames}
        for place, member in enumerate(members):
            mine = [i for i, frame in enumerate(ask.frames) if len(places) == 1 or frame.place == place]
            offer = m.TaskOffer(
                task=ask.task,
                members=told,
                run_s=ask.run_s,
                frames=[ask.frames[i] for i in mine],
                payloads=[ask.payloads[i] for i in mine],
            )
            offer.stamp(going.header)
            self._outbox.append((member.peer, offer))
        ask.payloads = []  # the sockets hold them now

    def _step(self, going: Going, now: float) -> None:
        waiting = [member for member in going.members if member.peer not in going.answers]
        if waiting and now < going.deadline:
            return
        if going.failures or waiting:
            if not going.failures:
                for member in waiting:
                    text = f"no answer in step {going.step.name}; waited {now - going.started:.1f} s"
                    going.failures.append(m.Failure(rank=str(member), tensor=None, reason=text))
            self._end(going, "failed", now)
            return
        if going.step is Step.RUN:
            dones = [answer for answer in going.answers.values() if isinstance(answer, m.Done)]
            said = {done.verdict for done in dones}
            order: tuple[m.Word, ...] = ("unverified", "partial", "verified")
            self._end(going, next(word for word in order if word in said), now)
            return
        steps = STEPS[type(going.task)]
        following = steps[steps.index(going.step) + 1 :]
        if not following:
            self._end(going, "verified", now)
            return
        if going.step is Step.READY:
            self._send(going, m.Go(seed=secrets.token_bytes(32)))
        else:
            self._send(going, self._gathered(going))
        going.step, going.answers = following[0], {}
        going.deadline = now + going.request.ask.run_s

    def _gathered(self, going: Going) -> m.Gathered:
        blobs: dict[bytes, int] = {}
        holder = {}
        for place, member in enumerate(going.members):
            answer = going.answers[member.peer]
            assert isinstance(answer, m.Facts)  # noqa: S101 - all that the step takes
            holder[place] = blobs.setdefault(answer.blob, len(blobs))
        of: m.FactsOf = "prepare" if going.step is Step.PREPARE else "write"
        return m.Gathered(of=of, blobs=list(blobs), holder=holder)

    # -- ends --------------------------------------------------------------------------------------

    def _end(self, going: Going, verdict: m.Word, now: float) -> None:
        ok = verdict != "failed"
        moved = going.step in (Step.WRITE, Step.RUN) and not isinstance(going.task, m.ProbeTask)
        dones = [answer for answer in going.answers.values() if isinstance(answer, m.Done)]
        servers = [member.server for member in going.members if member.server]
        partial = m.cut({name: why for done in dones for name, why in sorted(done.partial.items())})
        outcome = m.Outcome(
            ok=ok,
            moved=moved,
            verdict=verdict,
            failures=going.failures[:1000],
            partial=partial,
            seconds=now - going.started,
            trainers=sum(member.trainer is not None for member in going.members),
            replicas=sorted({server.replica for server in servers}),
            servers=len(servers),
        )
        version = next((done.version for done in dones), None)
        if isinstance(going.task, m.LoadTask):
            self.saw(outcome.replicas, ok, moved, version)
        perturbs = isinstance(going.task, m.ProbeTask) and going.task.question == "perturb"
        if perturbs:
            self.saw(outcome.replicas, False, True, None)
        if moved or perturbs:
            self.touched |= set(outcome.replicas)
        facts = [going.answers.get(member.peer) for member in going.members]
        end = m.TaskEnd(
            id=going.request.ask.id,
            ok=ok,
            verdict=verdict,
            moved=moved,
            failures=outcome.failures,
            partial=partial,
            version=version,
            seconds=outcome.seconds,
            ranks=len(going.members),
            answers=[answer.blob for answer in facts if isinstance(answer, m.Facts)] if ok else [],
        )
        self._send(going, outcome)
        self.replies.append((going.request.client, end))
        self.running.remove(going)

    def break_off(self, reason: str, now: float) -> None:
        """A fault ends the tasks that are going on, and no other."""
        for going in list(self.running):
            going.failures.append(m.Failure(rank="hub", tensor=None, reason=reason))
            self._end(going, "failed", now)

    def _refuse(self, request: Waiting, reason: str) -> None:
        failure = m.Failure(rank="hub", tensor=None, reason=reason)
        end = m.TaskEnd(id=request.ask.id, ok=False, verdict="failed", failures=[failure])
        self.replies.append((request.client, end))

    def _note(self, going: Going, rank: str, reason: str, now: float) -> None:
        if len(going.failures) < MAX_FAILURES:
            going.failures.append(m.Failure(rank=rank, tensor=None, reason=reason))
        going.deadline = min(going.deadline, now + GRACE_S)

    def _send(self, going: Going, message: m.Message) -> None:
        message.stamp(going.header)
        self._outbox.extend((member.peer, message) for member in going.members)


def _unfit(ask: m.AskTask, ranks: int) -> str:
    """Why the payloads do not fit so many ranks; empty if they do."""
    places = {frame.place for frame in ask.frames}
    if places and places not in ({0}, set(range(ranks))):
        return f"payloads: expected 1 for all ranks or {ranks}, one for each, got {len(places)}"
    return ""
