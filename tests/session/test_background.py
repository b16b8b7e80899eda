"""``update(wait=False)``: what is sent is the source as it was at the call."""

from __future__ import annotations

import pytest
import torch
from models import fill, full, make, values
from processes import Job, run_jobs

import weightbus

VERSIONS = (1, 2, 3, 4)


def trainer(rank, size, *, address, device, where):
    model = make("fsdp2", rank, size, device)
    with weightbus.Publisher(
        model, address=address, bucket_bytes=1 << 18, join_timeout_s=30, copy_to=where
    ) as publisher:
        futures = []
        for version in VERSIONS:
            fill(model, values(version))
            # The third is sent from the live source, between two from the copy.
            future = publisher.update(version, wait=version == 3)
            futures.append(future)
            if version != 3:
                fill(model, values(100 + version))  # the trainer goes on at once
        last = publisher.check()  # waits for the update before it
        words = [f.word if isinstance(f, weightbus.Report) else f.result(timeout=30).word for f in futures]
        late = publisher.update(0, wait=False)
        reason = str(late.exception(timeout=30))
    return words, last.word, reason


def server(rank, size, *, address, device):
    model = make("tp", rank, size, device)
    seen = []
    with weightbus.Subscriber(
        model, address=address, on_commit=lambda version: seen.append((version, full(model)))
    ) as subscriber:
        subscriber.serve()
    return seen


@pytest.mark.parametrize(
    ("device", "where"),
    [
        ("cpu", "device"),
        pytest.param("cuda", "device", marks=pytest.mark.cuda),
        pytest.param("cuda", "host", marks=pytest.mark.cuda),
    ],
)
def test_the_source_may_change_at_once(address, device, where):
    trainers, servers = run_jobs(
        Job(run=trainer, size=2, arguments={"address": address, "device": device, "where": where}),
        Job(run=server, size=2, arguments={"address": address, "device": device}),
    )
    for words, last, reason in trainers:
        assert words == ["verified"] * len(VERSIONS)
        assert last == "verified"
        assert "version 0: expected one above 4" in reason
    for seen in servers:
        assert [version for version, _ in seen] == list(VERSIONS)
        for version, state in seen:
            for name, tensor in values(version).items():
                bits = [t.reshape(-1).view(torch.uint8) for t in (tensor, state[name])]
                assert torch.equal(*bits), f"version {version}: {name}"


def both(rank, size, *, address):
    source, target = make("plain", 0, 1), make("plain", 0, 1)
    with (
        weightbus.Publisher(source, address=address) as publisher,
        weightbus.Subscriber(target, address=address),
    ):
        with pytest.raises(weightbus.UpdateError, match="this process serves the weights"):
            publisher.update(1, wait=False)
        return publisher.update(1).word


def test_a_process_that_serves_too_waits(address):
    assert run_jobs(Job(run=both, arguments={"address": address})) == [["verified"]]


def test_where_the_copy_lies(address):
    with pytest.raises(weightbus.SpecError, match="copy_to: expected 'device' or 'host', got 'disk'"):
        weightbus.Publisher([("w", torch.zeros(2))], address=address, copy_to="disk")
