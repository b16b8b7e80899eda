"""colocate: source and target in one process, or sharded differently over the same ranks of a job."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from models import TP, Toy, distribute, fill, full, make, values
from processes import Job, run_jobs

import weightbus


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def check_target(target, version):
    state = full(target)
    for name, value in values(version).items():
        assert torch.equal(bits(state[name]), bits(value.to(state[name].dtype))), f"version {version}: {name}"


def children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


PLACES = [
    ("cpu", "cpu"),
    pytest.param("cuda:0", "cuda:0", marks=pytest.mark.cuda),
    pytest.param("cpu", "cuda:0", marks=pytest.mark.cuda),
    pytest.param("cuda:0", "cpu", marks=pytest.mark.cuda),
    pytest.param("cuda:0", "cuda:1", marks=pytest.mark.gpus(2)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("src", "dst"), PLACES)
def test_one_process(src, dst, dtype):
    source, target = Toy().to(src), Toy(dtype).to(dst)
    before, addresses = children(), [tensor.data_ptr() for tensor in target.parameters()]
    seen = []
    with weightbus.colocate(source, target, on_update=seen.append, on_commit=seen.append) as pair:
        assert (pair.state, pair.version, pair.error) == ("empty", None, None)
        for version in (1, 2, 3):
            fill(source, values(version))
            report = pair.update(version)
            assert (report.word, report.route, report.version) == ("verified", "local", version)
            assert (report.trainers, report.servers, report.tensors) == (1, 1, len(values(0)))
            check_target(target, version)
            assert (pair.state, pair.version) == ("ready", version)
        assert children() == before  # no hub
        fill(source, values(9))
        assert pair.check().word == "verified"  # the source has moved on
        with torch.no_grad():
            target.up.weight[3, 4] += 1
        verdict = pair.check()
        assert (verdict.word, [found.tensor for found in verdict.mismatches]) == ("mismatch", ["up.weight"])
        assert pair.update(4, verify=False).word == "unverified"
        check_target(target, 9)
        with pytest.raises(weightbus.UpdateError, match="version 4: expected one above 4"):
            pair.update(4)
    assert seen == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [tensor.data_ptr() for tensor in target.parameters()] == addresses


def test_pairs_side_by_side():
    """Several in one process; sources may be iterators of pairs."""
    targets = [[("w", torch.zeros(5))] for _ in range(2)]
    pairs = [
        weightbus.colocate(iter([("w", torch.full((5,), float(i)))]), target)
        for i, target in enumerate(targets, 1)
    ]
    for pair in pairs:
        assert pair.update(0).word == "verified"
        pair.close()
    assert [target[0][1].tolist() for target in targets] == [[1.0] * 5, [2.0] * 5]


def test_only_some_modules():
    source, target = ({name: torch.nn.Linear(3, 2) for name in ("one", "two")} for _ in range(2))
    kept = target["two"].weight.clone()
    with weightbus.colocate(source, target) as pair:
        assert pair.update(1, modules=["one"]).word == "verified"
        assert torch.equal(target["one"].weight, source["one"].weight)
        assert torch.equal(target["two"].weight, kept)
        assert pair.update(2).word == "verified"
        assert torch.equal(target["two"].weight, source["two"].weight)


def test_a_refusal_writes_nothing_and_a_failing_hook_tears():
    parameter = torch.nn.Parameter(torch.zeros(4))
    broken = [True]

    def load(param, loaded):
        if broken[0] and not loaded.is_meta:
            raise ValueError("out of order")
        param.data.copy_(loaded)

    parameter.weight_loader = load
    source, target = [("w", torch.ones(4)), ("v", torch.ones(3))], [("w", parameter), ("v", torch.zeros(3))]
    torn = []
    with weightbus.colocate(source, [*target, ("x", torch.zeros(1))]) as pair:
        with pytest.raises(weightbus.UpdateError, match="x: missing name"):
            pair.update(1)
        assert (pair.state, target[1][1].tolist()) == ("empty", [0.0] * 3)
        assert "x: missing name" in str(pair.error)
    with weightbus.colocate(source, target, on_torn=lambda error: torn.append(str(error))) as pair:
        with pytest.raises(weightbus.TornError, match="w: weight_loader of w raised ValueError: out of order"):
            pair.update(1)
        assert pair.state == "torn"
        assert len(torn) == 1
        broken[0] = False
        assert pair.update(1).word == "verified"
        assert (pair.state, parameter.tolist()) == ("ready", [1.0] * 4)


def test_storage_that_moves_is_noticed():
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    with weightbus.colocate(source, target) as pair:
        pair.update(1)
        source.weight.data = torch.full((2, 3), 7.0)
        target.bias.data = torch.zeros(2)
        assert pair.update(2).word == "verified"
        assert torch.equal(target.weight, source.weight)
        assert torch.equal(target.bias, source.bias)


def ranks(rank, size, *, device, dtype):
    source = make("fsdp2", rank, size, device)
    mesh = torch.distributed.device_mesh.init_device_mesh(device, (size,))
    target = distribute(Toy(dtype).to(device), mesh, TP)
    found = []
    with weightbus.colocate(source, target, join_timeout_s=30) as pair:
        for version in (1, 2):
            fill(source, values(version))
            report = pair.update(version)
            found.append((report.word, report.route, pair.check().word, pair.state))
            check_target(target, version)
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp2_to_tensor_parallel_over_the_same_ranks(device, dtype):
    """What has to be cast is cast as it is copied."""
    (found,) = run_jobs(Job(run=ranks, size=2, arguments={"device": device, "dtype": dtype}))
    assert found == [[("verified", "peer", "verified", "ready")] * 2] * 2


def without_a_group(rank, size):
    with pytest.raises(weightbus.SpecError, match="address: expected one, or a default process group"):
        weightbus.colocate([("w", torch.ones(2))], [("w", torch.zeros(2))])


def test_ranks_need_a_way_to_agree():
    run_jobs(Job(run=without_a_group, size=2))
