"""``weight_loader`` hooks: fused and sharded parameters, as inference engines have them."""

from __future__ import annotations

import pytest
import torch
from processes import Job, run_jobs
from torch import nn

import weightbus

D = 24
NAMES = {
    "q_proj.weight": (D, D),
    "k_proj.weight": (8, D),
    "v_proj.weight": (8, D),
    "norm.weight": (D,),
    "o_proj.weight": (D, D),
}


def drawn(version):
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=generator) for name, shape in NAMES.items()}


def trainer(rank, size, *, address, versions=(1, 2), bucket_bytes=1 << 12):
    tensors = [(name, torch.zeros(shape)) for name, shape in NAMES.items()]
    outcomes = []
    with weightbus.Publisher(
        tensors, address=address, bucket_bytes=bucket_bytes, join_timeout_s=20
    ) as publisher:
        for version in versions:
            for name, tensor in tensors:
                tensor.copy_(drawn(version)[name])
            try:
                report = publisher.update(version)
                verdict = publisher.check()
                outcomes.append((report.word, sorted(report.arrived), verdict.word))
            except weightbus.WeightbusError as error:
                outcomes.append((type(error).__name__, str(error)))
    return outcomes


class Fused(nn.Module):
    """Rows of q, k and v under one parameter, split over ranks; o_proj split by columns."""

    def __init__(self, rank, size, fail_at=None):
        super().__init__()
        self.rank, self.size, self.calls, self.fail_at = rank, size, 0, fail_at
        self.qkv = nn.Parameter(torch.zeros(40 // size, D))
        self.qkv.weight_loader = self.load_qkv
        self.out = nn.Parameter(torch.zeros(D, D // size))
        self.out.weight_loader = self.load_columns
        self.norm = nn.Parameter(torch.zeros(D))

    def load_qkv(self, param, loaded, shard):
        self.calls += 1
        if self.calls == self.fail_at:
            raise ValueError("no room for this shard")
        rows = {"q": (0, D), "k": (D, 8), "v": (D + 8, 8)}[shard]
        start, count = (n // self.size for n in rows)
        param.data.narrow(0, start, count).copy_(loaded.chunk(self.size, 0)[self.rank])

    def load_columns(self, param, loaded):
        param.data.copy_(loaded.chunk(self.size, 1)[self.rank])


def name_map(wire):
    part = wire.split(".")[0]
    if part in ("q_proj", "k_proj", "v_proj"):
        return ("qkv", part[0])
    return {"o_proj": "out", "norm": "norm"}[part]


def server(rank, size, *, address, fail_at=None):
    model = Fused(rank, size, fail_at)
    seen, torn = [], []
    subscriber = weightbus.Subscriber(
        model,
        address=address,
        name_map=name_map,
        on_commit=lambda version: seen.append({n: p.detach().clone() for n, p in model.named_parameters()}),
        on_torn=lambda error: torn.append((subscriber.state, str(error))),
    )
    with subscriber:
        subscriber.serve()
    return seen, torn, subscriber.state, subscriber.version


def expected(version, rank, size):
    full = drawn(version)
    shards = [full[name].chunk(size, 0)[rank] for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight")]
    return {
        "qkv": torch.cat(shards),
        "out": full["o_proj.weight"].chunk(size, 1)[rank],
        "norm": full["norm.weight"],
    }


@pytest.mark.parametrize("bucket_bytes", [1 << 10, 1 << 20], ids=["pieces", "one bucket"])
def test_fused_and_sharded_by_hooks(address, bucket_bytes):
    trainers, servers = run_jobs(
        Job(run=trainer, size=2, arguments={"address": address, "bucket_bytes": bucket_bytes}),
        Job(run=server, size=2, arguments={"address": address}),
    )
    hooked = ["k_proj.weight", "o_proj.weight", "q_proj.weight", "v_proj.weight"]
    assert trainers[0] == [("arrived", hooked, "arrived")] * 2
    for rank, (seen, torn, state, version) in enumerate(servers):
        assert (torn, state, version) == ([], "ready", 2)
        for number, state in enumerate(seen, start=1):
            for name, tensor in expected(number, rank, 2).items():
                assert torch.equal(state[name], tensor), (number, name)


def test_a_raising_hook_tears_and_a_whole_update_mends(address):
    """The hook's third call fails on both ranks; the next update is complete and leads out."""
    trainers, servers = run_jobs(
        Job(run=trainer, size=1, arguments={"address": address}),
        Job(run=server, size=2, arguments={"address": address, "fail_at": 3}),
    )
    (kind, text), second = trainers[0]
    assert kind == "TornError"
    for part in (
        "v_proj.weight",
        "no room for this shard",
        "replica 0 server rank 0",
        "replica 0 server rank 1",
    ):
        assert part in text, text
    assert second[0] == "arrived"
    for rank, (seen, torn, state, version) in enumerate(servers):
        assert [s for s, _ in torn] == ["torn"]
        assert "no room for this shard" in torn[0][1]
        assert (state, version, len(seen)) == ("ready", 2, 1)
        for name, tensor in expected(2, rank, 2).items():
            assert torch.equal(seen[0][name], tensor), name
