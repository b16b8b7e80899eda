"""``colocate(...).update(wait=False)``: the source is copied at once, the target is written later."""

from __future__ import annotations

import pytest
import torch
from models import TP, Toy, distribute, fill, full, make, values
from processes import Job, run_jobs

import weightbus

PLACES = [
    ("cpu", "cpu", "device"),
    pytest.param("cuda:0", "cuda:0", "device", marks=pytest.mark.cuda),
    pytest.param("cuda:0", "cuda:0", "host", marks=pytest.mark.cuda),
    pytest.param("cuda:0", "cpu", "device", marks=pytest.mark.cuda),
]


def bits(tensor):
    return tensor.cpu().reshape(-1).view(torch.uint8)


def check_target(target, version):
    state = full(target)
    for name, value in values(version).items():
        assert torch.equal(bits(state[name]), bits(value.to(state[name].dtype))), f"version {version}: {name}"


def copied(pair):
    """The dtypes of the copy, by name."""
    parts = pair._publisher._origin._frozen.parts
    return {name: held[0].tensor.dtype for name, held in parts.items() if held}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("src", "dst", "where"), PLACES)
def test_the_target_is_written_when_it_is_told_to(src, dst, where, dtype):
    source, target = Toy().to(src), Toy(dtype).to(dst)
    seen = []
    with weightbus.colocate(
        source, target, copy_to=where, on_update=seen.append, on_commit=seen.append
    ) as pair:
        assert pair.poll() is None
        fill(source, values(1))
        assert pair.update(1).word == "verified"
        for version in (2, 3, 4):
            fill(source, values(version))
            pending = pair.update(version, wait=False)
            fill(source, values(100 + version))  # the trainer goes on
            check_target(target, version - 1)
            assert (pending.done, pair.version, pair.state) == (False, version - 1, "ready")
            assert seen == [v for v in range(1, version) for _ in range(2)]
            report = pair.poll() if version == 3 else pending.result()
            assert (report.word, report.version, pair.version) == ("verified", version, version)
            assert pending.done
            assert pending.result() is report
            assert pair.poll() is None
            check_target(target, version)
            assert pair.check().word == "verified"
            assert copied(pair)["up.weight"] == dtype
        assert pair.update(wait=False).result().version == 5
        fill(source, values(6))
        assert pair.update(6).word == "verified"
        check_target(target, 6)
    assert seen == [v for v in range(1, 7) for _ in range(2)]


def test_the_first_copy_has_the_dtypes_of_the_source_and_later_ones_the_narrower_ones_of_the_target():
    source = [("w", torch.randn(4, 8)), ("n", torch.arange(3)), ("wide", torch.randn(5, dtype=torch.bfloat16))]
    target = [
        ("w", torch.zeros(4, 8).bfloat16()),
        ("n", torch.zeros(3, dtype=torch.int64)),
        ("wide", torch.zeros(5)),
    ]
    with weightbus.colocate(source, target) as pair:
        found = []
        for version in (1, 2):
            assert pair.update(version, wait=False).result().word == "verified"
            found.append(copied(pair))
            assert all(torch.equal(a.to(b.dtype), b) for (_, a), (_, b) in zip(source, target, strict=True))
    same = {"n": torch.int64, "wide": torch.bfloat16}
    assert found == [{"w": torch.float32, **same}, {"w": torch.bfloat16, **same}]


def test_a_tied_tensor_that_is_wanted_in_two_dtypes_is_copied_as_it_is():
    source = torch.nn.Module()
    source.a = source.b = torch.nn.Parameter(torch.randn(6, 4))
    target = [("a", torch.zeros(6, 4).bfloat16()), ("b", torch.zeros(6, 4))]
    with weightbus.colocate(source, target) as pair:
        for version in (1, 2):
            assert pair.update(version, wait=False).result().word == "verified"
            assert copied(pair) == {"a": torch.float32}
            assert torch.equal(target[1][1], source.b)
            assert torch.equal(target[0][1], source.a.bfloat16())


