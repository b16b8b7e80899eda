"""What is live is what loading the checkpoint gives; else it is named, and nothing is written."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightbus
from weightbus.errors import SpecError


class Experts(nn.Module):
    """Fused on loading, from tensors one by one."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 4, bias=False)
        self.experts = nn.Parameter(torch.zeros(3, 4, 4), requires_grad=False)
        self.fused = nn.Parameter(torch.zeros(6, 4), requires_grad=False)
        self.register_buffer("scale", torch.ones(2), persistent=True)

    def load_weights(self, weights):
        found = dict(weights)
        for name in ("gate.weight", "scale"):
            self.get_buffer(name).copy_(found[name]) if name == "scale" else self.gate.weight.data.copy_(
                found[name]
            )
        for i in range(3):
            self.experts.data[i].copy_(found[f"experts.{i}"])
        self.fused.data.copy_(torch.cat([found["q"], found["k"]]))


class Computes(Experts):
    """Loading code that can't be traced, and packs what it has loaded."""

    def load_weights(self, weights):
        super().load_weights((name, tensor * 1) for name, tensor in weights)
        self.experts.data.copy_(self.experts.data.flip(0).clone())


FILES = {
    "gate.weight": (4, 4),
    "scale": (2,),
    **{f"experts.{i}": (4, 4) for i in range(3)},
    "q": (4, 4),
    "k": (2, 4),
}


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(3)
    tensors = {name: torch.randn(shape) for name, shape in FILES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, tensors


def loaded(kind, tensors, dtype=torch.float32):
    engine = kind().to(dtype)
    with torch.no_grad():
        engine.load_weights((name, tensor.to(dtype)) for name, tensor in tensors.items())
    return engine


def held(engine):
    return {name: tensor.clone() for name, tensor in engine.state_dict().items()}


def open_with(engine, tensors, **options):
    weightbus.colocate(list(tensors.items()), engine, **options).close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_loaded_passes_and_is_not_written(checkpoint, dtype):
    path, tensors = checkpoint
    engine = loaded(Experts, tensors, dtype)
    before, snapshot = held(engine), weightbus.snapshot(engine)
    open_with(engine, tensors, baseline=path)
    open_with(engine, tensors, baseline=lambda: loaded(Experts, tensors, dtype))
    assert snapshot.compare(engine).none
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.state_dict().items())


def flip_bit(engine):
    engine.fused.data.view(torch.uint8).view(-1)[41] ^= 4


STEPS = {
    "experts permuted": (lambda e: e.experts.data.copy_(e.experts.data[[1, 2, 0]].clone()), "experts"),
    "two experts swapped": (lambda e: e.experts.data.copy_(e.experts.data[[0, 2, 1]].clone()), "experts"),
    "square matrix transposed": (
        lambda e: e.gate.weight.data.copy_(e.gate.weight.data.t().clone()),
        "gate.weight",
    ),
    "halves swapped": (lambda e: e.fused.data.copy_(e.fused.data.roll(3, 0).clone()), "q|k|fused"),
    "scaled": (lambda e: e.scale.mul_(2), "scale"),
    "one bit": (flip_bit, "q|k|fused"),
}


@pytest.mark.parametrize("form", ["files", "function"])
@pytest.mark.parametrize("step", STEPS)
def test_what_a_step_after_loading_has_changed_is_named(checkpoint, step, form):
    path, tensors = checkpoint
    engine = loaded(Experts, tensors)
    change, name = STEPS[step]
    change(engine)
    before = held(engine)
    baseline = path if form == "files" else lambda: loaded(Experts, tensors)
    with pytest.raises(SpecError, match=rf"({name})\S*: expected what loading .* elements otherwise"):
        open_with(engine, tensors, baseline=baseline)
    assert all(torch.equal(before[key], tensor) for key, tensor in engine.state_dict().items())


def test_all_that_differs_is_named(checkpoint):
    path, tensors = checkpoint
    engine = loaded(Experts, tensors)
    engine.scale.mul_(2)
    engine.gate.weight.data.neg_()
    with pytest.raises(SpecError, match=r"gate.weight: .*also scale: 2 of 2"):
        open_with(engine, tensors, baseline=path)


def test_loading_code_that_computes_needs_a_function(checkpoint):
    path, tensors = checkpoint
    engine = loaded(Computes, tensors)
    with pytest.raises(SpecError, match="baseline: expected a function"):
        open_with(engine, tensors, baseline=path)
    open_with(engine, tensors, baseline=lambda: loaded(Computes, tensors))
    engine.experts.data[0].zero_()
    with pytest.raises(SpecError, match="experts: expected"):
        open_with(engine, tensors, baseline=lambda: loaded(Computes, tensors))


def test_packed_copies_are_compared_with_a_fresh_model(checkpoint):
    _, tensors = checkpoint

    def make():
        engine = loaded(Experts, tensors)
        engine.packed = [engine.gate.weight.detach().t().contiguous()]
        return engine

    engine = make()
    open_with(engine, tensors, baseline=make)
    engine.packed[0][1, 2] += 1
    with pytest.raises(SpecError, match=r"packed\[0\]: expected what loading a fresh model gives, got 1 of 16"):
        open_with(engine, tensors, baseline=make)
    open_with(engine, tensors, baseline=make, local=["packed[[]0]"])


def test_files_of_another_model(checkpoint, tmp_path):
    _, tensors = checkpoint
    engine = loaded(Experts, tensors)
    lacking = copy.copy(tensors)
    del lacking["q"]
    (tmp_path / "other").mkdir()
    save_file(lacking, tmp_path / "other" / "model.safetensors")
    with pytest.raises(SpecError, match="KeyError: 'q'"):
        open_with(engine, tensors, baseline=tmp_path / "other")


def test_plain_parameters_and_hooks(tmp_path):
    model = nn.Module()
    model.qkv = nn.Parameter(torch.zeros(6, 4), requires_grad=False)
    model.norm = nn.Parameter(torch.zeros(4), requires_grad=False)

    def loader(parameter, weight, shard):
        at = {"q": 0, "k": 2, "v": 4}[shard]
        parameter.data[at : at + 2].copy_(weight)

    model.qkv.weight_loader = loader
    tensors = {name: torch.randn(2, 4) for name in "qkv"} | {"norm": torch.randn(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    name_map = {name: ("qkv", name) for name in "qkv"}
    for name in "qkv":
        loader(model.qkv, tensors[name], name)
    model.norm.data.copy_(tensors["norm"])
    open_with(model, tensors, baseline=tmp_path, name_map=name_map)
    model.qkv.data.copy_(model.qkv.data.roll(2, 0).clone())
    with pytest.raises(SpecError, match=r"k: expected what loading .*also q: .*v: "):
        open_with(model, tensors, baseline=tmp_path, name_map=name_map)
