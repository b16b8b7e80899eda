"""Every exit of a round gives one closing callback, one state and one reason, on both ends.

A trainer and a server in threads of one process, at a real hub; an exception is raised at a drawn point of
either: as a message is sent or was heard, in a hook, in a callback. The next round then works.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from processes import free_port

import weightbus
from weightbus.control import link as links
from weightbus.control import messages as m
from weightbus.control.link import HubLost, Link
from weightbus.hub import round as rounds
from weightbus.hub import tasks
from weightbus.hub.server import Hub
from weightbus.session import giving_up
from weightbus.storage.reading import Reader

EXAMPLES = int(os.environ.get("WEIGHTBUS_FUZZ", "10"))

NUMEL = 1024
CLOSING = {"commit": "ready", "torn": "torn", "refused": "ready"}

# Where the exception is raised, and on which end.
SERVER_POINTS = [
    *itertools.product(["hear"], [m.Offer, m.Gathered, m.Go, m.Outcome]),
    *itertools.product(["say", "said"], [m.Facts, m.Ready, m.Done]),
    *itertools.product(["call"], ["update", "hook", "commit", "torn", "refused"]),
]
TRAINER_POINTS = [
    *itertools.product(["hear"], [m.Offer, m.Gathered, m.Go, m.Outcome]),
    *itertools.product(["say", "said"], [m.Enter, m.Facts, m.Ready, m.Done]),
]
POINTS = [("server", *p) for p in SERVER_POINTS] + [("trainer", *p) for p in TRAINER_POINTS]


class Stop(Exception):
    """Raised at the point."""


class Fault:
    """Raises ``error`` once it is armed and its point is reached, once."""

    def __init__(self):
        self.point, self.error, self.fired = None, None, False

    def arm(self, point, error):
        self.point, self.error, self.fired = point, error, False

    def reach(self, *point):
        if self.point == point and not self.fired:
            self.fired = True
            raise self.error

    def patch(self, end, link):
        send, receive = link.send, link.receive

        def sending(message):
            self.reach(end, "say", type(message))
            send(message)
            self.reach(end, "said", type(message))

        def receiving(timeout_s, **options):
            message = receive(timeout_s, **options)
            self.reach(end, "hear", type(message))
            return message

        link.send, link.receive = sending, receiving


class Pair:
    """A trainer and a server of a job of their own."""

    def __init__(self, port, job, planned):
        self.fault, self.calls, self.raised = Fault(), [], []
        self.source = torch.zeros(NUMEL)
        self.target = torch.nn.Parameter(torch.zeros(NUMEL), requires_grad=False)
        self.target.weight_loader = self._load
        self.publisher = weightbus.Publisher(
            [("a", self.source)], address=f"tcp://127.0.0.1:{port}", job=job, rank=0, size=1,
            join_timeout_s=30, ready_timeout_s=30, transfer_timeout_s=30, route="broadcast",
        )  # fmt: skip
        self.subscriber = weightbus.Subscriber(
            [("a", self.target)], address=f"tcp://localhost:{port}", job=job, rank=0, replica_size=1,
            on_update=self._callback("update"), on_commit=self._callback("commit"),
            on_torn=self._callback("torn"), on_refused=self._callback("refused"),
        )  # fmt: skip
        self._stop, self.idle = threading.Event(), 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.update(1)
        if planned:
            self.update(2)
        self.settle()
        self.last = 2 if planned else 1
        if not planned:  # facts are exchanged again
            self.target.data = self.target.data.clone()
        self.fault.patch("trainer", self.publisher._session.link)
        self.fault.patch("server", self.subscriber._session.link)
        self.settle()  # a look that had begun before is over

    def _load(self, parameter, loaded):
        if not loaded.is_meta:
            parameter.data[: NUMEL // 2] = loaded[: NUMEL // 2]
            self.fault.reach("server", "call", "hook")
        parameter.data.copy_(loaded)

    def _callback(self, name):
        def callback(what):
            self.calls.append(name)
            self.fault.reach("server", "call", name)

        return callback

    def _serve(self):
        while not self._stop.is_set():
            try:
                self.idle += not self.subscriber.poll(0.02)
            except BaseException as error:
                self.raised.append(error)

    def update(self, version):
        self.source.fill_(version)
        return self.publisher.update(version)

    def settle(self):
        """Until the server has done with the round, and there is nothing more to hear."""
        deadline, idle = time.monotonic() + 30, self.idle
        while self.idle < idle + 3:
            assert time.monotonic() < deadline, (self.subscriber.state, self.calls)
            time.sleep(0.01)

    def close(self):
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.publisher.close()
        self.subscriber.close()


@pytest.fixture(scope="module")
def port():
    port = free_port()
    hub = Hub(f"tcp://127.0.0.1:{port}")
    thread = threading.Thread(target=hub.serve)
    thread.start()
    yield port
    hub.stop()
    thread.join(10)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module in (rounds, tasks):
        monkeypatch.setattr(module, "GRACE_S", 0.1)
    monkeypatch.setattr(giving_up, "GIVE_UP_S", 3.0)


_names = itertools.count()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    point=st.sampled_from(POINTS),
    error=st.sampled_from([Stop("no"), KeyboardInterrupt(), weightbus.UpdateError("no")]),
    planned=st.booleans(),
)
@example(point=("server", "call", "hook"), error=KeyboardInterrupt(), planned=True)
@example(point=("server", "said", m.Done), error=KeyboardInterrupt(), planned=True)
@example(point=("server", "hear", m.Outcome), error=KeyboardInterrupt(), planned=False)
@example(point=("trainer", "said", m.Enter), error=KeyboardInterrupt(), planned=True)
@example(point=("trainer", "hear", m.Go), error=KeyboardInterrupt(), planned=True)
@example(point=("server", "call", "commit"), error=Stop("no"), planned=True)
@example(point=("server", "hear", m.Offer), error=KeyboardInterrupt(), planned=True)
def test_one_end_for_all(port, point, error, planned):
    pair = Pair(port, f"job{next(_names)}", planned)
    try:
        version = pair.last + 1
        pair.calls.clear()
        pair.fault.arm(point, error)
        try:
            said = pair.update(version)
        except weightbus.WeightbusError as caught:
            said = caught
        except BaseException as caught:
            said = None if caught is error else caught
        assert said is None or isinstance(said, weightbus.Report | weightbus.WeightbusError)
        pair.settle()
        # One closing callback for each on_update, and none without.
        opened, closed = pair.calls[0::2], pair.calls[1::2]
        assert opened == ["update"] * len(closed), pair.calls
        assert all(call in CLOSING for call in closed)
        # The state is what the callback said, and what the bytes say.
        for call in closed:
            assert pair.subscriber.state == CLOSING[call]
            held = pair.target.unique().tolist()
            assert call == "torn" or held == [version if call == "commit" else pair.last]
            assert pair.subscriber.version == (version if call == "commit" else pair.last)
            assert (pair.subscriber.error is None) == (call == "commit")
        # Both ends say the same, with the one reason; an end that was interrupted has said nothing.
        committed = closed == ["commit"]
        if isinstance(said, weightbus.Report):
            assert committed
        elif said is not None and said is not error:
            assert not committed
            assert isinstance(said, weightbus.TornError) or closed != ["torn"]
            if closed and pair.fault.fired:
                assert _reason(error) in str(said)
                assert _reason(error) in str(pair.subscriber.error)
        assert all(one is error for one in pair.raised)
        if point == ("server", "hear", m.Offer):
            assert committed, "the next poll takes part"
        # The session is usable, and nothing of the former round is taken for this one.
        pair.fault.arm(None, None)
        pair.calls.clear()
        report = pair.update(version + 1)
        pair.settle()
        assert report.verified
        assert pair.calls == ["update", "commit"]
        assert (pair.subscriber.state, pair.subscriber.version) == ("ready", version + 1)
        assert pair.target.unique().tolist() == [version + 1]
    finally:
        pair.close()


def _reason(error):
    return str(error) or f"interrupted by {type(error).__name__}"


TASK_POINTS = [
    ("server", what, kind)
    for what, kinds in {
        "hear": [m.TaskOffer, m.Gathered, m.Go, m.Outcome],
        "say": [m.Facts, m.Ready, m.Done],
        "said": [m.Facts, m.Ready, m.Done],
        "call": ["update", "write", "commit", "torn", "refused"],
    }.items()
    for kind in kinds
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the tensor that the server holds, filled with 9."""
    path = tmp_path_factory.mktemp("saved")
    data = torch.full((NUMEL,), 9.0).numpy().tobytes()
    header = json.dumps({"a": {"dtype": "F32", "shape": [NUMEL], "data_offsets": [0, len(data)]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    point=st.sampled_from(TASK_POINTS),
    error=st.sampled_from([Stop("no"), KeyboardInterrupt(), weightbus.UpdateError("no")]),
)
@example(point=("server", "call", "write"), error=KeyboardInterrupt())
@example(point=("server", "said", m.Facts), error=KeyboardInterrupt())
@example(point=("server", "hear", m.TaskOffer), error=KeyboardInterrupt())
@example(point=("server", "hear", m.Outcome), error=KeyboardInterrupt())
def test_one_end_of_a_load_for_all(port, saved, point, error):
    """As of an update; here the other end is the client that has asked for it."""
    job = f"job{next(_names)}"
    pair = Pair(port, job, True)
    write = Reader.write

    def writing(reader, *given, **options):
        write(reader, *given, **options)
        pair.fault.reach("server", "call", "write")

    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            weightbus.Client(f"tcp://127.0.0.1:{port}", job=job) as client,
        ):
            patch.setattr(Reader, "write", writing)
            pair.calls.clear()
            pair.fault.arm(point, error)
            end = client.update_from_disk(saved, version=5, timeout_s=30)
            pair.settle()
            opened, closed = pair.calls[0::2], pair.calls[1::2]
            assert opened == ["update"] * len(closed), pair.calls
            assert end.ok == (closed == ["commit"])
            held = pair.target.unique().tolist()
            assert held == [9.0 if end.ok or closed == ["torn"] else pair.last]
            assert pair.subscriber.state == (CLOSING[closed[0]] if closed else "ready")
            if point[1:] == ("hear", m.TaskOffer):
                assert end.ok, "the next poll takes part"
            if not end.ok:
                assert _reason(error) in str(end.failures[0])
                assert _reason(error) in str(pair.subscriber.error)
            assert all(one is error for one in pair.raised)
            pair.fault.arm(None, None)
            pair.calls.clear()
            assert client.update_from_disk(saved, version=6, timeout_s=30).ok
            pair.settle()
            assert pair.calls == ["update", "commit"]
            assert (pair.subscriber.state, pair.subscriber.version) == ("ready", 6)
    finally:
        pair.close()


# -- what comes at another time, and heartbeats ----------------------------------------------------


def test_a_poll_answers_a_task_instead_of_losing_it(port, tmp_path):
    """A save that a client asks for, of a trainer that has not called for one: refused at once."""
    job = f"job{next(_names)}"
    with (
        weightbus.Publisher(
            [("a", torch.zeros(3))], address=f"tcp://127.0.0.1:{port}", job=job, rank=0, size=1
        ) as publisher,
        weightbus.Client(f"tcp://127.0.0.1:{port}", job=job) as client,
    ):
        task = m.SaveTask(path=str(tmp_path / "saved"), modules=None, version=1, file_bytes=1 << 20)
        asked = client.send(task, wait_s=30, run_s=30)
        time.sleep(0.5)  # the offer is there before the answer to the poll
        begun = time.monotonic()
        while (end := client.end(asked, 0.0)) is None:
            assert not publisher.poll()
            assert time.monotonic() < begun + 10
        assert "expected this rank to call save() too" in end.failures[0].reason


@pytest.mark.parametrize("error", [Stop("no"), KeyboardInterrupt()])
def test_an_offer_outlives_an_agreement_that_raises(port, error):
    agreed = []

    def agree(waiting):
        agreed.append(waiting)
        if agreed.count(True) == 1 and waiting:
            raise error
        return waiting

    job = f"job{next(_names)}"
    target = torch.zeros(3)
    reports = []
    with (
        weightbus.Publisher(
            [("a", torch.ones(3))],
            address=f"tcp://127.0.0.1:{port}",
            job=job,
            rank=0,
            size=1,
            join_timeout_s=10,
        ) as publisher,
        weightbus.Subscriber(
            [("a", target)], address=f"tcp://localhost:{port}", job=job, rank=0, replica_size=1, agree=agree
        ) as subscriber,
    ):
        thread = threading.Thread(target=lambda: reports.append(publisher.update(1)))
        thread.start()
        raised = None
        while raised is None:
            try:
                subscriber.poll(0.1)
            except (Stop, KeyboardInterrupt) as caught:
                raised = caught
        assert raised is error
        assert subscriber.poll(0.1)
        thread.join(10)
        assert reports[0].verified
        assert (subscriber.state, target.tolist()) == ("ready", [1.0] * 3)


def test_a_heartbeat_that_fails_is_tried_again(port):
    """Whatever it raises: the rank stays a member, and its thread lives."""
    failing = iter([ValueError("no"), OSError("no"), MemoryError("no")])
    calls = []

    def state():
        calls.append(True)
        if len(calls) > 2 and (error := next(failing, None)) is not None:
            raise error
        return "ready", 1

    link = Link(f"tcp://127.0.0.1:{port}", job=f"job{next(_names)}", state=state)
    link.join(role="server", rank=0, size=1, replica=0, device="cpu", timeout_s=10)
    deadline = time.monotonic() + 10
    while len(calls) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert link._beats.is_alive()
    assert link.receive(0.0) is None
    link.leave("server")
    link.close()


def test_heartbeats_that_always_fail_are_said(port, monkeypatch):
    monkeypatch.setattr(links, "DEAD_AFTER_S", 1.0)
    broken = threading.Event()

    def state():
        if broken.is_set():
            raise ValueError("the engine has no state")
        return "ready", 1

    link = Link(f"tcp://127.0.0.1:{port}", job=f"job{next(_names)}", state=state)
    link.join(role="server", rank=0, size=1, replica=0, device="cpu", timeout_s=10)
    broken.set()
    with pytest.raises(HubLost, match="a heartbeat has failed, ValueError: the engine has no state"):
        link.receive(10.0)
    broken.clear()
    assert link.rejoin(10)
    assert link.receive(0.0) is None
    link.leave("server")
    link.close()


@pytest.mark.parametrize("where", ["update", "hook", "commit", "refused"])
@pytest.mark.parametrize("error", [Stop("no"), KeyboardInterrupt()])
def test_one_end_where_both_ends_are_one_process(where, error):
    fault, calls = Fault(), []
    source, target = torch.zeros(NUMEL), torch.nn.Parameter(torch.zeros(NUMEL), requires_grad=False)

    def load(parameter, loaded):
        if not loaded.is_meta:
            fault.reach("server", "call", "hook")
        parameter.data.copy_(loaded)

    def callback(name):
        def called(what):
            calls.append(name)
            fault.reach("server", "call", name)

        return called

    target.weight_loader = load
    names = ("update", "commit", "torn", "refused")
    with weightbus.colocate(
        [("a", source)], [("a", target)], rank=0, size=1, **{f"on_{name}": callback(name) for name in names}
    ) as pair:
        pair.update(1)
        if where == "refused":  # an update that is refused, and whose callback raises
            target.data = torch.zeros(NUMEL + 1)
        calls.clear()
        fault.arm(("server", "call", where), error)
        source.fill_(2)
        with pytest.raises((weightbus.WeightbusError, Stop, KeyboardInterrupt)):
            pair.update(2)
        assert (calls[0], len(calls)) == ("update", 2)
        assert pair.state == CLOSING[calls[1]]
        fault.arm(None, None)
        target.data = torch.zeros(NUMEL)
        source.fill_(3)
        assert pair.update(3).verified
        assert (pair.state, pair.version, target.unique().tolist()) == ("ready", 3, [3.0])