def test_a_target_that_takes_another_dtype_refuses_a_copy_that_was_cast_for_it_once():
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).bfloat16()
    with weightbus.colocate(source, target) as pair:
        pair.update(1)
        target.weight.data = torch.zeros(2, 3)
        with pytest.raises(
            weightbus.UpdateError, match="weight: expected server ranks to take bfloat16 as before"
        ):
            pair.update(2, wait=False).result()
        assert not target.weight.any()
        assert pair.update(2, wait=False).result().word == "verified"
        assert torch.equal(target.weight, source.weight)


def test_only_some_modules():
    source, target = ({name: torch.nn.Linear(3, 2) for name in ("one", "two")} for _ in range(2))
    kept = target["two"].weight.clone()
    with weightbus.colocate(source, target) as pair:
        assert pair.update(1, modules=["one"], wait=False).result().word == "verified"
        assert torch.equal(target["one"].weight, source["one"].weight)
        assert torch.equal(target["two"].weight, kept)


def test_errors_are_told_once_by_callbacks_and_each_time_by_the_result():
    source, target = [("w", torch.ones(4))], [("w", torch.zeros(4)), ("x", torch.zeros(1))]
    seen = []
    with weightbus.colocate(
        source, target, on_update=seen.append, on_refused=lambda error: seen.append("refused")
    ) as pair:
        pending = pair.update(1, wait=False)
        for _ in range(2):
            with pytest.raises(weightbus.UpdateError, match="x: missing name"):
                pending.result()
        assert (pair.state, pair.version, pair.poll()) == ("empty", None, None)
        assert "x: missing name" in str(pair.error)
    assert seen.count("refused") == 1
    parameter = torch.nn.Parameter(torch.zeros(4))
    broken = [True]

    def load(param, loaded):
        if broken[0] and not loaded.is_meta:
            raise ValueError("out of order")
        param.data.copy_(loaded)

    parameter.weight_loader = load
    torn = []
    with weightbus.colocate(source, [("w", parameter)], on_torn=lambda error: torn.append(str(error))) as pair:
        pair.update(1, wait=False)
        with pytest.raises(weightbus.TornError, match="out of order"):
            pair.poll()
        assert (pair.state, len(torn)) == ("torn", 1)
        broken[0] = False
        assert pair.update(1, wait=False).result().word == "verified"
        assert (pair.state, len(torn)) == ("ready", 1)
        with pytest.raises(weightbus.UpdateError, match="version 1: expected one above 1"):
            pair.update(1, wait=False).result()


def test_one_at_a_time_and_none_after_the_end():
    source, target = [("w", torch.ones(4))], [("w", torch.zeros(4))]
    with weightbus.colocate(source, target) as pair:
        pending = pair.update(1, wait=False)
        for wait in (True, False):
            with pytest.raises(weightbus.UpdateError, match="expected the last one to be written first"):
                pair.update(2, wait=wait)
    assert pending.done
    with pytest.raises(weightbus.UpdateError, match="closed before"):
        pending.result()
    assert not target[0][1].any()


def ranks(rank, size, *, device, dtype):
    source = make("fsdp2", rank, size, device)
    mesh = torch.distributed.device_mesh.init_device_mesh(device, (size,))
    target = distribute(Toy(dtype).to(device), mesh, TP)
    found = []
    with weightbus.colocate(source, target, join_timeout_s=30) as pair:
        for version in (1, 2, 3):
            fill(source, values(version))
            pending = pair.update(version, wait=False)
            fill(source, values(100 + version))
            report = pair.poll()
            found.append((report.word, report is pending.result(), pair.check().word))
            check_target(target, version)
        found.append(copied(pair)["up.weight"] == dtype)
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_the_ranks_of_a_job(device, dtype):
    (found,) = run_jobs(Job(run=ranks, size=2, arguments={"device": device, "dtype": dtype}))
    assert found == [[("verified", True, "verified")] * 3 + [True]] * 2
