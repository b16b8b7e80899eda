"""The audit names what an engine goes on computing with after an update: one planted fault of each kind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from processes import run_python
from safetensors.torch import load_file, save_file
from torch import nn

import weightbus

D, EXPERTS = 8, 4


class Engine(nn.Module):
    """A small model that is loaded by ``load_weights`` and then has a step of its own, as engines do."""

    def __init__(self):
        super().__init__()
        for name in ("q", "k", "v", "up"):
            self.add_module(name, nn.Linear(D, D, bias=False))
        self.norm = nn.LayerNorm(D)
        self.experts = nn.Parameter(torch.empty(EXPERTS, D, D))

    def load_weights(self, weights):
        own = dict(self.named_parameters())
        for name, tensor in weights:
            if name.startswith("experts."):
                own["experts"].data[int(name.split(".")[1])].copy_(tensor)
            else:
                own[name].data.copy_(tensor)

    def process_weights_after_loading(self):
        pass


class CachedTranspose(Engine):
    def process_weights_after_loading(self):
        self.up_t = self.up.weight.data.t().contiguous()


class OnePlus(Engine):
    def process_weights_after_loading(self):
        self.norm.scale = 1 + self.norm.weight.data


class StaleFused(Engine):
    def process_weights_after_loading(self):
        self.qkv = torch.cat([one.weight.data for one in (self.q, self.k, self.v)])


class SkippedName(Engine):
    """What is asked for by a name that it does not expect is left out, with a warning, once it serves."""

    serving = False

    def load_weights(self, weights):
        super().load_weights((n, t) for n, t in weights if not (self.serving and n == "k.weight"))

    def process_weights_after_loading(self):
        self.serving = True


class PermutedExperts(Engine):
    """Load balancing has moved the experts; what loads them goes by their first places."""

    def process_weights_after_loading(self):
        self.places = torch.arange(EXPERTS).flip(0)
        self.experts.data.copy_(self.experts.data[self.places])


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(1)
    model = Engine()
    tensors = {name: torch.randn(p.shape) for name, p in model.named_parameters() if name != "experts"}
    tensors |= {f"experts.{e}.weight": torch.randn(D, D) for e in range(EXPERTS)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def loading(kind):
    def load(path):
        torch.manual_seed(2)
        model = kind()
        model.load_weights(load_file(path / "model.safetensors").items())
        model.process_weights_after_loading()
        return model

    return load


def test_a_sound_engine(checkpoint):
    before = (checkpoint / "model.safetensors").read_bytes()
    report = weightbus.audit(loading(Engine), checkpoint)
    assert report.ok, report
    assert (report.word, report.compared) == ("verified", 7)
    assert (checkpoint / "model.safetensors").read_bytes() == before


FAULTS = [
    (CachedTranspose, {"up_t"}),
    (OnePlus, {"norm.scale"}),
    (StaleFused, {"qkv"}),
    (PermutedExperts, {"experts"}),
]


@pytest.mark.parametrize(("kind", "names"), FAULTS, ids=[kind.__name__ for kind, _ in FAULTS])
def test_a_planted_fault_is_named(kind, names, checkpoint):
    report = weightbus.audit(loading(kind), checkpoint)
    assert set(report.differ) == names, report
    assert not report.ok
    assert all(name in str(report) for name in names)


def test_a_skipped_name_is_refused_by_name(checkpoint):
    report = weightbus.audit(loading(SkippedName), checkpoint)
    assert not report.ok
    assert "k.weight" in report.refused


def test_a_skipped_name_that_is_declared_local_is_named_all_the_same(checkpoint):
    report = weightbus.audit(loading(SkippedName), checkpoint, local=["k.weight"])
    assert set(report.differ) == {"k.weight"}, report


@pytest.mark.parametrize(
    ("kind", "derived"),
    [
        (CachedTranspose, {"up_t": lambda engine: engine.up.weight.data.t().contiguous()}),
        (OnePlus, {"norm.scale": lambda norm: 1 + norm.weight.data}),
        (StaleFused, ["qkv"]),
    ],
    ids=["transpose", "one plus", "its own step"],
)
def test_what_is_declared_as_derived_is_sound(kind, derived, checkpoint):
    report = weightbus.audit(loading(kind), checkpoint, derived=derived)
    assert report.ok, report


def test_what_differs_between_loads_is_not_said_to_be_sound(checkpoint):
    class Drawn(Engine):
        def process_weights_after_loading(self):
            self.noise = torch.rand(3, generator=torch.Generator().manual_seed(id(self)))

    kept = []  # so that no two have one id

    def load(path):
        kept.append(loading(Drawn)(path))
        return kept[-1]

    report = weightbus.audit(load, checkpoint)
    assert (report.differ, report.unstable) == ({}, ("noise",))
    assert not report.ok


def test_the_command(checkpoint, tmp_path):
    for kind, status in (("Engine", 0), ("OnePlus", 1)):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
        factory = f"test_audit:load_{kind}"
        found = run_python("-m", "weightbus", "audit", factory, checkpoint, env=env)
        assert found.returncode == status, found.stderr
        assert ("norm.scale" in found.stdout) == bool(status), found.stdout


load_Engine, load_OnePlus = loading(Engine), loading(OnePlus)


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_checkpoint_that_is_none_is_named_as_it_was_given(tmp_path, kind):
    """Before the engine's model is made of it."""
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()

    def load(directory):
        pytest.fail("nothing is to be loaded")

    with pytest.raises(weightbus.SpecError, match=str(path)):
        weightbus.audit(load, path)
