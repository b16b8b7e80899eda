"""Arbitrary messages of the schema, from members and clients, in any order, at a hub without a socket."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import schema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import free_address

from weightbus import asks as a
from weightbus import messages as m
from weightbus import wire
from weightbus.hub import MAX_CLIENT_S, MAX_RANK_S, Hub

PROCESSES = 4
CLIENTS = 2
INSIDE = (m.Facts, m.Ready, m.Refuse, m.Done, m.Sums, m.Clues, m.Probed)
MEMBERS = (*INSIDE, m.Enter, m.Poll, m.Leave, m.Beat, m.Piece)
STORE = (m.StoreSet, m.StoreGet, m.StoreAdd, m.StoreCheck, m.StoreDelete, m.StoreCount)
ASKS = (m.AskTask, m.AskReplicas, a.AskUpdate, a.AskCheck, a.AskVersion, a.AskPause, a.AskResume, a.AskStatus)

seeds = st.integers(0, 2**32)


def a_step(rng):
    """What happens next: its name among the methods of ``Model``, and its arguments."""
    process = rng.randrange(PROCESSES)
    match rng.randrange(10):
        case 0 | 1:
            held = schema.of(m.Hello, rng, host="h").held if rng.random() < 0.5 else None
            hello = m.Hello(
                process="",
                host="h",
                pid=1,
                device="cpu",
                role=rng.choice(("trainer", "server")),
                rank=rng.randrange(3),
                size=rng.choice((1, 1, 1, 2, 1 << 20)),
                replica=rng.randrange(3),
                held=held,
            )
            return "join", process, hello
        case 2 | 3 | 4 | 5:
            return "say", process, schema.of(rng.choice((*MEMBERS, *STORE)), rng, job=""), rng.random() < 0.7
        case 6:
            return "say", process, schema.of(m.Enter, rng, job="", min_replicas=1), False
        case 7:
            return "ask", rng.randrange(CLIENTS), schema.of(rng.choice(ASKS), rng, job="")
        case 8:
            return "close", rng.randrange(PROCESSES + CLIENTS)
    return "wait", rng.choice((0.0, 0.1, 1.5, 30.0, 4000.0))


class Model:
    """A hub whose messages are handed in, and whose answers are kept: what each connection was sent."""

    def __init__(self):
        self.hub = Hub(free_address())
        self.hub._send = self.sent
        self.now = self.hub._started + 1000.0
        self.heard = []
        self.tokens = {}
        self.offered, self.ended = Counter(), Counter()

    def sent(self, identity, frames, *, member=False):
        message = wire.decode_from_hub([bytes(frame) for frame in frames])
        self.heard.append((identity, message))
        if isinstance(message, m.Welcome):
            self.tokens[identity] = message.peer
        if isinstance(message, m.Offer | m.TaskOffer):
            self.offered[identity, message.update] = 1
        if isinstance(message, m.Outcome) and message.update:
            self.ended[identity, message.update] += 1
        return True

    def take(self, identity, message):
        self.hub._take(identity, [wire.HEADER, wire.encode(message)[1]], self.now)
        self.hub._flush(self.now)

    def identity(self, number):
        return b"process %d" % number

    def join(self, number, hello):
        identity = self.identity(number)
        hello.process = f"process {number}"
        self.take(identity, hello)
        if identity in self.tokens:
            self.take(identity, m.Beat(peer=self.tokens[identity]))

    def say(self, number, message, current):
        identity = self.identity(number)
        message.peer = self.tokens.get(identity, "nobody")
        coordinator = self.hub.coordinator
        going = [coordinator.round] if coordinator.round else coordinator.tasks.running
        if current and going and isinstance(message, INSIDE):
            message.stamp(going[0].header)
        self.take(identity, message)

    def ask(self, number, message):
        if hasattr(message, "hub"):
            message.hub = self.hub.token
        self.take(b"client %d" % number, message)

    def close(self, number):
        """The connection of a process or a client is closed; the process has died."""
        if number >= PROCESSES:
            client = b"client %d" % (number - PROCESSES)
            self.hub.coordinator.requests.gone(client)
            self.hub.coordinator.tasks.gone(client, self.now)
        elif member := self.hub.jobs.of(self.tokens.get(self.identity(number), "")):
            self.hub._drop(*member, "died", self.now)
        self.hub._flush(self.now)

    def wait(self, seconds):
        """All ranks go on beating."""
        self.now += seconds
        for identity, token in list(self.tokens.items()):
            self.take(identity, m.Beat(peer=token))
        self.hub._tick(self.now)

    def run(self, step):
        what, *arguments = step
        getattr(self, what)(*arguments)
        assert self.hub.counts["errors"] == 0
        coordinator = self.hub.coordinator
        going = [coordinator.round] if coordinator.round else []
        for one in (*going, *coordinator.tasks.running):
            assert one.deadline - self.now <= 2 * MAX_RANK_S + 1e-6  # a sum of floats is rounded
            assert len(one.failures) <= 1001

    def finish(self):
        """All that is going on ends by its deadline, while all ranks are there and none answers."""
        coordinator = self.hub.coordinator
        for _ in range(6):
            tasks = coordinator.tasks
            if coordinator.round is None and not (tasks.running or tasks.waiting or len(coordinator.requests)):
                break
            self.wait(2 * max(MAX_RANK_S, MAX_CLIENT_S) + 1.0)
        assert coordinator.round is None
        assert not coordinator.tasks.running
        assert not coordinator.tasks.waiting
        assert not len(coordinator.requests)
        assert self.hub.counts["errors"] == 0
        assert max(self.ended.values(), default=1) == 1
        for (identity, update), _ in self.offered.items():
            if self.hub.jobs.of(self.tokens.get(identity, "")):
                assert self.ended[identity, update] <= 1


@pytest.fixture
def quiet(caplog):
    caplog.set_level("CRITICAL")


bounded = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


@bounded
@given(seed=seeds)
def test_whatever_is_said_nothing_breaks_and_all_ends(quiet, seed):
    rng, model = random.Random(seed), Model()
    try:
        for _ in range(40):
            model.run(a_step(rng))
        model.finish()
    finally:
        model.hub._close()


def whole(model):
    """A trainer and a server in the middle of an update."""
    for number, role in enumerate(("trainer", "server")):
        model.join(number, m.Hello(process="", host="h", pid=1, device="cpu", role=role, rank=0, size=1))
    enter = m.Enter(
        peer="", kind="update", version=1, modules=None, verify=True, facts="f", settings="s", min_replicas=1,
        join_s=5.0, ready_s=5.0, transfer_s=5.0,
    )  # fmt: skip
    model.say(0, enter, False)
    assert {identity for identity, _ in model.offered} == {model.identity(0), model.identity(1)}


@bounded
@given(phases=st.integers(0, 4), seed=seeds)
def test_a_round_that_has_begun_ends_once_for_all(quiet, phases, seed):
    """From any phase on: each member that stays has one outcome."""
    rng, model = random.Random(seed), Model()
    right = [(0, m.Facts(peer="", blob=b"s")), (1, m.Facts(peer="", blob=b"w"))]
    right += [(0, m.Ready(peer="", plan="p")), (1, m.Ready(peer="", plan="p"))]
    try:
        whole(model)
        for number, message in right[:phases]:
            model.say(number, message, True)
        stayed = {model.identity(number) for number in (0, 1)}
        for _ in range(15):
            model.run(a_step(rng))
            stayed -= {one for one in stayed if not model.hub.jobs.of(model.tokens[one])}
        model.finish()
        for identity, update in model.offered:
            if identity in stayed:
                assert model.ended[identity, update] == 1
    finally:
        model.hub._close()


@settings(max_examples=50, deadline=None)
@given(seed=seeds)
def test_values_of_a_schema_are_of_it(seed):
    rng = random.Random(seed)
    for kind in wire.ToHub.__args__:
        message = schema.of(kind, rng, **({"frames": [], "payloads": []} if kind is m.AskTask else {}))
        assert wire.decode_to_hub(wire.encode(message)) == message
