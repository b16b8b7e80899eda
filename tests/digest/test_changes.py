"""Snapshots: what has changed is named, and nothing else; and an update proven by a round trip."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import Toy, fill, make, values
from processes import Job, run_jobs
from torch import nn

import weightbus
from weightbus.digest import Digester

SEED = bytes(range(32))


def toy(version: int = 1) -> Toy:
    model = Toy()
    fill(model, values(version))
    return model


def test_nothing_has_changed() -> None:
    model = toy()
    changes = weightbus.snapshot(model).compare(model)
    assert changes.none
    assert changes.empty == ("empty",)
    assert set(changes.unchanged) == set(values(1)) - {
        "empty"
    }  # head.weight is embed.weight, and once in values
    assert str(changes) == f"0 of {len(changes.unchanged)} tensors changed"


def test_one_bit_of_one_tensor() -> None:
    model = toy()
    before = weightbus.snapshot(model)
    with torch.no_grad():
        model.big.view(torch.int32)[611, 7] ^= 1
        model.mask[4].logical_not_()
    changes = before.compare(model)
    assert changes.changed == ("big", "mask")
    assert not changes.none
    assert str(changes) == f"2 of {len(changes.unchanged) + 2} tensors changed: big, mask"


def test_a_tied_tensor_is_named_once() -> None:
    model = toy()
    before = weightbus.snapshot(model)
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    assert before.compare(model).changed == ("embed.weight",)


def test_a_tie_that_was_cut() -> None:
    """Equal values under both names are no change; other values under one of them are."""
    model = toy()
    before = weightbus.snapshot(model)
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    assert before.compare(model).none
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    assert before.compare(model).changed == ("head.weight",)


def test_other_names_dtypes_and_shapes() -> None:
    model = toy()
    before = weightbus.snapshot(model)
    model.up.weight = nn.Parameter(model.up.weight.detach().bfloat16())
    model.register_buffer("steps", torch.zeros(4, dtype=torch.int64))
    del model.phase
    model.register_buffer("late", torch.ones(2))
    changes = before.compare(model)
    assert changes.respecified == {
        "steps": ("int64[3]", "int64[4]"),
        "up.weight": ("float32[50, 24]", "bfloat16[50, 24]"),
    }
    assert (changes.missing, changes.unexpected, changes.changed) == (("phase",), ("late",), ())
    assert str(changes).splitlines()[1:] == [
        "  steps: expected int64[3], got int64[4]",
        "  up.weight: expected float32[50, 24], got bfloat16[50, 24]",
        "  1 missing: phase",
        "  1 unexpected: late",
    ]


def test_zeros_are_told_from_zeros_of_another_shape() -> None:
    """All have sums 0."""
    before = weightbus.snapshot([("a", torch.zeros(2, 3)), ("b", torch.zeros(6))])
    changes = before.compare([("a", torch.zeros(6)), ("b", torch.zeros(6))])
    assert (changes.respecified, changes.unchanged) == ({"a": ("float32[2, 3]", "float32[6]")}, ("b",))


def test_mappings_pairs_and_two_snapshots() -> None:
    modules = {"vae": nn.Linear(3, 4), "text": nn.Linear(2, 2)}
    first = weightbus.snapshot(modules, seed=SEED)
    with torch.no_grad():
        modules["vae"].bias += 1
    second = weightbus.snapshot(modules, seed=SEED)
    assert weightbus.compare(first, second).changed == ("vae.bias",)
    pairs = [
        (f"{top}.{name}", tensor)
        for top, module in modules.items()
        for name, tensor in module.named_parameters()
    ]
    assert second.compare(pairs).none


def test_buffers_that_are_not_persistent() -> None:
    model = toy()
    before, every = weightbus.snapshot(model), weightbus.snapshot(model, persistent_only=False)
    model.scratch += 1
    assert before.compare(model).none
    assert every.compare(model).changed == ("scratch",)


def test_seeds() -> None:
    model = toy()
    first, second = weightbus.snapshot(model), weightbus.snapshot(model)
    assert first.seed != second.seed
    assert first.digests["big"].sums != second.digests["big"].sums
    with pytest.raises(weightbus.SpecError, match="differ in the seed"):
        first.compare(second)
    with pytest.raises(weightbus.SpecError, match="differ in persistent_only"):
        weightbus.compare(first, weightbus.snapshot(model, seed=first.seed, persistent_only=False))
    with pytest.raises(ValueError, match="32 bytes"):
        weightbus.snapshot(model, seed=b"short")
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.seed = SEED  # type: ignore[misc]


def test_one_call_digests_all(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    sums = Digester.sums
    monkeypatch.setattr(Digester, "sums", lambda self, *a, **k: calls.append(self) or sums(self, *a, **k))
    weightbus.snapshot(toy())
    assert len(calls) == 1


def on_shards(rank, size):
    model = make("fsdp2-tp", rank, size)
    fill(model, values(1))
    before = weightbus.snapshot(model)
    assert before.compare(model).none
    if rank == 2:
        with torch.no_grad():
            model.big._local_tensor[0, 0] += 1
    changes = before.compare(model)
    twin = make_plain()
    respecified = before.compare(twin).respecified
    return changes.changed, changes.empty, respecified.get("big")


def make_plain():
    model = Toy()
    fill(model, values(1))
    return model


def test_shards() -> None:
    (ranks,) = run_jobs(Job(run=on_shards, size=4))
    assert [changed for changed, _, _ in ranks] == [(), (), ("big",), ()]
    assert all("empty" in empty for _, empty, _ in ranks)
    # norm has three rows over four ranks: some ranks hold none of it.
    assert [("norm.weight" in empty) for _, empty, _ in ranks].count(True) >= 1
    assert ranks[0][2][0].startswith("float32[700, 600] at [")
    assert ranks[0][2][1] == "float32[700, 600]"


def trainer(rank, size, *, address):
    model = make("fsdp2", rank, size)
    fill(model, values(1))
    with weightbus.Publisher(model, address=address, join_timeout_s=30) as publisher:
        return [publisher.update(version).word for version in (1, 2)]


def server(rank, size, *, address):
    model = make("tp", rank, size)
    seen = []

    def committed(version):
        if version == 1:
            seen.append(weightbus.snapshot(model))
            weightbus.perturb(model)
        seen.append(seen[0].compare(model))

    with weightbus.Subscriber(model, address=address, on_commit=committed) as subscriber:
        subscriber.serve()
    _, perturbed, updated = seen
    return perturbed.changed, perturbed.unchanged, str(updated), updated.none


def test_a_round_trip(address) -> None:
    """Perturbed, every element that an update does not write would show: after the update, none does."""
    trainers, servers = run_jobs(
        Job(run=trainer, size=2, arguments={"address": address}),
        Job(run=server, size=2, arguments={"address": address}),
    )
    assert trainers == [["verified", "verified"]] * 2
    for changed, unchanged, text, same in servers:
        assert unchanged == ()
        assert len(changed) >= len(values(1)) - 2  # but "empty", and what a rank holds no row of
        assert same, text
