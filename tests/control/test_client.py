"""Requests from outside: they run where they say, are answered once, and a shell can make them."""

from __future__ import annotations

import contextlib
import io
import json
import threading
import time
import urllib.request

import pytest
import torch
from processes import Job, run_jobs

import weightbus
from weightbus.control import client_messages as a
from weightbus.control import messages as m
from weightbus.hub.requests import MAX_REQUESTS, Requests
from weightbus.tools import cli
from weightbus.tools.metrics import serve_metrics

LAST = 1000


def polling_trainer(rank, size, *, address):
    """Runs what it is asked for; version ``LAST`` ends it. A first update of its own answers nobody."""
    source = [("a", torch.zeros(300, 40)), ("b", torch.zeros(8))]
    versions = []
    with weightbus.Publisher(source, address=address, join_timeout_s=20, min_replicas=1) as publisher:
        while publisher.version != LAST:
            for _, tensor in source:
                tensor.fill_(len(versions))
            if publisher.poll():
                versions.append(publisher.version)
            time.sleep(0.01 * (rank + 1))  # ranks poll at different times, but equally often
    return versions


def spoiling_server(rank, size, *, address):
    """One element of version 2 changes after its commit. Its dtype makes the trainer cast, in buckets."""
    target = [("a", torch.zeros(300, 40).bfloat16()), ("b", torch.zeros(8).bfloat16())]

    def spoil(version):
        if version == 2 and rank == 1:
            target[0][1][3, 4] += 1

    with weightbus.Subscriber(
        target, address=address, rank=rank, replica_size=size, on_commit=spoil
    ) as subscriber:
        subscriber.serve()
    return subscriber.state, subscriber.version


def command(*arguments):
    """Exit status, standard output, standard error of ``weightbus ...``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(arguments))
    return code, out.getvalue(), err.getvalue()


def operate(address, tmp_path, seen):
    """What an operator does meanwhile, in the test's own process."""
    seen["none"] = command("status", "--address", "tcp://127.0.0.1:9", "--json")
    waits = []
    with weightbus.Client(address, on_wait=waits.append, timeout_s=30) as client:
        deadline = time.monotonic() + 40
        while True:
            with contextlib.suppress(weightbus.HubError):
                if len(client.status().peers) == 4:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        seen["early"] = client.check(wait_s=30)
        seen["update"] = client.update(wait_s=30)
        seen["status"] = client.status(past=4)
        seen["check"] = command("check", "--address", address)
        seen["paused"] = client.pause(30)
        begun = time.monotonic()
        with weightbus.Client(address) as two:
            other = threading.Timer(1.0, two.resume)
            other.start()
            seen["second"] = client.update(2, wait_s=30)
            other.join()
        seen["held_s"] = time.monotonic() - begun
        seen["bad"] = command("check", "--address", address)
        seen["bad json"] = command("check", "--address", address, "--json")
        seen["table"] = command("status", "--address", address, "--past", "3")
        seen["json"] = command("status", "--address", address, "--json")
        seen["metrics"] = command("metrics", "--address", address)
        trace, picture = tmp_path / "t.json", tmp_path / "t.png"
        seen["trace"] = command("timeline", str(trace), "--address", address), json.loads(trace.read_text())
        seen["plot"] = command("timeline", str(picture), "--address", address), picture.read_bytes()[:8]
        with serve_metrics(client.status, 0) as server:
            thread = threading.Thread(target=server.handle_request)
            thread.start()
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as page:
                seen["scraped"] = page.read().decode()
            thread.join(10)
        seen["low"] = client.update(1, wait_s=30)
        seen["labelled"] = client.set_version(LAST - 1, wait_s=30)
        seen["third"] = client.update(wait_s=30)
    seen["waits"] = waits


def test_an_operators_session(address, tmp_path):
    seen = {}
    errors = []

    def body():
        try:
            operate(address, tmp_path, seen)
        except BaseException as error:
            errors.append(error)
            raise

    thread = threading.Thread(target=body)
    thread.start()
    trained, served = run_jobs(
        Job(run=polling_trainer, size=2, arguments={"address": address}),
        Job(run=spoiling_server, size=2, arguments={"address": address}),
        timeout_s=100,
    )
    thread.join(10)
    assert not errors
    assert seen["none"][0] == 2
    assert "no hub answered" in seen["none"][2]
    assert not seen["early"].ok
    assert "expected a version committed" in seen["early"].failures[0].reason
    assert (seen["update"].ok, seen["update"].version, seen["update"].verdict) == (True, 1, "verified")
    assert set(seen["waits"]) == {"waits for the trainer's next poll() or update()"}
    status = seen["status"]
    assert [peer.rank for peer in status.peers] == [
        "trainer rank 0",
        "trainer rank 1",
        "replica 0 server rank 0",
        "replica 0 server rank 1",
    ]
    assert [past.kind for past in status.past] == ["check", "update"]
    stages = status.past[-1].ranks
    assert {"ready", "pack", "send", "digest"} <= stages[0].stages.keys() | stages[1].stages.keys()
    assert {"install", "digest"} <= stages[2].stages.keys()
    assert status.past[-1].nbytes == 2 * (300 * 40 + 8)
    assert seen["check"][0] == 0
    assert seen["check"][1].startswith("verified version 1 on 2 server ranks")
    assert seen["paused"].ok
    assert seen["second"].version == 2
    assert seen["held_s"] > 0.9
    assert seen["bad"][0] == 1
    assert "replica 0 server rank 1" in seen["bad"][1]
    assert "expected digest" in seen["bad"][1]
    answer = json.loads(seen["bad json"][1])
    assert [(f["rank"], f["tensor"]) for f in answer["failures"]] == [("replica 0 server rank 1", "a")]
    assert seen["table"][0] == 0
    assert "last check 2: mismatch" in seen["table"][1]
    states = {peer["rank"]: peer["state"] for peer in json.loads(seen["json"][1])["peers"]}
    assert states["replica 0 server rank 0"] == "ready"
    for text in (seen["metrics"][1], seen["scraped"]):
        assert "weightbus_version 2.0\n" in text
        assert 'weightbus_server_ranks{state="ready"} 2.0\n' in text
        assert 'weightbus_last_seconds{kind="check",verdict="mismatch"} ' in text
    assert seen["trace"][0][0] == 0
    events = [event for event in seen["trace"][1]["traceEvents"] if event["ph"] == "X"]
    assert {"offer", "ready", "pack", "send", "install", "digest", "commit"} <= {e["name"] for e in events}
    assert all(event["dur"] >= 0 for event in events)
    assert seen["plot"] == ((0, "", ""), b"\x89PNG\r\n\x1a\n")
    assert not seen["low"].ok
    assert "expected one above 2, the last committed" in seen["low"].failures[0].reason
    assert seen["labelled"].ok
    assert (seen["third"].ok, seen["third"].version) == (True, LAST)
    assert trained[0] == trained[1]
    assert trained[0][-2:] == [LAST - 1, LAST]
    assert served == [("ready", LAST), ("ready", LAST)]


