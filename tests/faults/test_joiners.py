"""A replica that joins late, or was left out, gets the committed version from another, without an update."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import fill, full, make, values
from processes import Job, run_jobs

import weightbus


def at(folder, name):
    """Wait until a file is there that another process makes."""
    until = time.monotonic() + 40
    while not Path(folder, name).exists():
        assert time.monotonic() < until, name
        time.sleep(0.01)


def trainer(rank, size, *, address, folder, kind="fsdp2", route="auto", checks=True, **options):
    """One update; then nothing, while replica 1 joins; then a check, and another update."""
    model = make(kind, rank, size, "cpu", torch.float32)
    fill(model, values(1, torch.float32))
    options = {"ready_timeout_s": 10, "dead_after_s": 3.0, "route": route, **options}
    with weightbus.Publisher(
        model, address=address, rank=rank, size=size, bucket_bytes=1 << 18, join_timeout_s=30, **options
    ) as publisher:
        found = [publisher.update(1).word]
        Path(folder, "committed").touch()
        at(folder, "caught up")
        if checks:
            verdict = publisher.check()
            found.append((verdict.word, verdict.servers))
        Path(folder, "checked").touch()
        fill(model, values(2, torch.float32))
        report = publisher.update(2)
        found.append((report.word, report.replicas))
        verdict = publisher.check()
        found.append((verdict.word, verdict.servers))
        Path(folder, "done").touch()
    return found


def bits_of(model, version):
    held = full(model)
    expected = values(version, torch.float32)
    same = [torch.equal(held[name].reshape(-1), tensor.reshape(-1)) for name, tensor in expected.items()]
    return all(same)


def server(rank, size, *, address, folder, replica=0, kind="tp", spoil=False):
    """Replica 1 comes once version 1 is committed. (version, state, all bits right) when it is there.

    spoil: this replica's weights change behind its back once it has version 1.
    """
    model = make(kind, rank, size, "cpu", torch.float32)
    if replica:
        at(folder, "committed")
    called, seen = [], []
    with weightbus.Subscriber(
        model,
        address=address,
        replica=replica,
        rank=rank,
        replica_size=size,
        on_update=lambda version: called.append(("update", version)),
        on_commit=lambda version: called.append(("commit", version)),
    ) as subscriber:
        begun = time.monotonic()
        until = begun + 40
        while subscriber.version != 2 and time.monotonic() < until:
            before = subscriber.version
            subscriber.poll(1.0)
            if subscriber.version != before:
                seconds = time.monotonic() - begun
                seen.append((subscriber.version, subscriber.state, bits_of(model, subscriber.version), seconds))
                if spoil and subscriber.version == 1:
                    with torch.no_grad():
                        next(model.parameters()).view(-1)[5] += 1
                if replica and subscriber.version == 1:
                    Path(folder, f"has {rank}").touch()
                    if len(list(Path(folder).glob("has *"))) == size:
                        Path(folder, "caught up").touch()
            if replica and subscriber.state == "torn":
                seen.append((None, "torn", False, str(subscriber.error)))
                Path(folder, "caught up").touch()
                at(folder, "checked")
        while not Path(folder, "done").exists() and time.monotonic() < until:
            subscriber.poll(1.0)
    return seen, called


@pytest.mark.parametrize("route", ["broadcast", "peer", "reshard"])
@pytest.mark.parametrize(("kind", "size"), [("plain", 1), ("tp", 2)])
def test_a_replica_that_joins_is_current_without_an_update(address, tmp_path, route, kind, size):
    arguments = {"address": address, "folder": str(tmp_path), "kind": kind}
    trained, first, second = run_jobs(
        Job(
            run=trainer,
            size=2,
            arguments={**arguments, "kind": "fsdp2" if size == 2 else "plain", "route": route},
        ),
        Job(run=server, size=size, arguments={**arguments, "replica": 0}),
        Job(run=server, size=size, arguments={**arguments, "replica": 1}),
        timeout_s=90,
    )
    for found in trained:
        assert found == ["verified", ("verified", 2 * size), ("verified", (0, 1)), ("verified", 2 * size)]
    for seen, called in first:
        assert [(version, state, right) for version, state, right, _ in seen] == [
            (1, "ready", True),
            (2, "ready", True),
        ]
        assert called == [("update", 1), ("commit", 1), ("update", 2), ("commit", 2)], (
            "the donor's engine goes on"
        )
    for seen, called in second:
        assert [(version, state, right) for version, state, right, _ in seen] == [
            (1, "ready", True),
            (2, "ready", True),
        ]
        assert seen[0][3] < 10.0
        assert called == [("update", 1), ("commit", 1), ("update", 2), ("commit", 2)]


def test_a_donor_that_is_wrong_makes_nobody_ready(address, tmp_path):
    """Its weights have changed since the commit: the joiner is torn and says so, until the next update."""
    arguments = {"address": address, "folder": str(tmp_path), "kind": "plain"}
    trained, first, second = run_jobs(
        Job(run=trainer, arguments={**arguments, "checks": False}),
        Job(run=server, arguments={**arguments, "spoil": True}),
        Job(run=server, arguments={**arguments, "replica": 1}),
        timeout_s=90,
    )
    assert trained == [["verified", ("verified", (0, 1)), ("verified", 2)]]
    ((seen, called),) = second
    assert [one[:3] for one in seen] == [(None, "torn", False), (2, "ready", True)]
    assert "expected digest" in seen[0][3]
    assert called == [("update", 1), ("update", 2), ("commit", 2)]
    ((seen, _),) = first
    assert [one[:3] for one in seen] == [(1, "ready", True), (2, "ready", True)]


def moody_server(rank, size, *, address, folder, replica, at_version):
    """Its hook raises at one version, once. (version, state, value) when something has changed."""
    target = [("a", torch.zeros(300, 20)), ("b", torch.zeros(8))]
    raised, seen = [], []

    def on_update(version):
        if replica and version == at_version and not raised:
            raised.append(version)
            raise RuntimeError("not in the mood")

    with weightbus.Subscriber(target, address=address, replica=replica, on_update=on_update) as subscriber:
        until = time.monotonic() + 60
        while not subscriber.left and time.monotonic() < until:
            before = subscriber.version
            subscriber.poll(1.0)
            if subscriber.version != before:
                values = {v for _, tensor in target for v in tensor.unique().tolist()}
                seen.append((subscriber.version, subscriber.state, values))
            if replica and subscriber.version == 2:
                Path(folder, "back").touch()
    return seen


def trainer_of_moody(rank, size, *, address, folder):
    source = [("a", torch.zeros(300, 20)), ("b", torch.zeros(8))]
    with weightbus.Publisher(source, address=address, ready_timeout_s=10) as publisher:
        publisher._terms = replace(publisher._terms, min_replicas=2)
        found = []
        for version in (1, 2, 3):
            for _, tensor in source:
                tensor.fill_(version)
            report = publisher.update(version)
            found.append((report.word, report.replicas, dict(report.left_out)))
            publisher._terms = replace(publisher._terms, min_replicas=1)
            if version == 2:
                at(folder, "back")
    return found


def test_a_replica_that_was_left_out_comes_back_by_itself(address, tmp_path):
    arguments = {"address": address, "folder": str(tmp_path)}
    trained, first, second = run_jobs(
        Job(run=trainer_of_moody, size=2, arguments=arguments),
        Job(run=moody_server, arguments={**arguments, "replica": 0, "at_version": 2}),
        Job(run=moody_server, arguments={**arguments, "replica": 1, "at_version": 2}),
        timeout_s=90,
    )
    for found in trained:
        assert [one[:2] for one in found] == [("verified", (0, 1)), ("verified", (0,)), ("verified", (0, 1))]
        assert "not in the mood" in found[1][2][1]
        assert not found[2][2], "it is no longer left out"
    for seen in (*first, *second):
        assert seen == [(1, "ready", {1.0}), (2, "ready", {2.0}), (3, "ready", {3.0})]


def slow_joiner(rank, size, *, address, folder, replica):
    """Its loading code takes a while for each of its tensors; replica 1 comes once version 1 is committed."""
    target, called = [], []
    for i in range(16):
        parameter = torch.nn.Parameter(torch.zeros(64, 8), requires_grad=False)

        def load(param, loaded):
            if replica and not loaded.is_meta:
                time.sleep(0.2)
            param.data.copy_(loaded)

        parameter.weight_loader = load
        target.append((f"p{i}", parameter))
    if replica:
        at(folder, "committed")

    def on_update(version):
        called.append(("update", version))
        if replica:
            Path(folder, "begun").touch()

    with weightbus.Subscriber(
        target,
        address=address,
        replica=replica,
        on_update=on_update,
        on_commit=lambda version: called.append(("commit", version)),
        on_torn=lambda error: called.append(("torn", str(error))),
        on_refused=lambda error: called.append(("refused", str(error))),
    ) as subscriber:
        until = time.monotonic() + 60
        while not subscriber.left and time.monotonic() < until:
            subscriber.poll(1.0)
        return called, subscriber.state, {v for _, tensor in target for v in tensor.unique().tolist()}


def trainer_in_between(rank, size, *, address, folder):
    source = [(f"p{i}", torch.ones(64, 8)) for i in range(16)]
    with weightbus.Publisher(source, address=address, ready_timeout_s=20) as publisher:
        publisher.update(1)
        Path(folder, "committed").touch()
        at(folder, "begun")
        time.sleep(0.8)
        for _, tensor in source:
            tensor.fill_(2)
        report = publisher.update(2)
        return report.word, report.replicas, report.seconds


def test_an_update_breaks_a_catch_up_off_and_takes_the_replica_with_it(address, tmp_path):
    arguments = {"address": address, "folder": str(tmp_path)}
    trained, ((first, *_),), ((second, state, values_held),) = run_jobs(
        Job(run=trainer_in_between, arguments=arguments),
        Job(run=slow_joiner, arguments={**arguments, "replica": 0}),
        Job(run=slow_joiner, arguments={**arguments, "replica": 1}),
        timeout_s=90,
    )
    assert trained[0][:2] == ("verified", (0, 1))
    assert first == [("update", 1), ("commit", 1), ("update", 2), ("commit", 2)]
    assert [what for what, _ in second] == ["update", "torn", "update", "commit"]
    assert "update 2 has begun: it has right of way" in second[1][1]
    assert (state, values_held) == ("ready", {2.0})


def polling_trainer(rank, size, *, address, folder):
    """It polls between its steps; what it holds has moved on since version 1."""
    source = [("a", torch.ones(300, 20))]
    with weightbus.Publisher(source, address=address, ready_timeout_s=20) as publisher:
        publisher.update()
        Path(folder, "committed").touch()
        source[0][1].fill_(2)
        until = time.monotonic() + 40
        while publisher.version != 2 and time.monotonic() < until:
            publisher.poll()
            time.sleep(0.05)
        at(folder, "right")
        return publisher.version


def short_lived_server(rank, size, *, address, folder, second):
    """The only replica: one that leaves after version 1, and then another one in its place."""
    target = [("a", torch.zeros(300, 20))]
    if second:
        at(folder, "gone")
    with weightbus.Subscriber(target, address=address) as subscriber:
        found = subscriber.wait(2 if second else 1, 40.0)
    Path(folder, "right" if second else "gone").touch()
    return found, target[0][1].unique().tolist()


def test_without_a_donor_the_trainers_poll_brings_it_up(address, tmp_path):
    arguments = {"address": address, "folder": str(tmp_path)}
    trained, first, second = run_jobs(
        Job(run=polling_trainer, size=2, arguments=arguments),
        Job(run=short_lived_server, arguments={**arguments, "second": False}),
        Job(run=short_lived_server, arguments={**arguments, "second": True}),
        timeout_s=90,
    )
    assert trained == [2, 2]
    assert first == [(1, [1.0])]
    assert second == [(2, [2.0])]
