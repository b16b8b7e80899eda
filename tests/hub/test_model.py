"""Arbitrary messages of the schema, from members and clients, in any order, at a hub without a socket."""

from __future__ import annotations

import logging
import os
from collections import Counter

import msgspec
import pytest
import schema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from processes import free_address

from weightbus.control import client_messages as a
from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.hub.clients import MAX_CLIENT_S
from weightbus.hub.coordinator import Coordinator, Phase, Round
from weightbus.hub.membership import MAX_RANK_S
from weightbus.hub.server import Hub
from weightbus.hub.steps import Steps
from weightbus.hub.tasks import Step, Tasks

PROCESSES = 4
CLIENTS = 2
INSIDE = (m.Facts, m.Ready, m.Refuse, m.Done, m.Sums, m.Clues, m.Probed)
MEMBERS = (*INSIDE, m.Enter, m.Poll, m.Leave, m.Beat, m.Piece, m.Later, m.Await, m.Cancel)
STORE = (m.StoreSet, m.StoreGet, m.StoreAdd, m.StoreCheck, m.StoreDelete, m.StoreCount)
ASKS = (m.AskTask, m.AskReplicas, a.AskUpdate, a.AskCheck, a.AskVersion, a.AskPause, a.AskResume, a.AskStatus)
LONGEST_S = 2 * max(MAX_RANK_S, MAX_CLIENT_S)

# What answers each phase of a round and each step of a task.
ANSWERS = {
    Phase.SOURCES: m.Facts, Phase.WANTS: m.Facts, Phase.READY: m.Ready, Phase.COMPARE: m.Sums,
    Phase.RUN: m.Done, Phase.DETAIL: m.Sums, Phase.CLUES: m.Clues, Phase.NARROW: m.Probed,
    Step.PREPARE: m.Facts, Step.READY: m.Ready, Step.WRITE: m.Facts, Step.RUN: m.Done,
}  # fmt: skip

processes = st.integers(0, PROCESSES - 1)
clients = st.integers(0, CLIENTS - 1)
nobody, unnamed = st.just(""), st.just("")
hellos = st.builds(
    m.Hello,
    process=nobody,
    host=st.just("h"),
    pid=st.just(1),
    device=st.just("cpu"),
    role=st.sampled_from(("trainer", "server")),
    rank=st.integers(0, 2),
    size=st.sampled_from((1, 2, 1 << 20)),
    replica=st.integers(0, 2),
    held=st.none() | schema.of(m.Held),
)
enters = schema.of(m.Enter, job=unnamed, peer=nobody, min_replicas=st.integers(1, 2), refusal=st.just(""))
said = schema.any_of((*MEMBERS, *STORE), job=unnamed, peer=nobody)
answers = {kind: schema.of(kind, job=unnamed, peer=nobody) for kind in INSIDE}
asked = st.one_of(
    schema.of(m.AskTask, job=unnamed, frames=st.just([]), payloads=st.just([])),
    schema.any_of(ASKS[1:], job=unnamed),
)


CALL = m.Enter(
    peer="", kind="update", version=0, modules=None, verify=True, facts="f",
    settings=m.Settings(bucket_bytes=64), min_replicas=1,
    join_s=5.0, ready_s=5.0, transfer_s=5.0,
)  # fmt: skip


def phase_of(one):
    """Of a round or a task."""
    return one.phase if isinstance(one, Round) else one.step


