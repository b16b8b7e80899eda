"""One bad replica costs the others nothing but time: it is left out by name, and comes back when it is well."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from processes import Job, run_jobs

import weightbus
from weightbus.hub import isolation
from weightbus.hub.isolation import Isolation

SIZES = {"a": (512, 1024), "b": (300,), "c": (64, 64)}
READY_S = 3.0


def trainer(rank, size, *, address, updates, route="broadcast", pause_s=0.0, **options):
    """(word or error, replicas, left out, seconds) of each update."""
    source = [(name, torch.zeros(shape)) for name, shape in SIZES.items()]
    seen = []
    options = {"ready_timeout_s": READY_S, "transfer_timeout_s": 6, "dead_after_s": 2.0, **options}
    with weightbus.Publisher(source, address=address, join_timeout_s=60, route=route, **options) as publisher:
        terms = publisher._terms
        publisher._terms = replace(terms, min_replicas=2)  # both are there at first
        for version in range(1, updates + 1):
            for _, tensor in source:
                tensor.fill_(version)
            begun = time.monotonic()
            try:
                report = publisher.update(version)
                found = (report.word, report.replicas, dict(report.left_out))
            except weightbus.WeightbusError as error:
                found = (type(error).__name__, (), {0: str(error)})
            seen.append((*found, time.monotonic() - begun))
            publisher._terms = terms
            time.sleep(pause_s)
    return seen


def server(rank, size, *, address, replica, fault="", at=2, until=10**9):
    """Serves; from version ``at`` to ``until`` something is wrong with it. (state, version, values)"""
    target = {name: torch.zeros(shape) for name, shape in SIZES.items()}
    hung = []

    def wrong(version):
        return at <= version < until

    def on_update(version):
        if fault == "raise" and wrong(version):
            raise RuntimeError("the engine is not in the mood")
        if fault == "kill" and version == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def load(param, loaded):
        if fault == "hook" and not loaded.is_meta and wrong(loaded.flatten()[0].item()):
            raise RuntimeError("a bad hook")
        param.data.copy_(loaded)

    target["b"] = torch.nn.Parameter(target["b"], requires_grad=False)
    target["b"].weight_loader = load
    with weightbus.Subscriber(
        list(target.items()),
        address=address,
        replica=replica,
        rank=rank,
        replica_size=size,
        on_update=on_update,
    ) as subscriber:
        while not subscriber.left:
            subscriber.poll(0.05)
            if fault == "hang" and subscriber.version == at - 1 and not hung:
                hung.append(time.sleep(until))
    return subscriber.state, subscriber.version, {v for t in target.values() for v in t.unique().tolist()}


def run_with(address, fault, updates, bad=None, size=1, **options):
    fails = {"fails": size} if fault == "kill" else {}
    wrong = {"address": address, "replica": 1, "fault": fault, **(bad or {})}
    return run_jobs(
        Job(run=trainer, size=2, arguments={"address": address, "updates": updates, **options}),
        Job(run=server, arguments={"address": address, "replica": 0}),
        Job(run=server, size=size, arguments=wrong, **fails),
        timeout_s=100,
    )


@pytest.mark.parametrize("route", ["broadcast", "peer", "reshard"])
@pytest.mark.parametrize("fault", ["raise", "hook", "kill"])
def test_the_others_get_the_update_in_the_same_call(address, fault, route):
    trained, (good,), _ = run_with(address, fault, 4, route=route)
    for seen in trained:
        assert [(word, replicas) for word, replicas, _, _ in seen] == [("verified", (0, 1))] + [
            ("verified", (0,))
        ] * 3
        assert all(seconds < 15 for *_, seconds in seen)
        for _, _, left_out, _ in seen[1:]:
            reason = {"raise": "not in the mood", "hook": "a bad hook"}.get(fault)
            assert left_out.keys() == ({1} if reason else set())  # one that has died is no replica any more
            assert reason is None or reason in left_out[1]
    assert good == ("ready", 4, {4.0})


def test_an_engine_that_hangs_is_left_out(address):
    """Its heartbeats go on; it is waited for once."""
    trained, (good,), (bad,) = run_with(address, "hang", 5, bad={"until": READY_S + 6.0})
    for seen in trained:
        assert [word for word, *_ in seen] == ["verified"] * 5
        assert [replicas for _, replicas, *_ in seen] == [(0, 1)] + [(0,)] * 4
        assert READY_S - 1 < seen[1][3] < READY_S + 5
        assert all(seconds < 2.0 for *_, seconds in seen[2:])
        assert "no answer in phase" in seen[2][2][1]
    assert good == ("ready", 5, {5.0})
    assert bad[:2] == ("ready", 1)  # it holds its old version, and says so


def test_one_that_is_well_again_comes_back(address):
    """After a pause of 5 s, at the first update from then on."""
    trained, (good,), (bad,) = run_with(address, "raise", 8, bad={"at": 2, "until": 3}, pause_s=1.0)
    for seen in trained:
        assert [word for word, *_ in seen] == ["verified"] * 8
        assert seen[1][1] == seen[2][1] == (0,)
        assert seen[-1][1] == (0, 1)
    assert good == bad == ("ready", 8, {8.0})


def test_all_replicas_or_none(address):
    trained, (good,), (bad,) = run_with(address, "raise", 3, bad={"at": 2, "until": 3}, min_replicas="all")
    for seen in trained:
        assert [word for word, *_ in seen] == ["verified", "UpdateError", "verified"]
        assert "not in the mood" in seen[1][2][0]
        assert seen[2][1] == (0, 1)
    assert good == bad == ("ready", 3, {3.0})


def test_too_few_would_be_left(address):
    trained, _, _ = run_with(address, "raise", 2, min_replicas=2)
    for seen in trained:
        assert [word for word, *_ in seen] == ["verified", "UpdateError"]


def test_without_retries_the_next_call_does_without_it(address):
    trained, (good,), _ = run_with(address, "raise", 3, retries=0)
    for seen in trained:
        assert [word for word, *_ in seen] == ["verified", "UpdateError", "verified"]
        assert seen[2][1] == (0,)
    assert good == ("ready", 3, {3.0})


# -- without processes -----------------------------------------------------------------------------


class Peers:
    """As much of a roster as isolation looks at."""

    def __init__(self, replicas):
        self.here = {r: {0: type("Peer", (), {"id": f"p{r}", "looks": 0})()} for r in replicas}

    def replicas(self):
        return self.here

    def complete(self):
        return sorted(self.here)

    def look(self, replica):
        self.here[replica][0].looks += 1


def test_pauses_grow_and_end_with_a_commit():
    roster = Peers([0, 1, 2])
    out = Isolation(roster)
    now, pauses = 0.0, []
    for _ in range(9):
        out.blame(1, "why", now)
        begun = now
        while out.left_out(1, now):
            roster.look(1)
            now += 0.5
        pauses.append(now - begun)
    assert pauses[:4] == [5.0, 10.0, 20.0, 40.0]
    assert pauses[-1] == isolation.LONGEST_PAUSE_S
    out.forgive([1])
    out.blame(1, "why", now)
    assert out.left_out(1, now + 4.9) == {1: "why"}
    roster.look(1)
    assert out.left_out(1, now + 5.0) == {}


def test_one_whose_main_thread_is_stuck_stays_out():
    roster = Peers([0, 1])
    out = Isolation(roster)
    out.blame(1, "no answer", 0.0)
    assert out.left_out(1, 1e6) == {1: "no answer"}
    roster.look(1)
    assert out.left_out(1, 1e6) == {}


def test_nobody_is_left_out_where_too_few_would_be_left():
    roster = Peers([0, 1])
    out = Isolation(roster)
    for replica in (0, 1):
        out.blame(replica, "why", 0.0)
    assert out.left_out(1, 1.0) == {}
    out.forgive([0])
    assert out.left_out(1, 1.0) == {1: "why"}
    assert out.left_out(2, 1.0) == {}
