"""``Subscriber.wait``, ``Publisher.cancel``, and a ``poll`` that does not wait for ranks that are not there."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from processes import Job, run_jobs

import weightbus

SIZES = {"a": (512, 256), "b": (300,)}
READY_S = 20.0


def fed(value=0.0):
    return {name: torch.full(shape, value) for name, shape in SIZES.items()}


def publisher(source, address, **options):
    return weightbus.Publisher(
        list(source.items()),
        address=address,
        join_timeout_s=60,
        ready_timeout_s=READY_S,
        dead_after_s=3.0,
        **options,
    )


def timed(call, *arguments, **options):
    """(what came of it, seconds)"""
    begun = time.monotonic()
    try:
        found = call(*arguments, **options)
    except weightbus.WeightbusError as error:
        found = f"{type(error).__name__}: {error}"
    return found, time.monotonic() - begun


def meet(folder, name, size, rank):
    """A barrier: all of ``size`` processes, by files beside each other."""
    open(f"{folder}/{name}-{rank}", "w").close()
    until = time.monotonic() + 30
    while sum(one.startswith(f"{name}-") for one in os.listdir(folder)) < size:
        assert time.monotonic() < until
        time.sleep(0.005)
    return time.monotonic()


def waiting_server(rank, size, *, address, folder, calls, late=()):
    """One ``wait`` for each (version, timeout_s) of ``calls``; rank 1 is a second late in those of ``late``."""
    target, seen = fed(), []
    with weightbus.Subscriber(
        list(target.items()), address=address, rank=rank, replica_size=size
    ) as subscriber:
        for step, (version, timeout_s) in enumerate(calls):
            meet(folder, f"step{step}", size + 2, f"server{rank}")
            time.sleep(1.0 if step in late and rank else 0.0)
            found, seconds = timed(subscriber.wait, version, timeout_s)
            seen.append(
                (found, seconds, subscriber.state, {v for t in target.values() for v in t.unique().tolist()})
            )
            meet(folder, f"end{step}", size + 2, f"server{rank}")
    return seen


def steering_trainer(rank, size, *, address, folder, steps):
    source, seen = fed(), []
    with publisher(source, address) as trainer:
        for step, name in enumerate(steps):
            meet(folder, f"step{step}", size + 2, f"trainer{rank}")
            time.sleep(0.3)
            seen.append(timed(globals()[name], trainer, source, rank))
            meet(folder, f"end{step}", size + 2, f"trainer{rank}")
    return seen


def update_1(trainer, source, rank):
    for tensor in source.values():
        tensor.fill_(1.0)
    return trainer.update(1).word


def nothing(trainer, source, rank):
    return None


def differ(trainer, source, rank):
    """Refused, as the ranks call with other arguments."""
    return trainer.update(2, verify=rank == 0).word


def cancelled(trainer, source, rank):
    """Rank 0 waits for rank 1, which has had a bad step."""
    if rank == 0:
        return trainer.update(2).word
    time.sleep(0.5)
    return trainer.cancel("a bad step")


def cancelled_by_thread(trainer, source, rank):
    """As all ranks wait for a replica that never comes."""
    trainer._terms = replace(trainer._terms, min_replicas=2)
    if rank == 0:
        timer = threading.Timer(0.5, trainer.cancel, ("no more patience",))
        timer.start()
    try:
        return trainer.update(2).word
    finally:
        trainer._terms = replace(trainer._terms, min_replicas=1)


def update_3(trainer, source, rank):
    for tensor in source.values():
        tensor.fill_(3.0)
    return trainer.update(3).word


def test_one_end_for_all_ranks_and_at_once(address, tmp_path):
    steps = [
        ("update_1", (1, 30.0), 1),
        ("nothing", (1, 30.0), 1),
        ("differ", (2, 30.0), "as on the first rank that called"),
        ("cancelled", (2, 30.0), "cancelled: a bad step"),
        ("cancelled_by_thread", (2, 30.0), "cancelled: no more patience"),
        ("nothing", (2, 1.0), "no update to version 2 or later in"),
        ("update_3", (2, 30.0), 3),
    ]
    trained, served = run_jobs(
        Job(
            run=steering_trainer,
            size=2,
            arguments={"address": address, "folder": tmp_path, "steps": [name for name, *_ in steps]},
        ),
        Job(
            run=waiting_server,
            size=2,
            arguments={
                "address": address,
                "folder": tmp_path,
                "calls": [call for _, call, _ in steps],
                "late": (2, 3),
            },
        ),
        timeout_s=60,
    )
    for step, (name, (_, timeout_s), expected) in enumerate(steps):
        ends = [seen[step] for seen in served]
        for found, seconds, state, values in ends:
            assert found == expected or (isinstance(expected, str) and expected in found), (name, found)
            assert seconds < timeout_s + 2.0
            assert state == "ready"
            assert values == {3.0 if name == "update_3" else 1.0}
        assert len({str(found) for found, *_ in ends}) == 1, "one end for all ranks"
        assert max(seconds for _, seconds, *_ in ends) < 5.0, name
    for rank, seen in enumerate(trained):
        found = [what for what, _ in seen]
        assert found[0] == found[6] == "verified"
        assert "UpdateError" in found[2]
        assert found[3] is True if rank else "cancelled: a bad step" in found[3]
        assert "cancelled: no more patience" in found[4]
        assert all(seconds < 5.0 for _, seconds in seen)


def dying_trainer(rank, size, *, address, folder, phase):
    source = fed(1.0)
    trainer = publisher(source, address)
    assert trainer.update(1).verified
    meet(folder, "one", size + 2, f"trainer{rank}")
    time.sleep(0.5)
    if rank == 1:
        if phase == "enter":
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    return timed(trainer.update, 2) if phase == "enter" else (time.sleep(3.0), trainer.close())


def server_of_dying(rank, size, *, address, folder):
    with weightbus.Subscriber(list(fed().items()), address=address, rank=rank, replica_size=size) as subscriber:
        assert subscriber.wait(1, 30.0) == 1
        meet(folder, "one", size + 2, f"server{rank}")
        return timed(subscriber.wait, 2, 60.0), subscriber.state, timed(subscriber.wait, 2, 60.0)


@pytest.mark.parametrize("phase", ["between", "enter"])
def test_a_trainer_that_dies_ends_it(address, tmp_path, phase):
    """Be it that an update waits, or that none has begun."""
    _, served = run_jobs(
        Job(
            run=dying_trainer,
            size=2,
            arguments={"address": address, "folder": tmp_path, "phase": phase},
            fails=1,
        ),
        Job(run=server_of_dying, size=2, arguments={"address": address, "folder": tmp_path}),
        timeout_s=60,
    )
    for (found, seconds), state, (again, _) in served:
        assert "UpdateError" in found
        assert "trainer rank 1" in found
        assert seconds < 8.0
        assert state == "ready"
        assert "UpdateError" in again, "nobody is left who could make one"
    assert served[0][0][0] == served[1][0][0]


def polling_server(rank, size, *, address, folder, polls, away_s):
    """Rank 1 is away for a while; rank 0 polls. What each poll took, and what came of it."""
    target, called = fed(), []
    with weightbus.Subscriber(
        list(target.items()),
        address=address,
        rank=rank,
        replica_size=size,
        on_update=lambda version: called.append("update"),
        on_commit=lambda version: called.append("commit"),
        on_refused=lambda error: called.append("refused"),
    ) as subscriber:
        subscriber.poll(0.3)
        meet(folder, "polled", size + 1, f"server{rank}")
        time.sleep(away_s if rank else 0.0)
        seen = []
        until = time.monotonic() + 20.0
        while subscriber.version != 1 and time.monotonic() < until:
            seen.append((*timed(subscriber.poll, polls), subscriber.version))
        return seen, called, {v for t in target.values() for v in t.unique().tolist()}


def one_update(rank, size, *, address, folder, after):
    with publisher(fed(1.0), address) as trainer:
        meet(folder, "polled", 3, "trainer")
        time.sleep(after)
        report = timed(trainer.update, 1)
        return str(report[0]), report[1]


@pytest.mark.parametrize("polls", [0.0, 0.3])
def test_a_poll_does_not_wait_for_ranks_that_are_not_there(address, tmp_path, polls):
    """One rank hears the offer, the other one is elsewhere for 3 s: the engine's other work goes on meanwhile,
    and the update is committed in the same call as soon as both are there."""
    ((report, seconds),), (here, away) = run_jobs(
        Job(run=one_update, arguments={"address": address, "folder": tmp_path, "after": 0.2}),
        Job(
            run=polling_server,
            size=2,
            arguments={"address": address, "folder": tmp_path, "polls": polls, "away_s": 3.0},
        ),
        timeout_s=60,
    )
    assert report.startswith("verified version 1")
    assert seconds < 8.0
    for seen, called, values in (here, away):
        assert values == {1.0}
        assert called[-2:] == ["update", "commit"]
        assert set(called[:-2:2]) <= {"update"}, "each is paused and resumed by turns"
        assert set(called[1:-2:2]) <= {"refused"}
        assert [took for took, _, _ in seen] == [False] * (len(seen) - 1) + [True]
    seen, called, _ = here
    assert "refused" in called, "it was put off"
    assert max(spent for took, spent, version in seen if version is None) < 0.3 + 2.0


def test_ranks_that_never_meet_are_named(address, tmp_path):
    """Rank 1 polls no more, though it lives: after ready_timeout_s the update ends with its name."""
    ((report, seconds),), _ = run_jobs(
        Job(run=one_update_of_3_s, arguments={"address": address, "folder": tmp_path, "after": 0.2}),
        Job(
            run=polling_server,
            size=2,
            arguments={"address": address, "folder": tmp_path, "polls": 0.3, "away_s": 30.0},
            fails=0,
        ),
        timeout_s=90,
    )
    assert "UpdateError" in report
    assert "replica 0 server rank 1: no answer in phase" in report
    assert 2.0 < seconds < 8.0


def one_update_of_3_s(rank, size, *, address, folder, after):
    with publisher(fed(1.0), address) as trainer:
        trainer._terms = replace(trainer._terms, join_s=60.0, ready_s=3.0, transfer_s=60.0)
        meet(folder, "polled", 3, "trainer")
        time.sleep(after)
        found, seconds = timed(trainer.update, 1)
        return str(found), seconds


def both_ends(rank, size, *, address):
    source = fed(1.0)
    with publisher(source, address), weightbus.Subscriber(list(fed().items()), address=address) as subscriber:
        return timed(subscriber.wait, 1, 5.0)


def test_a_process_that_is_a_trainer_too_can_not_wait(address):
    (((found, seconds),),) = run_jobs(Job(run=both_ends, arguments={"address": address}))
    assert found.startswith("SpecError: wait: expected a process of the servers alone")
    assert seconds < 1.0