class Hubs(RuleBasedStateMachine):
    """A hub whose messages are handed in, and whose answers are kept: what each connection was sent."""

    def __init__(self):
        super().__init__()
        self.hub = Hub(free_address())
        self.hub.sender.send = self.sent
        self.now = self.hub._started + 1000.0
        self.tokens = {}
        self.offered, self.ended, self.ends = set(), Counter(), {}
        self.stayed, self.probes = set(), {}
        self.steps = 0
        self.faults = logging.Handler(logging.ERROR)
        self.faults.emit = self.fault
        self.log = logging.getLogger("weightbus.hub")
        self.log.addHandler(self.faults)

    def fault(self, record):
        """The hub contains its own faults; none is right."""
        raise AssertionError(record.getMessage()) from record.exc_info[1]

    def sent(self, identity, frames, *, member=False):
        message = wire.decode_from_hub([bytes(frame) for frame in frames])
        if isinstance(message, m.Welcome):
            self.tokens[identity] = message.peer
        if isinstance(message, m.Probe):
            self.probes[self.tokens[identity]] = message
        if isinstance(message, m.Offer | m.TaskOffer):
            self.offered.add((identity, message.update))
            self.stayed.add((identity, message.update))
        if isinstance(message, m.Outcome) and message.update:
            self.ended[identity, message.update] += 1
            self.ends.setdefault(message.update, set()).add((message.ok, message.verdict, message.moved))
        return True

    def take(self, identity, message):
        self.hub._take(identity, "", [wire.HEADER, wire.encode(message)[1]], self.now)
        # Who has left in one of two roles may have been asked in that one.
        gone = identity if isinstance(message, m.Leave) else None
        self.stayed = {one for one in self.stayed if one[0] != gone and self.hub.jobs.of(self.tokens[one[0]])}

    @property
    def going(self):
        coordinator = self.hub.coordinator
        return [*([coordinator.round] if coordinator.round else []), *coordinator.tasks.running]

    def of(self, number, message):
        return msgspec.structs.replace(message, peer=self.tokens.get(b"process %d" % number, "nobody"))

    # -- what may happen ---------------------------------------------------------------------------

    @initialize(trainer=st.booleans(), server=st.booleans())
    def begin(self, trainer, server):
        """Mostly with a trainer and a server: most of what can go wrong needs both."""
        for number, (role, here) in enumerate((("trainer", trainer), ("server", server))):
            if here:
                hello = m.Hello(process="", host="h", pid=1, device="cpu", role=role, rank=0, size=1)
                self.join(number, hello)

    @rule(number=processes, hello=hellos)
    def join(self, number, hello):
        identity = b"process %d" % number
        if hello.held is not None and hello.held.unheard is not None:
            # What it says it has not heard was lost on the way, perhaps: it is told again, and the same.
            self.ended.pop((identity, hello.held.round), None)
        self.take(identity, msgspec.structs.replace(hello, process=f"process {number}"))
        if identity in self.tokens:
            self.take(identity, m.Beat(peer=self.tokens[identity]))

    @rule(number=processes, enter=enters)
    def enter(self, number, enter):
        self.take(b"process %d" % number, self.of(number, enter))

    @rule(number=processes, message=said)
    def say(self, number, message):
        self.take(b"process %d" % number, self.of(number, message))

    @rule(number=processes, data=st.data())
    def answer(self, number, data):
        """What is going on is answered, by whoever it is, with what is of the right kind."""
        if self.going:
            one = self.going[0]
            kind = ANSWERS.get(phase_of(one), m.Refuse)
            message = self.of(number, data.draw(answers[kind]))
            message.stamp(one.header)
            self.take(b"process %d" % number, message)

    @rule(right=st.booleans())
    def all_answer(self, right):
        """All members of what is going on answer as they should, or servers with other sums than trainers; else
        the trainer's ranks call for an update."""
        peers = self.hub.coordinator.roster.peers
        if not self.going:
            call = msgspec.structs.replace(CALL, version=self.hub.coordinator.floor + 1)
            for identity, token in list(self.tokens.items()):
                if token in peers and peers[token].trainer:
                    self.take(identity, msgspec.structs.replace(call, peer=token))
            return
        for one in self.going[:1]:
            for identity, token in list(self.tokens.items()):
                peer = peers.get(token)
                if peer and (message := self.right(one, peer, right)):
                    message.stamp(one.header)
                    self.take(identity, message)

    def right(self, one, peer, right):
        sent, live = peer.trainer is not None, peer.server is not None
        sums = (3, 4) if sent or right else (3, 5)
        nothing = {"former": None, "former_sums": (0, 0), "elsewhere": {}}
        match phase_of(one):
            case Phase.SOURCES | Phase.WANTS | Step.PREPARE | Step.WRITE:
                return m.Facts(peer=peer.id, blob=b"facts")
            case Phase.READY | Step.READY:
                return m.Ready(peer=peer.id, plan="p")
            case Phase.RUN | Step.RUN:
                fold = [m.Fold(job=0, group=0, sums=sums, nbytes=8, due=8)]
                return m.Done(peer=peer.id, sent=fold * sent, live=fold * live)
            case Phase.DETAIL:
                tensors = [m.TensorSums(job=0, group=0, sums={"b": sums})]
                return m.Sums(peer=peer.id, sent=tensors * sent, live=tensors * live)
            case Phase.CLUES:
                box = m.Span(offsets=[0, 0], sizes=[4, 8])
                clue = m.Clue(
                    sent=m.SentClue(**nothing, now=sums, why="") if sent else None,
                    live=m.LiveClue(**nothing, pieces=1, box=box, shape=[4, 8]) if live else None,
                )
                return m.Clues(peer=peer.id, clues=[clue])
            case Phase.NARROW if peer.id in self.probes:
                questions = self.probes[peer.id].questions
                return m.Probed(peer=peer.id, sums=[[sums] * len(question.boxes) for question in questions])
        return None

    @rule(number=clients, message=asked)
    def ask(self, number, message):
        if hasattr(message, "hub"):
            message = msgspec.structs.replace(message, hub=self.hub.token)
        self.take(b"client %d" % number, message)

    @rule(number=processes)
    def die(self, number):
        if member := self.hub.jobs.of(self.tokens.get(b"process %d" % number, "")):
            self.hub.members.drop(*member, "died", self.now)
        self.hub._flush(self.now)
        self.stayed = {one for one in self.stayed if self.hub.jobs.of(self.tokens[one[0]])}

    @rule(number=clients)
    def hang_up(self, number):
        self.hub.coordinator.requests.gone(b"client %d" % number)
        self.hub.coordinator.tasks.gone(b"client %d" % number, self.now)
        self.hub._flush(self.now)

    @rule(seconds=st.sampled_from((0.1, 1.5, 30.0, 4000.0)))
    def wait(self, seconds):
        """All ranks go on beating. What is past its deadline has ended."""
        self.now += seconds
        for identity, token in list(self.tokens.items()):
            self.take(identity, m.Beat(peer=token))
        self.hub._tick(self.now)
        for one in self.going:  # one that has no time at all may have begun just now
            assert one.deadline >= self.now, f"it should have ended {self.now - one.deadline} s ago"

    # -- what holds --------------------------------------------------------------------------------

    @invariant()
    def holds(self):
        self.steps += 1
        type(self).last_steps = self.steps - 1  # of the example that was run last: the smallest that fails
        assert self.hub.counts["errors"] == 0
        for one in self.going:
            assert one.deadline - self.now <= LONGEST_S + 1e-6  # a sum of floats is rounded
            assert len(one.failures) <= 1001
        assert max(self.ended.values(), default=1) == 1
        assert all(len(ends) == 1 for ends in self.ends.values())

    def teardown(self):
        """All that is going on ends by its deadline, while all ranks are there and none answers; each member
        that has stayed has heard one end of each of its rounds."""
        try:
            coordinator = self.hub.coordinator
            for _ in range(6):
                if self.going or coordinator.tasks.waiting or len(coordinator.requests):
                    self.wait(LONGEST_S + 1.0)
            assert not self.going
            assert not coordinator.tasks.waiting
            assert not len(coordinator.requests)
            self.holds()
            assert all(self.ended[one] == 1 for one in self.stayed)
        finally:
            self.log.removeHandler(self.faults)
            self.hub._close()


