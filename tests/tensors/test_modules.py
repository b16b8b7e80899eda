"""Updates of some modules of a mapping: the others keep their version, and a check covers each at its own."""

from __future__ import annotations

import pytest
import torch
from processes import Job, run_jobs
from torch import nn

import weightbus


def pipeline():
    return {"transformer": nn.Linear(40, 30), "vae": nn.Linear(20, 10)}


def fill(modules, value):
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.fill_(value)


def held(modules):
    """The one value that each module holds everywhere."""
    return {name: {p.unique().item() for p in module.parameters()} for name, module in modules.items()}


def trainer(rank, size, *, address):
    source = pipeline()
    words = []
    with weightbus.Publisher(source, address=address, rank=rank, size=size, join_timeout_s=30) as publisher:
        fill(source, 1)
        words.append(publisher.update(1).word)
        fill(source, 2)
        report = publisher.update(2, modules=["transformer"])
        words.append((report.word, report.tensors))
        words.append(publisher.check().word)
        with pytest.raises(weightbus.WeightbusError, match="text_encoder: expected a module among transformer"):
            publisher.update(3, modules=["text_encoder"])
        fill(source, 4)
        words.append(publisher.update(4, modules=["vae"]).tensors)
        words.append(publisher.check().word)
    return words


def server(rank, size, *, address, spoil):
    target = pipeline()
    seen = []

    def committed(version):
        seen.append((version, held(target)))
        if spoil and version == 4:
            with torch.no_grad():
                target["transformer"].bias[3] = 5

    subscriber = weightbus.Subscriber(
        target, address=address, rank=rank, replica_size=size, on_commit=committed
    )
    with subscriber:
        subscriber.serve()
    return seen


@pytest.mark.parametrize("spoil", [False, True])
def test_modules(address, spoil):
    """``spoil`` damages a module that the last update did not carry: the check must see it too."""
    trainers, servers = run_jobs(
        Job(run=trainer, size=2, arguments={"address": address}),
        Job(run=server, arguments={"address": address, "spoil": spoil}),
    )
    last = "mismatch" if spoil else "verified"
    assert trainers == [["verified", ("verified", 2), "verified", 2, last]] * 2
    assert servers == [
        [
            (1, {"transformer": {1.0}, "vae": {1.0}}),
            (2, {"transformer": {2.0}, "vae": {1.0}}),
            (4, {"transformer": {2.0}, "vae": {4.0}}),
        ]
    ]
