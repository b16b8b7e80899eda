"""The reshard route over real processes: any layout to any other, bit for bit, and no byte too many."""

from __future__ import annotations

import pytest
import torch
from models import Toy, fill, full, make, values
from processes import Job, run_jobs

import weightbus
from weightbus.routes.group import Group

VERSIONS = (1, 2)


def some(kind, rank, size, device="cpu", dtype=torch.float32):
    """Whole tensors of a Toy, each on one rank: dealt out as experts are, or in stages as of a pipeline."""
    state = values(0)
    names = sorted(state)
    places = [i % size if kind == "ep" else i * size // len(names) for i in range(len(names))]
    return {
        name: torch.zeros_like(state[name], dtype=dtype if name in BIG else None).to(device)
        for name, place in zip(names, places, strict=True)
        if place == rank
    }


BIG = [name for name, tensor in Toy().named_parameters() if not name.startswith("norm")]


def made(kind, rank, size, device, dtype=torch.float32):
    if kind in ("ep", "pp"):
        if device == "cuda":
            make("plain", rank, size, device)  # takes this rank's device
        return some(kind, rank, size, device, dtype)
    return make(kind, rank, size, device, dtype)


def given(held):
    return list(held.items()) if isinstance(held, dict) else held


def put(held, version):
    drawn = values(version)
    if isinstance(held, dict):
        for name, tensor in held.items():
            tensor.copy_(drawn[name])
    else:
        fill(held, drawn)


def taken(held):
    if isinstance(held, dict):
        return {name: tensor.cpu().clone() for name, tensor in held.items()}
    return full(held)


def counted():
    """What this process gives the group to send and to receive, as totals of bytes of each update."""
    bytes_ = [0, 0]
    old = Group.exchange

    def exchange(self, sends, receives):
        for place, buffers in enumerate((sends, receives)):
            bytes_[place] += sum(buffer.nbytes for buffer, _ in buffers)
        return old(self, sends, receives)

    Group.exchange = exchange
    return bytes_


def trainer(rank, size, *, address, kind, device="cpu", replicas=1, route="reshard", **options):
    moved = counted()
    source = made(kind, rank, size, device)
    options = {"bucket_bytes": 1 << 18, "join_timeout_s": 60, **options}
    found = []
    with weightbus.Publisher(
        given(source), address=address, rank=rank, size=size, min_replicas=replicas, route=route, **options
    ) as publisher:
        for version in VERSIONS:
            put(source, version)
            report = publisher.update(version)
            found.append((report.word, report.route, publisher.check().word))
            assert report.staging_bytes <= 2 << 18, "two buckets"
    return found, [n // len(VERSIONS) for n in moved]


def server(rank, size, *, address, kind, replica=0, device="cpu", dtype=torch.float32, num_buckets=2):
    moved = counted()
    target = made(kind, rank, size, device, dtype)
    seen = []
    with weightbus.Subscriber(
        given(target),
        address=address,
        replica=replica,
        rank=rank,
        replica_size=size,
        num_buckets=num_buckets,
        on_commit=lambda version: seen.append((version, taken(target))),
    ) as subscriber:
        subscriber.serve()
        assert (subscriber.state, subscriber.version) == ("ready", VERSIONS[-1])
    state = target if isinstance(target, dict) else target.state_dict(keep_vars=True)
    local = {id(t): t.to_local() if hasattr(t, "to_local") else t for t in state.values()}
    return seen, [n // len(VERSIONS) for n in moved], sum(t.nbytes for t in local.values())


def run(address, trains, *replicas, device="cpu", dtype=torch.float32, num_buckets=2, **options):
    """Runs it; checks words and bits. Bytes: sent by trainers; received and held by servers; passed on."""
    (kind, size) = trains
    arguments = {"address": address, "device": device}
    serves = {**arguments, "dtype": dtype, "num_buckets": num_buckets}
    jobs = [
        Job(run=server, size=s, arguments={**serves, "kind": k, "replica": i})
        for i, (k, s) in enumerate(replicas)
    ]
    more = {"kind": kind, "replicas": len(replicas), **options}
    first, *others = run_jobs(
        Job(run=trainer, size=size, arguments={**arguments, **more}), *jobs, timeout_s=120
    )
    for found, _ in first:
        assert found == [("verified", options.get("route", "reshard"), "verified")] * len(VERSIONS)
    for job in others:
        held = {}
        for seen, _, _ in job:
            assert [version for version, _ in seen] == list(VERSIONS)
            for version, state in seen:
                held.setdefault(version, {}).update(state)
        for version, state in held.items():
            expected = values(version)
            assert state.keys() == expected.keys()
            for name, tensor in state.items():
                bits = [t.reshape(-1).view(torch.uint8) for t in (tensor, expected[name].to(tensor.dtype))]
                assert torch.equal(*bits), f"version {version}: {name}"
    servers = [rank for job in others for rank in job]
    return [sent for _, (sent, _) in first], [(moved[1], own) for _, moved, own in servers], [
        moved[0] for _, moved, _ in servers
    ]  # fmt: skip


def model_bytes():
    return sum(tensor.nbytes for tensor in values(0).values())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param


LAYOUTS = [
    (("fsdp2", 4), ("tp", 4)),
    (("hsdp", 4), ("tp", 2)),
    (("tp", 2), ("pp", 3)),
    (("ep", 3), ("tp", 2)),
    (("pp", 3), ("ep", 2)),
    (("fsdp2", 3), ("pp", 2)),
    (("fsdp2-tp", 4), ("ep", 3)),
]


@pytest.mark.parametrize(("trains", "serves"), LAYOUTS, ids=lambda job: f"{job[1]}-{job[0]}")
def test_any_layout_to_any_other(address, device, trains, serves):
    """Each server rank receives its own shard, and trainer ranks together send no more than is received."""
    sent, received, passed = run(address, trains, serves, device=device)
    for got, own in received:
        assert got <= 1.01 * own + 512, "slots are aligned"
    assert sum(sent) <= 1.01 * model_bytes() + 512, "what several server ranks want leaves the trainers once"
    assert sum(sent) + sum(passed) == sum(got for got, _ in received)


@pytest.mark.parametrize(
    "replicas",
    [[("tp", 2), ("tp", 2)], [("plain", 1)] * 3, [("tp", 2), ("pp", 2)]],
    ids=["two", "three", "of two layouts"],
)
def test_replicas_share_one_model_among_themselves(address, device, replicas):
    """However many there are, and however each of them is cut."""
    sent, received, passed = run(address, ("fsdp2", 2), *replicas, device=device)
    assert sum(sent) <= 1.01 * model_bytes() + 512
    for got, own in received:
        assert got <= 1.01 * own + 1024
    assert sum(sent) + sum(passed) == sum(got for got, _ in received)


def test_what_is_passed_on_is_in_place_before(address, device):
    """However many waves may be under way on a server rank, and even those of one bucket."""
    run(address, ("fsdp2", 2), ("tp", 2), ("plain", 1), device=device, num_buckets=5, bucket_bytes=1 << 13)


def test_casts_are_made_by_the_sender(address, device):
    sent, received, _ = run(address, ("fsdp2", 2), ("tp", 2), device=device, dtype=torch.bfloat16)
    for got, own in received:
        assert got <= 1.01 * own + 512, "in the wire's dtype"
    assert sum(sent) < 0.6 * model_bytes()


def test_casts_of_replicated_sources_to_replicas(address):
    sent, _, _ = run(address, ("hsdp", 4), ("tp", 2), ("pp", 2), dtype=torch.bfloat16)
    assert sum(sent) < 0.6 * model_bytes()
    assert min(sent) > 0.8 * max(sent), "ranks that hold the same send alike"


@pytest.mark.parametrize(
    ("trains", "serves", "route"),
    [
        (("fsdp2", 2), ("tp", 2), "reshard"),
        (("plain", 1), ("tp", 2), "broadcast"),
        (("fsdp2", 2), ("plain", 1), "broadcast"),
    ],
    ids=["fewer bytes", "one trainer rank", "as many bytes"],
)
def test_auto_takes_it_where_the_busiest_rank_carries_clearly_less(address, trains, serves, route):
    found, moved = auto(address, trains, serves)
    assert [row[1] for row in found] == [route] * len(VERSIONS)
    assert bool(moved) == (route == "reshard")


def auto(address, trains, serves):
    first, _ = run_jobs(
        Job(
            run=trainer,
            size=trains[1],
            arguments={"address": address, "kind": trains[0], "route": "auto"},
        ),
        Job(run=server, size=serves[1], arguments={"address": address, "kind": serves[0]}),
    )
    return first[0][0], first[0][1][0]
