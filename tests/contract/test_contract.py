"""The main job over real processes: trainers of every layout, servers of every layout, bit for bit."""

from __future__ import annotations

import pytest
import torch
from models import TP, Toy, distribute, fill, full, make, values
from processes import Job, run_jobs

import weightbus

VERSIONS = (1, 2, 3)


def trainer(rank, size, *, address, kind, device="cpu", dtype=torch.float32, min_replicas=1, route="broadcast"):
    model = make(kind, rank, size, device, dtype)
    reports = []
    with weightbus.Publisher(
        model,
        address=address,
        rank=rank,
        size=size,
        min_replicas=min_replicas,
        bucket_bytes=1 << 18,
        join_timeout_s=30,
        route=route,
    ) as publisher:
        for version in VERSIONS:
            fill(model, values(version, dtype))
            report = publisher.update(version)
            assert 0 < report.transfer_share <= 1
            assert report.staging_bytes <= 2 << 18, "two buckets"
            assert report.route == route, report
            verdict = publisher.check()
            reports.append((report.word, report.tensors, verdict.word, str(verdict)))
    return reports


def server(rank, size, *, address, kind, replica=0, device="cpu", dtype=torch.float32):
    model = make(kind, rank, size, device, dtype)
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values() if not tensor.is_meta]
    seen = []
    subscriber = weightbus.Subscriber(
        model,
        address=address,
        replica=replica,
        rank=rank,
        replica_size=size,
        on_commit=lambda version: seen.append((version, full(model))),
    )
    with subscriber:
        subscriber.serve()
        assert (subscriber.state, subscriber.version) == ("ready", VERSIONS[-1])
    assert pointers == [tensor.data_ptr() for tensor in model.state_dict().values() if not tensor.is_meta]
    return seen


def check_results(trainers, servers, dtype=torch.float32):
    for reports in trainers:
        assert [report[0] for report in reports] == ["verified"] * len(VERSIONS), reports
        assert [report[2] for report in reports] == ["verified"] * len(VERSIONS), reports
        assert {report[1] for report in reports} == {len(values(0))}
    for seen in servers:
        assert [version for version, _ in seen] == list(VERSIONS)
        for version, state in seen:
            expected = values(version, dtype)
            assert state.keys() == expected.keys()
            for name, tensor in expected.items():
                bits = [t.reshape(-1).view(torch.uint8) for t in (tensor.to(state[name].dtype), state[name])]
                assert torch.equal(*bits), f"version {version}: {name}"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param


@pytest.fixture(params=["broadcast", "peer", "reshard"])
def route(request):
    """gloo on CPU, and the same body over NCCL; shared memory on CPU, and the same body over CUDA IPC."""
    return request.param


@pytest.mark.parametrize(
    ("trainers", "servers"),
    [
        (("plain", 1), ("plain", 1)),
        (("fsdp2", 2), ("tp", 2)),
        (("fsdp2", 3), ("tp", 2)),
        (("plain", 2), ("tp", 3)),
        (("fsdp2-tp", 4), ("plain", 1)),
    ],
    ids=lambda job: f"{job[1]}-{job[0]}",
)
def test_update(address, device, route, trainers, servers):
    results = run_jobs(
        Job(
            run=trainer,
            size=trainers[1],
            arguments={"device": device, "address": address, "kind": trainers[0], "route": route},
        ),
        Job(run=server, size=servers[1], arguments={"device": device, "address": address, "kind": servers[0]}),
    )
    check_results(*results)


def test_two_replicas(address, device, route):
    """Two replicas of two ranks are updated together; each holds the whole version."""
    results = run_jobs(
        Job(
            run=trainer,
            size=2,
            arguments={
                "device": device,
                "address": address,
                "kind": "fsdp2",
                "min_replicas": 2,
                "route": route,
            },
        ),
        *(
            Job(
                run=server,
                size=2,
                arguments={"device": device, "address": address, "kind": "tp", "replica": replica},
            )
            for replica in (0, 1)
        ),
    )
    check_results(results[0], results[1] + results[2])


def test_casts_to_the_destinations_dtype(address, device):
    results = run_jobs(
        Job(run=trainer, size=2, arguments={"device": device, "address": address, "kind": "fsdp2"}),
        Job(
            run=server,
            size=2,
            arguments={"device": device, "address": address, "kind": "tp", "dtype": torch.bfloat16},
        ),
    )
    check_results(*results)


def test_without_torchrun_and_default_group(address, device, route):
    """As Ray actors are: no variables, no default group; rank and size are given."""
    results = run_jobs(
        Job(
            run=trainer,
            size=2,
            arguments={"device": device, "address": address, "kind": "plain", "route": route},
            bare=True,
        ),
        Job(run=server, size=1, arguments={"device": device, "address": address, "kind": "plain"}, bare=True),
    )
    check_results(*results)


def one_world(rank, size, *, address, device, route):
    """Both roles inside one torchrun world: the lower half trains."""
    half = size // 2
    if rank < half:
        return trainer(rank, half, address=address, kind="plain", device=device, route=route)
    return server(rank - half, half, address=address, kind="plain", device=device)


def test_both_jobs_in_one_world(address, device, route):
    ((one, two),) = run_jobs(
        Job(run=one_world, size=2, arguments={"device": device, "address": address, "route": route})
    )
    check_results([one], [two])


def both_ends(rank, size, *, address, device, route):
    """One process that is a trainer rank and a server rank."""
    source = make("fsdp2", rank, size, device)
    mesh = torch.distributed.device_mesh.init_device_mesh(device, (size,))
    target = distribute(Toy().to(device), mesh, TP)
    publisher = weightbus.Publisher(source, address=address, bucket_bytes=1 << 18, route=route)
    subscriber = weightbus.Subscriber(target, address=address)
    reports = []
    for version in VERSIONS:
        fill(source, values(version))
        report = publisher.update(version)
        assert not subscriber.poll()
        verdict = publisher.check()
        reports.append((report.word, report.tensors, verdict.word, str(verdict)))
        expected = values(version)
        for name, tensor in full(target).items():
            assert torch.equal(
                tensor.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8)
            ), name
    publisher.close()
    subscriber.close()
    return reports


def test_processes_with_both_ends(address, device, route):
    (results,) = run_jobs(
        Job(run=both_ends, size=2, arguments={"device": device, "address": address, "route": route})
    )
    check_results(results, [])


def odd(dtype):
    return [("a", torch.zeros(300, 40, dtype=dtype)), ("b", torch.zeros(7, dtype=dtype))]


def odd_trainer(rank, size, *, address):
    source = odd(torch.float32)
    for i, (_, tensor) in enumerate(source):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + i)
    with weightbus.Publisher(source, address=address, rank=rank, size=size) as publisher:
        return publisher.update(1).word


def odd_server(rank, size, *, address):
    target = odd(torch.bfloat16)
    with weightbus.Subscriber(target, address=address, rank=rank, replica_size=size) as subscriber:
        subscriber.serve()
    return target


def test_a_small_tensor_alone_in_its_bucket(address):
    """Cast on the way, so packed by its sender; received in place."""
    words, targets = run_jobs(
        Job(run=odd_trainer, size=2, arguments={"address": address}),
        Job(run=odd_server, size=1, arguments={"address": address}),
    )
    assert words == ["verified"] * 2
    for i, (_, tensor) in enumerate(targets[0]):
        expected = (torch.arange(tensor.numel()).view(tensor.shape) + i).to(torch.bfloat16)
        assert torch.equal(tensor, expected)