def updating_trainer(rank, size, *, address):
    """Never polls: what is asked for is done at the end of its updates."""
    source = [("a", torch.zeros(300, 40)), ("b", torch.zeros(8))]
    with weightbus.Publisher(source, address=address, join_timeout_s=20) as publisher:
        for version in range(1, 100):
            publisher.update(version)
            time.sleep(0.1)
            if publisher.version >= LAST:
                return publisher.version
    return None


def test_without_polls_requests_run_at_the_end_of_an_update(address):
    answers = []

    def ask():
        with weightbus.Client(address, timeout_s=40) as client:
            answers.append(client.check(wait_s=30))
            answers.append(client.update(wait_s=30))
            answers.append(client.set_version(LAST, wait_s=30))

    thread = threading.Thread(target=ask)
    thread.start()
    trained, _ = run_jobs(
        Job(run=updating_trainer, size=2, arguments={"address": address}),
        Job(run=spoiling_server, arguments={"address": address}),
    )
    thread.join(10)
    assert trained == [LAST, LAST]
    assert [answer.ok for answer in answers] == [True] * 3
    assert answers[0].verdict == answers[1].verdict == "verified"
    assert answers[1].version >= answers[0].version


# -- the queue alone -------------------------------------------------------------------------------


def check(number, wait_s=10.0):
    return a.AskCheck(id=f"i{number}", hub="h", wait_s=wait_s)


def polled(requests, rank, number, size=2):
    """Answers to a poll, and to those that waited for it: (rank's connection, kind of task)."""
    requests.poll(b"%d" % rank, rank, number, size, -1)
    answers = [(client, m.number, m.task.kind if m.task else None) for client, m in requests.outbox]
    requests.outbox.clear()
    return answers


def test_all_trainer_ranks_get_the_same_answer_to_the_same_poll():
    requests = Requests()
    assert polled(requests, 0, 1) == [(b"0", 1, None)]
    requests.add(b"c", check(1), 0.0)
    assert polled(requests, 1, 1) == [(b"1", 1, None)]  # as the other rank's first poll was answered
    assert polled(requests, 1, 2) == [(b"1", 2, "check")]
    assert polled(requests, 1, 3) == []  # too far ahead: it waits
    assert polled(requests, 0, 2) == [(b"1", 3, None), (b"0", 2, "check")]
    assert polled(requests, 0, 3) == [(b"0", 3, None)]


def test_a_rank_that_goes_ends_the_others_polls():
    requests = Requests()
    assert polled(requests, 0, 7) == []
    requests.forget_polls()
    assert requests.outbox == [(b"0", m.Polled(number=7))]


def test_nothing_runs_before_all_trainer_ranks_are_there():
    requests = Requests()
    requests.add(b"c", check(1), 0.0)
    assert polled(requests, 0, 1, size=0) == [(b"0", 1, None)]
    assert polled(requests, 0, 2, size=1) == [(b"0", 2, "check")]


def test_requests_are_bounded_and_expire():
    requests = Requests()
    for number in range(MAX_REQUESTS):
        assert isinstance(requests.add(b"%d" % (number % 8), check(number, 5.0), 0.0), a.Waiting)
    refused = requests.add(b"c", check(999), 0.0)
    assert isinstance(refused, a.Answer)
    assert "at most" in refused.reason
    requests.expire(4.9)
    assert not requests.outbox
    requests.expire(5.0)
    assert len(requests.outbox) == MAX_REQUESTS
    assert all(not answer.ok and "did not poll" in answer.reason for _, answer in requests.outbox)
    assert len(requests) == 0


@pytest.mark.parametrize(
    ("asked", "version", "answered"), [(None, 7, True), (7, 7, True), (8, 7, False), (6, 7, True)]
)
def test_an_update_of_the_trainers_own_answers_a_request_for_one(asked, version, answered):
    requests = Requests()
    requests.add(b"c", a.AskUpdate(id="i", hub="h", wait_s=9.0, version=asked), 0.0)
    enter = m.Enter(
        peer="p",
        kind="update",
        version=version,
        modules=None,
        verify=True,
        facts="",
        settings=m.Settings(bucket_bytes=64),
        min_replicas=1,
        join_s=1,
        ready_s=1,
        transfer_s=1,
    )
    outcome = m.Outcome(update=1, ok=True, moved=True, verdict="verified")
    requests.settle(enter, outcome)
    assert [answer.version for _, answer in requests.outbox] == ([version] if answered else [])
