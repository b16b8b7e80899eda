"""A hub that is killed in the middle of each phase: the next update succeeds, no rank is started again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import Job, run_jobs, start_python

import weightbus
from weightbus.control.start import listens
from weightbus.session.round import UNHEARD_S

SIZES = {"a": (512, 1024), "b": (300,), "c": (64, 64)}


def tensors(value):
    return [(name, torch.full(shape, float(value))) for name, shape in SIZES.items()]


def trainer(rank, size, *, address, moved=False, busy_s=0.0):
    """What came of each update; rank 0 starts another hub where one has gone.

    moved: version 2 lies elsewhere: facts must be exchanged again. busy_s: how long rank 0 trains after it.
    """
    source = tensors(0)
    seen = []
    with weightbus.Publisher(
        source, address=address, rank=rank, size=size, join_timeout_s=30, dead_after_s=2.0
    ) as publisher:
        for version in (1, 2, 3, 4):
            if moved and version == 2:
                source[0][1].data = source[0][1].clone()
            for _, tensor in source:
                tensor.fill_(version)
            try:
                report = publisher.update(version)
                seen.append((report.word, report.epoch))
            except weightbus.WeightbusError as error:
                seen.append((type(error).__name__, str(error)))
            time.sleep(busy_s if version == 2 and rank == 0 else 0.0)
        checked = publisher.check().word
    return seen, checked


def server(rank, size, *, address):
    """Serves; what the callbacks were told, and what the weights hold at the end."""
    target = tensors(-1)
    calls = []

    def committed(version):
        values = sorted({value for _, tensor in target for value in tensor.unique().tolist()})
        calls.append(("commit", version, values))

    with weightbus.Subscriber(
        target,
        address=address,
        rank=rank,
        replica_size=size,
        on_commit=committed,
        on_torn=lambda error: calls.append(("torn", str(error))),
        on_refused=lambda error: calls.append(("refused", str(error))),
    ) as subscriber:
        subscriber.serve()
    return calls


@pytest.fixture
def dying_hub(address):
    """Starts a hub that dies at a moment of version 2; waits until it listens."""
    started = []

    def start(moment):
        script = Path(__file__).parents[1] / "support" / "dying_hub.py"
        started.append(start_python(script, address, "2", moment))
        deadline = time.monotonic() + 30
        while not listens(address):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.wait(5)


def run(address, trainers=2, servers=2, **arguments):
    return run_jobs(
        Job(run=trainer, size=trainers, arguments={"address": address} | arguments),
        Job(run=server, size=servers, arguments={"address": address}),
        timeout_s=90,
    )


@pytest.mark.parametrize("moment", ["ENTER", "SOURCES", "WANTS", "READY", "RUN"])
def test_killed_in_a_phase(address, dying_hub, moment):
    hub = dying_hub(moment)
    trained, served = run(address, moved=moment in ("SOURCES", "WANTS"))
    assert hub.wait(5) == -9
    for seen, checked in trained:
        first, second, third, fourth = seen
        assert first == ("verified", 1)
        assert third[0] == fourth[0] == checked == "verified"
        assert 1 <= third[1] <= fourth[1]
        if moment == "ENTER":  # nothing had begun: it is entered again, and is done
            assert second[0] == "verified"
        else:
            assert second[0] == ("TornError" if moment == "RUN" else "UpdateError")
            assert "\n  hub: " in second[1]
    for calls in served:
        assert [call for call in calls if call[0] == "commit"][-2:] == [
            ("commit", 3, [3.0]),
            ("commit", 4, [4.0]),
        ]
        between = [call[0] for call in calls if call[0] != "commit"]
        expected = {"ENTER": [], "RUN": ["torn"]}.get(moment, ["refused"])
        assert between == expected


@pytest.mark.parametrize("moment", ["COMMIT", "LAST"])
def test_what_was_committed_is_not_lost(address, dying_hub, moment):
    """Only one rank has heard of the commit when the hub is killed; all of them learn it from the next hub."""
    dying_hub(moment)
    trained, served = run(address, trainers=1, servers=2)
    for seen, checked in trained:
        assert [word for word, _ in seen] == ["verified"] * 4
        assert checked == "verified"
    for calls in served:
        assert calls == [("commit", version, [float(version)]) for version in (1, 2, 3, 4)]


def test_what_a_busy_rank_has_heard_is_not_lost(address, dying_hub):
    """Only trainer rank 0 has heard of the commit, and trains for longer than the others wait to hear of it."""
    dying_hub("COMMIT")
    trained, served = run(address, trainers=2, servers=2, busy_s=UNHEARD_S + 3)
    for seen, checked in trained:
        assert [word for word, _ in seen] == ["verified"] * 4
        assert checked == "verified"
    for calls in served:
        assert calls == [("commit", version, [float(version)]) for version in (1, 2, 3, 4)]


def killing_trainer(rank, size, *, address, hub):
    """The hub is killed between two updates: its group, plans and versions outlive it."""
    source = tensors(1)
    with weightbus.Publisher(source, address=address, join_timeout_s=30, dead_after_s=2.0) as publisher:
        one = publisher.update(1)
        os.kill(hub, signal.SIGKILL)
        time.sleep(0.1)
        with pytest.raises(weightbus.UpdateError, match="expected one above 1, the last committed"):
            publisher.update(1)
        calls = []
        facts = publisher._origin.facts
        publisher._origin.facts = lambda *which: calls.append(1) or facts(*which)
        two = publisher.update(2)
    return one.epoch, two.epoch, two.word, len(calls)


def test_epoch_plans_and_version_outlive_the_hub(address, dying_hub):
    hub = dying_hub("NEVER")
    ((one, two, word, surveys),), _ = run_jobs(
        Job(run=killing_trainer, arguments={"address": address, "hub": hub.pid}),
        Job(run=server, size=2, arguments={"address": address}),
    )
    assert (one, two, word) == (1, 1, "verified")
    assert surveys == 1  # for the facts' id; none to make the plan again