bounded = settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    stateful_step_count=40,
    max_examples=int(os.environ.get("WEIGHTBUS_FUZZ", "150")),
)


def test_whatever_is_said_nothing_breaks_and_all_ends():
    run_state_machine_as_test(Hubs, settings=bounded)


def _twice(self, round, verdict, now, end=Coordinator._end, **how):
    before = len(self.outbox)
    end(self, round, verdict, now, **how)
    self.outbox += self.outbox[before:]


def _raises(*_arguments):
    raise KeyError("planted")


# What is planted, and in how many steps, of which the first is ``begin``, it is found.
PLANTED = {
    "a deadline is forgotten": (Coordinator, "_fail", lambda self, round, now: None, 3),
    "an outcome is sent twice": (Coordinator, "_end", _twice, 3),
    "a probe's answers raise": (Steps, "narrow", _raises, 8),
    "a task never ends": (Tasks, "_step", lambda self, going, now: None, 8),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_in_few_steps(name, monkeypatch):
    owner, method, planted, steps = PLANTED[name]
    monkeypatch.setattr(owner, method, planted)
    found = settings(
        bounded, max_examples=5000, stateful_step_count=12, report_multiple_bugs=False, derandomize=True
    )
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(Hubs, settings=found)
    assert Hubs.last_steps <= steps


@settings(max_examples=200, deadline=None)
@given(
    schema.any_of(tuple(kind for kind in wire.ToHub.__args__ if kind is not m.AskTask))
    | schema.of(m.AskTask, frames=st.just([]), payloads=st.just([]))
)
def test_values_of_a_schema_are_of_it(message):
    assert wire.decode_to_hub(wire.encode(message)) == message
