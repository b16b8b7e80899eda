"""Modules with ``load_weights``: traced as a whole, and written where that would write."""

from __future__ import annotations

import pytest
import torch
from engine import Engine, drawn, name_map, nested
from models import fill, join_world
from processes import Job, run_jobs
from torch import nn
from torch.distributed.fsdp import fully_shard

import weightbus
from weightbus.errors import SpecError
from weightbus.memory.shard import plain_view
from weightbus.planning.box import Box
from weightbus.planning.spec import Spec
from weightbus.tensors.install import Target
from weightbus.tensors.layout import layout_of
from weightbus.tensors.loaders.hook import load_weights_hooks


class Loading(Engine):
    """Loads as vLLM's models do: one method for all tensors, with rules that rewrite names."""

    def __init__(self, rank, size, quirk=""):
        super().__init__(rank, size, None)
        self.quirk, self.calls = quirk, []
        self.register_parameter("temperature", nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)))

    def load_weights(self, weights):
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if not tensor.is_meta:
                self.calls.append(name)
            if name.endswith("inv_freq"):
                continue
            mapped = name if name == "temperature" else name_map(name)
            target, *arguments = (mapped,) if isinstance(mapped, str) else mapped
            parameter = parameters[target]
            getattr(parameter, "weight_loader", self.load_sharded)(parameter, tensor, *arguments)
        if self.quirk == "absorbs":
            self.absorbed = parameters["layers.0.o"] @ parameters["layers.0.o"].t()

    def load_sharded(self, parameter, tensor):
        if tensor.numel() == 1 and self.quirk == "item":
            parameter.data.fill_(tensor.item())
            return
        axis = next((a for a, n in enumerate(parameter.shape) if n != tensor.shape[a]), None)
        if axis is not None:
            tensor = tensor.chunk(self.size, axis)[self.rank]
        parameter.data.copy_(tensor.to(parameter.dtype))


def weights(version):
    return {**drawn(version), "temperature": torch.full((1,), version / 7)}


def manifest(extra=()):
    names = {**{name: tuple(tensor.shape) for name, tensor in weights(0).items()}, **dict(extra)}
    return {name: Spec(name=name, dtype="float32", shape=shape) for name, shape in names.items()}


def hooks_of(model, specs):
    given = {name: (name, spec) for name, spec in specs.items()}
    return load_weights_hooks("load_weights of it", model, given, dict(model.named_parameters()), traces={})


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (3, 4)])
def test_boxes_are_what_the_module_loads(rank, size):
    """Element by element: numbered tensors through the real method, and through the boxes that were traced."""
    model, boxes = Loading(rank, size).float(), Loading(rank, size).float()
    numbered, first = {}, 1
    for name, spec in manifest().items():
        numbered[name] = torch.arange(first, first + spec.elements, dtype=torch.float32).view(spec.shape)
        first += spec.elements
    hooks, loading = hooks_of(boxes, manifest())
    assert boxes.calls == []
    assert loading.opaque == {}
    assert all(parameter.eq(0).all() for parameter in boxes.parameters()), "tracing writes nothing"
    with torch.no_grad():
        model.load_weights(numbered.items())
    parameters = {name: plain_view(p) for name, p in boxes.named_parameters()}
    count = {name: torch.zeros(p.shape) for name, p in parameters.items()}
    for wire, hook in hooks.items():
        for name, effect in hook.known.items():
            for piece in effect.pieces:
                piece.view.of(parameters[name]).copy_(
                    numbered[wire][piece.box.within(Box.whole(numbered[wire].shape))]
                )
                count[name][piece.target.within(Box.whole(count[name].shape))] += 1
    for name, effect in loading.effects.items():
        for one in effect.fills:
            count[name][one.target.within(Box.whole(count[name].shape))] += 1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameters[name], parameter.detach()), name
        assert torch.equal(count[name], torch.ones_like(count[name])), name


def test_the_sender_casts_to_what_the_loader_casts_to():
    _, loading = hooks_of(Loading(0, 2), manifest())
    assert set(loading.dtypes.values()) == {"bfloat16"}


def test_one_tensor_that_is_looked_at_is_opaque_alone():
    hooks, loading = hooks_of(Loading(0, 2, "item"), manifest())
    assert list(loading.opaque) == ["temperature"]
    assert "load_weights of it can't be traced: it asks for values, by item" in hooks["temperature"].opaque
    assert all(hook.known for wire, hook in hooks.items() if wire != "temperature")


def test_a_computation_at_the_end_makes_all_opaque():
    hooks, loading = hooks_of(Loading(0, 2, "absorbs"), manifest())
    assert loading.opaque.keys() == hooks.keys() == manifest().keys()
    assert all(
        "computes with weights, by aten.t" in hook.opaque or "aten.mm" in hook.opaque for hook in hooks.values()
    )


