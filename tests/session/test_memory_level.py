"""Hundreds of updates, each with other names, shapes and dtypes, take no more memory than the first few."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest
import torch
from processes import Job, run_jobs
from torch import nn

import weightbus

UPDATES, FIRST = 300, 10
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32)
LEVEL_BYTES = 6 << 20  # what is resident moves by so much without us


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def reshape(model: nn.Module, step: int, value: float) -> None:
    """Another name, shape and dtype of one parameter; and another tensor behind the same hook."""
    for name in [name for name in model._parameters if name.startswith("w")]:
        delattr(model, name)
    shape = (100 + step % 50, 300 + 7 * (step % 31))
    fresh = torch.full(shape, value, dtype=DTYPES[step % len(DTYPES)])
    model.register_parameter(f"w{step}", nn.Parameter(fresh, requires_grad=False))
    hooked = nn.Parameter(torch.full((64, 300), float(value)), requires_grad=False)
    hooked.weight_loader = load
    model.register_parameter("hooked", hooked)


def load(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
    parameter.data.copy_(loaded)


def trainer(rank, size, *, address):
    model, staging, levels = nn.Module(), set(), []
    reshape(model, 0, 0.0)
    with weightbus.Publisher(model, address=address, bucket_bytes=1 << 16) as publisher:
        for step in range(1, UPDATES + 1):
            reshape(model, step, float(step % 100))
            report = publisher.update()
            assert report.word == "verified"
            staging.add(report.staging_bytes)
            if step in (FIRST, UPDATES):
                levels.append(resident())
    return levels, sorted(staging)


def server(rank, size, *, address):
    model, levels, wrong = nn.Module(), [], 0
    reshape(model, 0, -1.0)
    with weightbus.Subscriber(model, address=address) as subscriber:
        for step in range(1, UPDATES + 1):
            reshape(model, step, -1.0)
            while subscriber.version != step:
                subscriber.poll(0.5)
                assert subscriber.error is None, subscriber.error
            wrong += sum(not bool((p == step % 100).all()) for p in model.parameters())
            if step in (FIRST, UPDATES):
                levels.append(resident())
    return levels, wrong


@pytest.mark.timeout(240)
def test_memory_is_level_however_layouts_change(address):
    (sent,), (served,) = run_jobs(
        Job(run=trainer, arguments={"address": address}),
        Job(run=server, arguments={"address": address}),
        timeout_s=200,
    )
    (begun, ended), staging = sent
    assert ended - begun < LEVEL_BYTES
    (begun, ended), wrong = served
    assert wrong == 0
    assert ended - begun < LEVEL_BYTES
    assert staging[-1] <= 4 << 16, "two buckets in each direction, whatever the layout"
