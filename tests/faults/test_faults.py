"""Ranks that die, stall or lose the hub: named, within the deadlines, and the others go on."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from processes import Job, run_jobs

import weightbus

SIZES = {"a": (512, 1024), "b": (300,), "c": (64, 64)}


def tensors(value):
    return [(name, torch.full(shape, float(value))) for name, shape in SIZES.items()]


def trainer(
    rank,
    size,
    *,
    address,
    updates,
    min_replicas=1,
    dead_after_s=2.0,
    transfer_timeout_s=20.0,
    route="broadcast",
):
    """Outcome and seconds of each update; the source holds the version's number everywhere."""
    source = tensors(0)
    seen = []
    with weightbus.Publisher(
        source,
        address=address,
        rank=rank,
        size=size,
        min_replicas=min_replicas,
        dead_after_s=dead_after_s,
        retries=0,
        join_timeout_s=15,
        transfer_timeout_s=transfer_timeout_s,
        route=route,
    ) as publisher:
        for version in range(1, updates + 1):
            for _, tensor in source:
                tensor.fill_(version)
            begun = time.monotonic()
            try:
                report = publisher.update(version)
                seen.append((report.word, report.servers, time.monotonic() - begun))
            except weightbus.WeightbusError as error:
                seen.append((type(error).__name__, str(error), time.monotonic() - begun))
            publisher._terms = replace(publisher._terms, min_replicas=1)
    return seen


def server(rank, size, *, address, replica, at=None, fault=None):
    """Serves; when version ``at`` is about to be written, ``fault`` happens to this process."""
    target = tensors(-1)

    def on_update(version):
        if version == at and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if version == at and fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if version == at and fault == "raise":
            raise RuntimeError("the engine is not in the mood")

    with weightbus.Subscriber(
        target, address=address, replica=replica, rank=rank, replica_size=size, on_update=on_update
    ) as subscriber:
        subscriber.serve()
    values = sorted({value for _, tensor in target for value in tensor.unique().tolist()})
    return subscriber.state, subscriber.version, values


def run_with(address, fault, fails):
    return run_jobs(
        Job(run=trainer, arguments={"address": address, "updates": 3, "min_replicas": 2}),
        Job(run=server, arguments={"address": address, "replica": 0}),
        Job(run=server, arguments={"address": address, "replica": 1, "at": 2, "fault": fault}, fails=fails),
    )


def test_a_killed_server_is_named_and_the_next_update_goes_on(address):
    ((_, second, third),), (survivor,), _ = run_with(address, "kill", 1)
    kind, text, seconds = second
    assert kind == "UpdateError"
    assert "replica 1 server rank 0" in text
    assert "died: its connection was closed" in text
    assert seconds < 10
    assert third[:2] == ("verified", 1)
    assert survivor == ("ready", 3, [3.0])


def test_a_callback_that_raises_refuses(address):
    ((_, second, third),), (one,), (other,) = run_with(address, "raise", 0)
    assert second[0] == "UpdateError"
    assert "replica 1 server rank 0: RuntimeError: the engine is not in the mood" in second[1]
    assert third[:2] == ("verified", 1)  # it is left out
    assert one == ("ready", 3, [3.0])
    assert other == ("ready", 1, [1.0])


def dying_trainer(rank, size, *, address):
    source = tensors(1)
    publisher = weightbus.Publisher(source, address=address, dead_after_s=2.0, join_timeout_s=15)
    publisher.update(1)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_trainer_ends_the_servers_wait(address):
    begun = time.monotonic()
    _, (served,) = run_jobs(
        Job(run=dying_trainer, arguments={"address": address}, fails=1),
        Job(run=server, arguments={"address": address, "replica": 0}),
    )
    assert served == ("ready", 1, [1.0])
    assert time.monotonic() - begun < 20


def hook_that_dies(rank, size, *, address, replica, how):
    """Dies in the middle of the transfer of version 2: the other replica's ranks are torn, then mended."""
    target = dict(tensors(-1))
    calls = []

    def load(param, loaded):
        calls.extend([] if loaded.is_meta else [1])  # it is traced first, on tensors without data
        if len(calls) == 2:
            os.kill(os.getpid(), how)
        param.data.copy_(loaded)

    parameter = torch.nn.Parameter(target["b"])
    parameter.weight_loader = load
    target["b"] = parameter
    with weightbus.Subscriber(
        list(target.items()), address=address, replica=replica, rank=rank, replica_size=size
    ) as subscriber:
        subscriber.serve()


def run_mid_transfer(address, how, route):
    return run_jobs(
        Job(run=trainer, arguments={"address": address, "updates": 3, "min_replicas": 2, "route": route}),
        Job(run=server, arguments={"address": address, "replica": 0}),
        Job(
            run=hook_that_dies,
            arguments={"address": address, "replica": 1, "how": how},
            fails=1 if how == signal.SIGKILL else 0,
            never_ends=how == signal.SIGSTOP,
        ),
    )


@pytest.mark.parametrize("route", ["broadcast", "peer", "reshard"])
def test_killed_in_the_middle_of_a_transfer(address, route):
    ((first, second, third),), (survivor,), _ = run_mid_transfer(address, signal.SIGKILL, route)
    assert first[:2] == ("verified", 2)
    assert second[0] == "TornError"
    assert "replica 1 server rank 0" in second[1]
    assert second[2] < 10
    assert third[:2] == ("verified", 1)
    assert survivor == ("ready", 3, [3.0])


@pytest.mark.parametrize("route", ["broadcast", "peer", "reshard"])
def test_stopped_in_the_middle_of_a_transfer(address, route):
    ((first, second, third),), (survivor,), _ = run_mid_transfer(address, signal.SIGSTOP, route)
    assert first[:2] == ("verified", 2)
    assert second[0] == "TornError"
    assert "replica 1 server rank 0" in second[1]
    assert second[2] < 10
    assert third[:2] == ("verified", 1)
    assert survivor == ("ready", 3, [3.0])
