"""Tensors that change under a plan: replaced or moved ones are planned anew; changed in place, an error."""

from __future__ import annotations

import torch
from processes import Job, run_jobs
from torch import nn

import weightbus


def trainer(rank, size, *, address):
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
                said.append(publisher.update(version).word)
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