def test_what_it_skips_is_not_taken():
    hooks, _ = hooks_of(Loading(0, 2), manifest({"layers.0.inv_freq": (4,)}.items()))
    assert "layers.0.inv_freq" not in hooks


class Replaces(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 4))

    def load_weights(self, weights):
        for _, tensor in weights:
            self.w = nn.Parameter(tensor)


class Partial(Replaces):
    def load_weights(self, weights):
        for _, tensor in weights:
            self.w.data[:2].copy_(tensor[:2])


def test_a_module_that_replaces_its_parameters_is_left_alone():
    module = Replaces()
    kept = module.w
    with pytest.raises(SpecError, match="it replaces a parameter"):
        hooks_of(module, {"w": Spec(name="w", dtype="float32", shape=(3, 4))})
    assert module.w is kept


def target_of(module, specs, **options):
    return Target(
        layout_of(module),
        None,
        specs,
        name_map=None,
        loaders={"": module},
        traces={},
        **{"local": (), **options},
    )


class FromDisk(Replaces):
    def load_weights(self, path):
        return open(path)


class Checkpoint(Replaces):
    def load_weights(self, weights):
        self.state = weights


@pytest.mark.parametrize("kind", [FromDisk, Checkpoint])
def test_a_method_that_takes_something_else_is_left_alone(kind):
    specs = {"w": Spec(name="w", dtype="float32", shape=(3, 4))}
    target = target_of(kind(), specs)
    assert (target.hooks, list(target.parts)) == ({}, ["w"])


def test_elements_that_it_leaves_out_are_an_error_unless_declared():
    specs = {"w": Spec(name="w", dtype="float32", shape=(3, 4))}
    with pytest.raises(
        SpecError, match=r"expected load_weights to write all 12 elements .* got 8 .*\[2:3, 0:4\]"
    ):
        target_of(Partial(), specs)
    assert target_of(Partial(), specs, local=["w"]).exempt == {"w": "local"}
    assert target_of(Partial(), specs, derived=["*"]).exempt == {"w": "derived"}


def test_all_names_that_nothing_feeds_are_listed():
    model = Loading(0, 2)
    specs = {name: spec for name, spec in manifest().items() if name not in ("norm", "layers.1.o")}
    with pytest.raises(SpecError, match=r"layers.1.o: missing name: .*; the same for norm"):
        target_of(model, specs)


# -- real processes --------------------------------------------------------------------------------


def trainer(rank, size, *, address):
    mesh = join_world(rank, size, "cpu")
    model = nested(weights(1))
    fully_shard(model, mesh=mesh)
    found = []
    with weightbus.Publisher(model, address=address, bucket_bytes=1 << 15, join_timeout_s=60) as publisher:
        for version in (1, 2):
            fill(model, weights(version))
            report = publisher.update(version)
            verdict = publisher.check()
            found.append((report.word, dict(report.partial), verdict.word, verdict.mismatches))
    return found


def server(rank, size, *, address, quirk):
    model = Loading(rank, size, quirk)
    states = []

    def committed(version):
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if (version, rank) == (2, 1):
            model.at("layers.0.up")[0][4, 5] += 1

    with weightbus.Subscriber(model, address=address, on_commit=committed) as subscriber:
        subscriber.serve()
        return states, model.calls, subscriber._session.context.staging._arena.nbytes


@pytest.mark.parametrize("quirk", ["", "item"])
def test_an_engine_that_loads_weights(address, quirk):
    """Bit for bit what its own method loads; called only with what it can't be traced with."""
    trainers, servers = run_jobs(
        Job(run=trainer, size=2, arguments={"address": address}),
        Job(run=server, size=2, arguments={"address": address, "quirk": quirk}),
    )
    word = "partial" if quirk else "verified"
    for found in trainers:
        assert [entry[0] for entry in found] == [word, word]
        assert [list(entry[1]) for entry in found] == [["temperature"] if quirk else []] * 2
        assert found[0][2] == word
        (mismatch,) = found[1][3]
        assert (mismatch.tensor, mismatch.rank) == ("layers.0.up", "replica 0 server rank 1")
        assert (mismatch.kind, mismatch.box) == ("element", Box((48 + 4, 5), (1, 1)))
    for rank, (states, calls, arena_bytes) in enumerate(servers):
        assert calls == (["temperature"] * 2 if quirk else [])
        assert (arena_bytes > 0) == bool(quirk)
        for version, state in enumerate(states, start=1):
            model = Loading(rank, 2)
            with torch.no_grad():
                model.load_weights(weights(version).items())
            for name, parameter in model.named_parameters():
                assert torch.equal(state[name], parameter.detach()), (version, name)
