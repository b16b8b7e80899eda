"""Tensors that change under a plan: replaced or moved ones are planned anew; changed in place, an error."""

from __future__ import annotations

import threading

import torch
from processes import Job, run_jobs
from safetensors.torch import load_file
from torch import nn

import weightbus
from weightbus.hub.server import Hub


def trainer(rank, size, *, address, wait=True):
    model = nn.Linear(6, 6, bias=False)
    said = []
    with weightbus.Publisher(model, address=address, join_timeout_s=30) as publisher:
        for version in range(1, 8):
            with torch.no_grad():
                if version == 3:
                    model.weight.data = torch.empty(6, 6)  # another address
                if version == 4:
                    model.weight.data = model.weight.data.t()  # the same one, other strides
                if version == 6:
                    model.weight = nn.Parameter(torch.empty(6, 6))
                model.weight.copy_(torch.arange(36.0).view(6, 6) + version)
            try:
                report = publisher.update(version, wait=wait)
                said.append(report.word if wait else report.result(timeout=30).word)
            except weightbus.TornError as error:
                said.append(str(error))
    return said


def server(rank, size, *, address):
    model = nn.Linear(6, 6, bias=False)
    seen = {}
    with weightbus.Subscriber(
        model,
        address=address,
        on_commit=lambda version: seen.update({version: model.weight.detach().clone()}),
        on_torn=lambda error: seen.update(torn=str(error)),
    ) as subscriber:
        subscriber.serve()
    return seen


def test_tensors_that_move_or_change(address):
    ((said,), (seen,)) = run_jobs(
        Job(run=trainer, arguments={"address": address}), Job(run=server, arguments={"address": address})
    )
    assert [word for i, word in enumerate(said, 1) if i != 4] == ["verified"] * 6
    # The copy would have gone by the strides of the plan: said, not served.
    assert "weight: expected shape, strides and dtype as planned" in said[3]
    assert "weight: expected shape, strides and dtype as planned" in seen.pop("torn")
    for version, weight in seen.items():
        assert torch.equal(weight, torch.arange(36.0).view(6, 6) + version), version
    assert sorted(seen) == [1, 2, 3, 5, 6, 7]


def test_a_copy_is_made_by_the_strides_of_the_call(address):
    ((said,), (seen,)) = run_jobs(
        Job(run=trainer, arguments={"address": address, "wait": False}),
        Job(run=server, arguments={"address": address}),
    )
    assert said == ["verified"] * 7
    assert sorted(seen) == list(range(1, 8))
    for version, weight in seen.items():
        assert torch.equal(weight, torch.arange(36.0).view(6, 6) + version), version


def test_modules_of_a_mapping_that_are_replaced():
    source, target = ({name: nn.Linear(3, 3) for name in ("a", "b")} for _ in range(2))
    with weightbus.colocate(source, target) as pair:
        assert pair.update(1).word == "verified"
        for version, ends in ((2, (source,)), (3, (target,)), (4, (source, target))):
            for end in ends:
                end["b"] = nn.Linear(3, 3)
            assert pair.update(version).word == "verified"
            assert torch.equal(target["b"].weight, source["b"].weight)
            assert pair.check().word == "verified"
        source["c"], target["c"] = nn.Linear(2, 2), nn.Linear(2, 2)
        assert pair.update(5).word == "verified"
        assert torch.equal(target["c"].weight, source["c"].weight)
        del source["a"], target["a"]
        assert pair.update(6).tensors == 4


def test_saves_and_loads_go_by_the_strides_of_the_call(address, tmp_path):
    source, target = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
    hub = Hub(address)
    thread = threading.Thread(target=hub.serve)
    thread.start()
    with (
        weightbus.Publisher(source, address=address, rank=0, size=1) as publisher,
        weightbus.Subscriber(target, address=address, rank=0, replica_size=1) as subscriber,
    ):
        for version in (1, 2):
            with torch.no_grad():
                source.weight.copy_(torch.arange(24.0).view(4, 6) + version)
            publisher.save(tmp_path / str(version), version=version)
            (file,) = (tmp_path / str(version)).glob("*.safetensors")
            assert torch.equal(load_file(file)["weight"], source.weight)
            assert subscriber.update_from_disk(tmp_path / str(version)).word == "verified"
            assert torch.equal(target.weight, source.weight)
            for model in (source, target):  # the same address and shape
                model.weight.data = model.weight.data.as_strided((4, 6), (1, 4))
    hub.stop()
    thread.join()
