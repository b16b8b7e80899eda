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


def trainer(rank, size, *, address, versions=(1, 2), bucket_bytes=1 << 12, route="broadcast"):
    tensors = [(name, torch.zeros(shape)) for name, shape in NAMES.items()]
    outcomes, wrong, reasons = [], [], {}
    with weightbus.Publisher(
        tensors, address=address, bucket_bytes=bucket_bytes, join_timeout_s=20, route=route
    ) as publisher:
        for version in versions:
            for name, tensor in tensors:
                tensor.copy_(drawn(version)[name])
            try:
                report = publisher.update(version)
                verdict = publisher.check()
                outcomes.append((report.word, sorted(report.partial), verdict.word))
                wrong += [(mismatch.tensor, mismatch.rank) for mismatch in verdict.mismatches]
                reasons |= report.partial
            except weightbus.WeightbusError as error:
                outcomes.append((type(error).__name__, str(error)))
    return outcomes, wrong, reasons


class Fused(nn.Module):
    """Rows of q, k and v under one parameter, split over ranks; o_proj split by columns."""

    def __init__(self, rank, size, fail_at=None, opaque=False):
        super().__init__()
        self.opaque = opaque
        self.rank, self.size, self.calls, self.fail_at = rank, size, 0, fail_at
        self.qkv = nn.Parameter(torch.zeros(40 // size, D))
        self.qkv.weight_loader = self.load_qkv
        self.out = nn.Parameter(torch.zeros(D, D // size))
        self.out.weight_loader = self.load_columns
        self.norm = nn.Parameter(torch.zeros(D))

    def load_qkv(self, param, loaded, shard):
        self.calls += not loaded.is_meta  # it is traced first, on tensors without data
        if self.calls == self.fail_at:
            raise ValueError("no room for this shard")
        rows = {"q": (0, D), "k": (D, 8), "v": (D + 8, 8)}[shard]
        start, count = (n // self.size for n in rows)
        param.data.narrow(0, start, count).copy_(loaded.chunk(self.size, 0)[self.rank])

    def load_columns(self, param, loaded):
        mine = loaded.chunk(self.size, 1)[self.rank]
        param.data.copy_(mine.neg().neg() if self.opaque else mine)


def name_map(wire):
    part = wire.split(".")[0]
    if part in ("q_proj", "k_proj", "v_proj"):
        return ("qkv", part[0])
    return {"o_proj": "out", "norm": "norm"}[part]


def server(rank, size, *, address, fail_at=None, opaque=False, damage=None, **options):
    model = Fused(rank, size, fail_at, opaque)
    seen, torn = [], []

    def committed(version):
        seen.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        if damage and (version, rank) == (2, 1):
            name, row = damage
            with torch.no_grad():
                getattr(model, name)[row, 5] += 1

    subscriber = weightbus.Subscriber(
        model,
        address=address,
        name_map=name_map,
        **options,
        on_commit=committed,
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


@pytest.mark.parametrize(
    ("bucket_bytes", "route"),
    [
        (1 << 10, "broadcast"),
        (1 << 20, "broadcast"),
        (1 << 20, "peer"),
        (1 << 10, "reshard"),
        (1 << 20, "reshard"),
    ],
    ids=["pieces", "one bucket", "peer", "reshard of pieces", "reshard"],
)
def test_fused_and_sharded_by_hooks(address, bucket_bytes, route):
    trainers, servers = run_jobs(
        Job(
            run=trainer,
            size=2,
            arguments={"address": address, "bucket_bytes": bucket_bytes, "route": route},
        ),
        Job(run=server, size=2, arguments={"address": address}),
    )
    assert trainers[0][0] == [("verified", [], "verified")] * 2
    for rank, (seen, torn, state, version) in enumerate(servers):
        assert (torn, state, version) == ([], "ready", 2)
        for number, state in enumerate(seen, start=1):
            for name, tensor in expected(number, rank, 2).items():
                assert torch.equal(state[name], tensor), (number, name)


def test_trusted_traces_are_written_without_a_call(address):
    """The hook would fail at its first real call; there is none."""
    trainers, servers = run_jobs(
        Job(run=trainer, size=2, arguments={"address": address}),
        Job(run=server, size=2, arguments={"address": address, "trust_traces": True, "fail_at": 1}),
    )
    assert trainers[0][0] == [("verified", [], "verified")] * 2
    for rank, (seen, torn, _, _) in enumerate(servers):
        assert torn == []
        for number, state in enumerate(seen, start=1):
            for name, tensor in expected(number, rank, 2).items():
                assert torch.equal(state[name], tensor), (number, name)


@pytest.mark.parametrize("route", ["broadcast", "peer", "reshard"])
def test_a_raising_hook_tears_and_a_whole_update_mends(address, route):
    """The hook's third call fails on both ranks; the next update is complete and leads out."""
    trainers, servers = run_jobs(
        Job(run=trainer, size=1, arguments={"address": address, "route": route}),
        Job(run=server, size=2, arguments={"address": address, "fail_at": 3}),
    )
    (kind, text), second = trainers[0][0]
    assert kind == "TornError"
    for part in (
        "_proj.weight: weight_loader of qkv raised ValueError",
        "no room for this shard",
        "replica 0 server rank 0",
        "replica 0 server rank 1",
    ):
        assert part in text, text
    assert second[0] == "verified"
    for rank, (seen, torn, state, version) in enumerate(servers):
        assert [s for s, _ in torn] == ["torn"]
        assert "no room for this shard" in torn[0][1]
        assert (state, version, len(seen)) == ("ready", 2, 1)
        for name, tensor in expected(2, rank, 2).items():
            assert torch.equal(seen[0][name], tensor), name


@pytest.mark.parametrize(
    ("parameter", "row", "wire"),
    [
        ("qkv", 0, "q_proj.weight"),
        ("qkv", 13, "k_proj.weight"),
        ("qkv", 19, "v_proj.weight"),
        ("out", 3, "o_proj.weight"),
    ],
)
def test_damage_behind_a_hook_is_named_by_the_wires_name(address, parameter, row, wire):
    trainers, _ = run_jobs(
        Job(run=trainer, arguments={"address": address}),
        Job(run=server, size=2, arguments={"address": address, "damage": (parameter, row)}),
    )
    outcomes, wrong, _ = trainers[0]
    assert [(update, check) for update, _, check in outcomes] == [
        ("verified", "verified"),
        ("verified", "mismatch"),
    ]
    assert wrong == [(wire, "replica 0 server rank 1")]


def test_a_hook_that_computes_is_checked_on_arrival_only(address):
    trainers, servers = run_jobs(
        Job(run=trainer, arguments={"address": address}),
        Job(run=server, size=2, arguments={"address": address, "opaque": True}),
    )
    outcomes, _, reasons = trainers[0]
    assert outcomes == [("partial", ["o_proj.weight"], "partial")] * 2
    assert reasons == {
        "o_proj.weight": "weight_loader of out can't be traced: it computes with weights, by aten.neg.default"
    }
    for rank, (seen, _, _, _) in enumerate(servers):
        assert torch.equal(seen[1]["out"], expected(2, rank, 2)["out"])


class Padded(nn.Module):
    """A vocabulary of 37 words in a table of 40 rows, whose last ones the loader zeroes or forgets."""

    def __init__(self, forgets):
        super().__init__()
        self.forgets = forgets
        self.table = nn.Parameter(torch.ones(40, 6))
        self.table.weight_loader = self.load

    def load(self, param, loaded):
        param.data[:37].copy_(loaded)
        if not self.forgets:
            param.data[37:].fill_(0)


def vocabulary_trainer(rank, size, *, address):
    outcomes = []
    source = [("table", torch.randn(37, 6))]
    with weightbus.Publisher(source, address=address, join_timeout_s=20) as publisher:
        try:
            publisher.update(1)
            outcomes.append(str(publisher.check()))
        except weightbus.WeightbusError as error:
            outcomes.append(str(error))
    return outcomes


def vocabulary_server(rank, size, *, address, forgets=False, spoil=False, local=(), trust_traces=False):
    model = Padded(forgets)

    def committed(version):
        if spoil:
            with torch.no_grad():
                model.table[38, 2] = 1e-3

    with weightbus.Subscriber(
        model, address=address, local=local, trust_traces=trust_traces, on_commit=committed
    ) as subscriber:
        subscriber.serve()
    return model.table[37:].detach().sum().item()


@pytest.mark.parametrize(
    ("arguments", "outcome", "tail"),
    [
        ({}, "verified version 1", 0.0),
        ({"trust_traces": True}, "verified version 1", 0.0),
        (
            {"spoil": True},
            "expected 0 in [37:40, 0:6], where its weight_loader fills it; fill: wrong within [38:39, 2:3]",
            1e-3,
        ),
        ({"forgets": True}, "expected weight_loader to write all 240 elements of shape [40, 6], got 222", 18.0),
        ({"forgets": True, "local": ["table"]}, "verified version 1", 18.0),
    ],
    ids=["filled", "filled without a call", "spoiled", "forgotten", "declared"],
)
def test_padding(address, arguments, outcome, tail):
    ((outcomes,), (left,)) = run_jobs(
        Job(run=vocabulary_trainer, arguments={"address": address}),
        Job(run=vocabulary_server, arguments={"address": address, **arguments}),
    )
    assert outcome in outcomes[0]
    assert left == pytest.approx(tail)
