"""A worker that is told to take a version is given back by each way that an update may end."""

from __future__ import annotations

import time

import pytest
import torch
from processes import Job, run_jobs
from torch import nn

import weightbus
from weightbus.engines.receiver import Receiver


def model(value: float) -> nn.Module:
    made = nn.Linear(8, 8)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(value)
    return made


def receiver(address, target, rank=0, size=1, **options):
    return Receiver(target, address=address, rank=rank, replica_size=size, **options)


def workers(rank, size, address, versions, timeout_s=60.0, break_at=None, late_s=0.0):
    """What ``receive`` and ``finish`` gave for each version, and how long it took."""
    target = model(0)
    one = receiver(address, target, rank, size)
    said = []
    for version in versions:
        if version == break_at:
            one.subscriber._destination.audit.derive = broken
        time.sleep(late_s)
        begun = time.monotonic()
        try:
            one.start()
            one.receive(version, timeout_s)
            said.append((one.finish(), target.weight[0, 0].item()))
        except weightbus.WeightbusError as error:
            said.append((type(error).__name__, str(error)))
            with pytest.raises(weightbus.UpdateError, match="finish: expected a version received"):
                one.finish()
            one.subscriber._destination.audit.__dict__.pop("derive", None)
        said[-1] += (time.monotonic() - begun, one.state)
    one.close()
    return said


def broken(*args, **kwargs):
    raise RuntimeError("planted")


def trainer(rank, size, address, versions, refuse=(), refuse_first=(), wait_s=0.0):
    """refuse: versions that rank 0 refuses in place of an update; refuse_first: only when they come first."""
    source, said = model(0), []
    refuse = set(refuse) | set(refuse_first)
    with weightbus.Publisher(source, address=address, rank=rank, size=size, retries=0) as publisher:
        for version in versions:
            with torch.no_grad():
                source.weight.fill_(version)
            if version in refuse and rank == 0:
                time.sleep(1.0)  # the worker waits already
                publisher.refuse(version, "no server is ready")
                refuse -= set(refuse_first)
                time.sleep(3.0)  # and hears of it before there is another offer
                continue
            begun = time.monotonic()
            try:
                said.append(publisher.update(version).word)
            except weightbus.WeightbusError as error:
                said.append((type(error).__name__, str(error), time.monotonic() - begun))
        time.sleep(wait_s)
    return said


def run(address, *, trainers=1, size=1, **arguments):
    theirs = {key: arguments.pop(key) for key in ("refuse", "refuse_first", "wait_s") if key in arguments}
    versions = arguments.pop("versions")
    told = arguments.pop("told", versions)
    jobs = (
        Job(run=trainer, size=trainers, arguments={"address": address, "versions": versions, **theirs}),
        Job(run=workers, size=size, arguments={"address": address, "versions": told, **arguments}),
    )
    return run_jobs(*jobs, timeout_s=60)


def test_versions_in_turn_on_two_ranks(address):
    _, said = run(address, size=2, versions=[1, 2, 5])
    assert [[row[:2] for row in rank] for rank in said] == [[(1, 1.0), (2, 2.0), (5, 5.0)]] * 2


def test_an_offer_that_waits_before_the_update_begins_is_taken(address):
    """As of a trainer that calls ``update`` by itself, and not between the worker's calls."""
    trainers, (said,) = run(address, versions=[1, 2], late_s=1.5)
    assert [row[:2] for row in said] == [(1, 1.0), (2, 2.0)]
    assert trainers == [["verified"] * 2]


def test_an_update_that_the_trainer_refuses_before_servers_hear_of_it(address):
    trainers, ((first, second, _),) = run(address, trainers=2, versions=[1, 2, 3], refuse=[2])
    assert first[:2] == (1, 1.0)
    kind, text, seconds, state = second
    assert (kind, state) == ("UpdateError", "ready")
    assert "version 2 was refused before servers heard of it" in text
    assert "no server is ready" in text
    assert seconds < 10
    assert trainers[0] == ["verified", "verified"]
    (_, (kind, text, seconds), word) = trainers[1]
    assert (kind, word) == ("UpdateError", "verified")
    assert "no server is ready" in text
    assert seconds < 10, "the other trainer rank does not wait for a deadline"


def test_the_same_version_after_a_refusal(address):
    """What was refused before the worker was told to start is none of it."""
    trainers, (said,) = run(address, versions=[1, 2, 2], told=[1, 2, 2], refuse_first=[2])
    assert [row[0] for row in said] == [1, "UpdateError", 2]
    assert trainers[0] == ["verified", "verified"]


def test_a_trainer_that_leaves(address):
    _, ((first, second),) = run(address, versions=[1], told=[1, 2])
    assert first[:2] == (1, 1.0)
    assert second[0] == "UpdateError"
    assert "the trainer has left" in second[1]
    assert second[2] < 20


def test_an_offer_that_does_not_come(address):
    _, ((_, second),) = run(address, versions=[1], told=[1, 2], timeout_s=1.0, wait_s=8.0)
    assert "expected an offer within 1 s, got none" in second[1]


def test_another_version_than_the_one_it_was_told(address):
    _, ((first,),) = run(address, versions=[4], told=[1])
    assert first[0] == "UpdateError"
    assert "expected version 1, got version 4" in first[1]


def test_a_mixture_and_the_good_update_after_it(address):
    trainers, (said,) = run(address, versions=[1, 2, 3], break_at=2)
    assert [row[0] for row in said] == [1, "TornError", 3]
    assert [row[-1] for row in said] == ["ready", "torn", "ready"]
    assert "planted" in said[1][1]
    assert trainers[0][0] == trainers[0][2] == "verified"
    assert trainers[0][1][0] == "TornError"
