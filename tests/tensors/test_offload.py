"""Modules that keep their tensors elsewhere: updated where they live, over every route."""

from __future__ import annotations

import base64
import os
import threading

import pytest
import torch
from engine import nested
from fastapi.testclient import TestClient
from models import Toy, draw, fill, values
from offload import Layerwise
from processes import Job, run_jobs
from safetensors.torch import save, save_file
from torch import nn

import weightbus
from weightbus.errors import SpecError
from weightbus.hub.server import Hub
from weightbus.tensors.layout import layout_of, named_tensors
from weightbus.tools.http import app as http


def bits(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def assert_holds(model, expected):
    live = named_tensors(model)
    for name, tensor in expected.items():
        assert torch.equal(bits(live[name]), bits(tensor.to(live[name].dtype))), name


def filled(version=0):
    model = Toy()
    fill(model, values(version))
    return model


# -- what a layout sees ----------------------------------------------------------------------------


def test_a_layout_has_the_live_tensors_in_place_of_the_models_own():
    model = filled(3)
    want = layout_of(model)
    moved = Layerwise(model)
    assert model.up.weight.shape == (1,)
    layout = layout_of(model)
    assert (layout.specs, layout.aliases) == (want.specs, want.aliases), "tied weights stay tied"
    live = dict(moved.tensors())
    for name, tensor in live.items():
        if name in layout.parts:
            assert layout.parts[name][0].tensor.data_ptr() == tensor.data_ptr()
    assert layout.parts["big"][0].tensor.data_ptr() == model.big.data_ptr()
    assert_holds(model, values(3))


def test_what_loading_code_goes_by_is_kept():
    """The registered parameter's class and attributes, over the live memory."""

    class Column(nn.Parameter):
        pass

    module = nn.Linear(4, 6)
    own, live = Column(torch.empty(1)), torch.zeros(6, 4)
    own.output_dim, own.weight_loader = 0, lambda parameter, loaded: parameter.data.copy_(loaded)
    module.weight = own
    module.weightbus_tensors = lambda: [("weight", live)]
    found = named_tensors(module)["weight"]
    assert type(found) is Column
    assert isinstance(found, nn.Parameter)
    assert found.output_dim == 0
    found.weight_loader(found, torch.ones(6, 4))
    assert live.eq(1).all()
    assert not hasattr(live, "output_dim")


def test_a_child_or_a_compiled_module_may_say_so_too():
    class Child(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.live, self.calls = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, 0
            self.weight.data = torch.empty(0)

        def weightbus_tensors(self):
            self.calls += 1
            return self.live.items()

    model = nn.Sequential(nn.Linear(3, 3), Child())
    assert layout_of(model).parts["1.weight"][0].tensor.data_ptr() == model[1].live["weight"].data_ptr()
    child = Child()
    layout = layout_of({"vae": torch.compile(child, backend="eager")})
    assert layout.parts["vae.weight"][0].tensor.data_ptr() == child.live["weight"].data_ptr()
    assert child.calls == 2, "once for the layout and once for its watch: the wrapper is not asked"


def linear(*pairs):
    module = nn.Linear(2, 2)
    module.weightbus_tensors = lambda: pairs
    return {"m": module}


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("wieght", torch.zeros(2, 2))], "m.wieght: expected weightbus_tensors to give names of the module's"),
        ([("weight", torch.zeros(2, 2))] * 2, None),
        ([("weight", torch.zeros(2, 2)), ("weight", torch.zeros(2, 2))], "m.weight: expected each name once"),
        (["weight"], r"m.weightbus_tensors: expected \(name, tensor\) pairs, got a str; at item 0"),
        ([("weight", 3)], "weight: expected a tensor, got a int"),
        ([(3, torch.zeros(2))], "m.weightbus_tensors: expected .* pairs, got 3 as a name; at item 0"),
        ([("weight", torch.zeros(2, 2, device="meta"))], "m.weight: expected a tensor with storage"),
    ],
)
def test_what_the_hook_may_give(pairs, expected):
    if expected is None:
        layout_of(linear(*pairs))
        return
    with pytest.raises(SpecError, match=expected):
        layout_of(linear(*pairs))


def test_a_tied_tensor_lives_in_one_place():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model.b.weight = model.a.weight
    model.weightbus_tensors = lambda: [("a.weight", torch.zeros(2, 2)), ("b.weight", torch.zeros(2, 2))]
    with pytest.raises(SpecError, match=r"b\.weight: expected one place of a tied tensor, got two"):
        layout_of(model)


def test_the_watch_looks_where_the_tensors_live():
    model = filled()
    moved = Layerwise(model)
    layout = layout_of(model)
    moved.load("up")
    moved.load("norm")
    moved.release("up")
    assert (layout.moved(), layout.changed()) == (None, None), "a placeholder comes and goes"
    moved.reallocate()
    assert layout.moved() == "down.weight"
    layout = layout_of(model)
    buffer, at, shape = moved.views["up.weight"]
    moved.views["up.weight"] = buffer, at, torch.Size(reversed(shape))
    assert layout.moved() == layout.changed() == "up.weight"
    layout = layout_of(model)
    del moved.views["up.bias"]
    assert layout.moved() == "up.bias"


def test_digests_snapshots_and_sha256_see_the_live_values():
    model, plain = filled(5), filled(5)
    moved = Layerwise(model)
    assert weightbus.model_digest(model) == weightbus.model_digest(plain)
    assert weightbus.named_sha256(model) == weightbus.named_sha256(plain)
    assert weightbus.module_sha256(model) == weightbus.module_sha256(plain)
    expected = weightbus.named_sha256(plain)
    assert weightbus.check_sha256(model, expected).ok
    before = weightbus.snapshot(model)
    moved.load("up")
    moved.reallocate()
    assert before.compare(model).none
    weightbus.perturb(model)
    assert set(before.compare(model).changed) == set(before.digests) - {"empty", *before.aliases}
    assert not weightbus.check_sha256(model, expected).ok


# -- updates ---------------------------------------------------------------------------------------


def trainer(rank, size, *, address, route):
    model = filled()
    words = []
    with weightbus.Publisher(model, address=address, route=route, join_timeout_s=30) as publisher:
        for version in (1, 2, 3):
            fill(model, values(version))
            report = publisher.update(version)
            words.append((report.word, report.route, publisher.check().word))
        words.append([(found.tensor, found.kind) for found in publisher.check().mismatches])
    return words


def server(rank, size, *, address):
    """Runs a layer between updates, moves its buffers after the second, spoils an element after the third."""
    model = filled()
    moved = Layerwise(model)
    moved.load("up")
    seen, checks = [], []

    def on_commit(version):
        moved.refresh()
        assert torch.equal(bits(model.up.weight), bits(values(version)["up.weight"]))
        assert_holds(model, values(version))
        seen.append(version)

    with weightbus.Subscriber(model, address=address, on_commit=on_commit) as subscriber:
        while not subscriber.left:
            if subscriber.poll(0.2):
                checks.append(len(seen))
                if seen[-1:] == [2] and checks.count(2) == 2:
                    moved.reallocate()
                if checks.count(3) == 2:
                    dict(moved.tensors())["down.weight"][3, 4] += 1
    return seen, model.down.weight.shape


def faulty_trainer(rank, size, *, address):
    model, live, faults = nn.Linear(6, 4, bias=False), torch.zeros(4, 6), []

    def tensors():
        if faults:
            raise RuntimeError(faults.pop())
        return [("weight", live)]

    model.weightbus_tensors = tensors
    found = []
    with weightbus.Publisher(model, address=address, join_timeout_s=30) as publisher:
        for version in (1, 2, 3):
            live.fill_(version)
            if version == 2:
                faults += ["the offloader is busy"] * 2
            try:
                found.append(publisher.update(version).word)
            except weightbus.UpdateError as error:
                found.append(str(error))
    return found


def plain_server(rank, size, *, address):
    model = nn.Linear(6, 4, bias=False)
    seen = []
    with weightbus.Subscriber(
        model,
        address=address,
        on_commit=lambda version: seen.append((version, model.weight.unique().tolist())),
        on_torn=lambda error: seen.append(str(error)),
        on_refused=lambda error: seen.append("refused"),
    ) as subscriber:
        subscriber.serve()
    return seen


def test_a_hook_that_raises_on_a_trainer_refuses_the_update(address):
    ((found,), (seen,)) = run_jobs(
        Job(run=faulty_trainer, arguments={"address": address}),
        Job(run=plain_server, arguments={"address": address}),
    )
    assert (found[0], found[2]) == ("verified", "verified")
    assert "nothing was written" in found[1]
    assert "trainer rank 0" in found[1]
    assert "RuntimeError: the offloader is busy" in found[1]
    assert seen == [(1, [1.0]), "refused", (3, [3.0])]


@pytest.mark.parametrize("route", ["broadcast", "peer", "reshard"])
def test_updates_and_checks(address, route):
    ((words,), (served,)) = run_jobs(
        Job(run=trainer, arguments={"address": address, "route": route}),
        Job(run=server, arguments={"address": address}),
    )
    assert words[:3] == [("verified", route, "verified")] * 3
    assert words[3] == [("down.weight", "element")]
    assert served == ([1, 2, 3], (1,))


def test_files_tensors_and_the_checker(address, tmp_path):
    """Through a hub, as HTTP brings them."""
    model = filled()
    moved = Layerwise(model)
    two, three = values(2), values(3)
    save_file(two, tmp_path / "model.safetensors")
    hub = Hub(address)
    threads = [threading.Thread(target=hub.serve)]
    threads[0].start()
    subscriber = weightbus.Subscriber(
        model, address=address, rank=0, replica_size=1, on_commit=lambda version: moved.refresh()
    )
    moved.load("norm")
    threads.append(threading.Thread(target=subscriber.serve))
    threads[1].start()
    try:
        with TestClient(http.create_app(address, roots=[tmp_path]), base_url="http://localhost") as client:

            def post(path, **body):
                answer = client.post(path, json=body)
                assert answer.status_code == 200, answer.text

            def check(expected):
                digests = {name: weightbus.tensor_sha256(tensor) for name, tensor in expected.items()}
                post("/update_weights_from_tensor_checker", target_module="model",
                     expected_named_tensors_sha256=digests)  # fmt: skip
                assert_holds(model, expected)
                assert torch.equal(model.norm.weight, expected["norm.weight"])

            post("/update_weights_from_disk", model_path=str(tmp_path))
            check(two)
            payload = base64.b64encode(save(three)).decode()
            post("/update_weights_from_tensor", serialized_named_tensors=[payload])
            check(three)
            assert moved.registered["up.weight"].shape == (1,)
    finally:
        subscriber.stop()
        threads[1].join()
        subscriber.close()
        hub.stop()
        threads[0].join()


def test_a_placeholder_without_a_hook_is_refused_with_the_cure():
    model = filled()
    Layerwise(model, hook=False)
    with (
        weightbus.colocate(filled(1), model) as pair,
        pytest.raises(weightbus.UpdateError, match=r"down.weight: expected shape \[1\].* weightbus_tensors"),
    ):
        pair.update(1)


class Fused(nn.Module):
    """``load_weights`` that puts two wire tensors into one parameter; with ``quirk`` it can't be traced."""

    def __init__(self, quirk):
        super().__init__()
        self.quirk, self.proj = quirk, nested({"qk.weight": torch.zeros(12, 8), "scale": torch.zeros(4)})

    def load_weights(self, weights):
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if name == "scale":
                if self.quirk:
                    tensor = tensor * 1.0
                parameters["proj.scale"].data.copy_(tensor)
                continue
            row = 6 * (name == "k")
            parameters["proj.qk.weight"].data[row : row + 6].copy_(tensor)


@pytest.mark.parametrize("quirk", [False, True])
def test_load_weights_loads_into_the_live_tensors(quirk):
    generator = torch.Generator().manual_seed(1)
    shapes = {"q": (6, 8), "k": (6, 8), "scale": (4,)}
    source = [(n, draw(torch.Size(shape), torch.float32, generator)) for n, shape in shapes.items()]
    model = Fused(quirk)
    moved = Layerwise(model)
    with weightbus.colocate(source, model) as pair:
        report = pair.update(1)
        assert report.word == ("partial" if quirk else "verified")
    (q, k, scale), live = (tensor for _, tensor in source), dict(moved.tensors())
    assert torch.equal(live["proj.qk.weight"], torch.cat([q, k]))
    assert torch.equal(live["proj.scale"], scale)
    assert model.proj.scale.shape == (1,)


@pytest.mark.parametrize("trust", [False, True])
def test_weight_loaders_load_into_the_live_tensors(address, trust):
    """Which swaps the halves. The loader is the placeholder's, and is given the live tensor."""

    def load(parameter, loaded):
        for half, other in zip(parameter.data.chunk(2), reversed(loaded.chunk(2)), strict=True):
            half.copy_(other)

    model = nested({"a.weight": torch.zeros(12, 4)})
    model.a.weight.weight_loader = load
    moved = Layerwise(model)
    source = torch.arange(48.0).view(12, 4)
    hub = Hub(address)
    thread = threading.Thread(target=hub.serve)
    thread.start()
    with (
        weightbus.Publisher([("a.weight", source)], address=address, rank=0, size=1) as publisher,
        weightbus.Subscriber(model, address=address, rank=0, replica_size=1, trust_traces=trust),
    ):
        assert publisher.update(1).word == "verified"
    hub.stop()
    thread.join()
    assert torch.equal(dict(moved.tensors())["a.weight"], source.roll(6, 0))


# -- a GPU and host memory -------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_with_layers_in_host_memory(dtype):
    """What is cast goes through buckets, the rest is copied; the digests are of both memories."""
    source, target = Toy().to("cuda"), Toy(dtype).to("cuda")
    moved = Layerwise(target, "cuda")
    with weightbus.colocate(source, target, on_commit=lambda version: moved.refresh()) as pair:
        moved.load("up")
        for version in (1, 2):
            fill(source, values(version))
            assert pair.update(version).word == "verified"
            assert_holds(target, values(version))
            assert torch.equal(bits(target.up.weight), bits(dict(moved.tensors())["up.weight"]))
            assert pair.check().word == "verified"
        dict(moved.tensors())["down.weight"][3, 4] += 1
        assert [found.tensor for found in pair.check().mismatches] == ["down.weight"]
    assert target.big.is_cuda
    assert not named_tensors(target)["up.weight"].is_cuda


def cuda_trainer(rank, size, *, address, route):
    torch.cuda.set_device(int(os.environ["LOCAL_DEVICE"]))
    model = Toy().to("cuda")
    found = []
    with weightbus.Publisher(model, address=address, route=route, join_timeout_s=60) as publisher:
        for version in (1, 2):
            fill(model, values(version))
            report = publisher.update(version)
            found.append((report.word, report.route, publisher.check().word))
    return found


def cuda_server(rank, size, *, address, dtype, whole):
    torch.cuda.set_device(int(os.environ["LOCAL_DEVICE"]))
    target = Toy(dtype).to("cuda")
    if whole:  # nothing is left on the GPU
        for tensor in (target.big, *target.buffers(recurse=False)):
            tensor.data = tensor.data.cpu()
    Layerwise(target, "cuda")
    device = "cuda" if whole else None
    with weightbus.Subscriber(target, address=address, device=device) as subscriber:
        subscriber.serve()
    assert_holds(target, values(2))
    return subscriber.state


@pytest.mark.cuda
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("route", "dtype"),
    [
        ("broadcast", torch.float32),
        ("broadcast", torch.bfloat16),
        ("reshard", torch.float32),
        ("reshard", torch.bfloat16),
        ("peer", torch.float32),
    ],
)
def test_updates_of_layers_in_host_memory(address, route, dtype, whole):
    found, states = run_jobs(
        Job(run=cuda_trainer, arguments={"address": address, "route": route}),
        Job(run=cuda_server, arguments={"address": address, "dtype": dtype, "whole": whole}),
        timeout_s=120,
    )
    assert found == [[("verified", route, "verified")] * 2]
    assert states == ["ready"]


@pytest.mark.cuda
def test_files_go_to_the_gpu_and_to_host_memory(tmp_path, address):
    """And a source of both memories is saved, and sent."""
    source = Toy().to("cuda")
    fill(source, values(4))
    Layerwise(source, "cuda")
    target = Toy().to("cuda")
    Layerwise(target, "cuda")
    with weightbus.Publisher(source, address=address, rank=0, size=1, route="broadcast") as publisher:
        publisher.save(tmp_path / "four", version=4)
        with weightbus.Subscriber(target, address=address, rank=0, replica_size=1) as subscriber:
            assert subscriber.update_from_disk(tmp_path / "four").word == "verified"
            assert_holds(target, values(4))
            weightbus.perturb(target)
            assert publisher.update(5).word == "verified"
    assert_holds(target, values(4))


@pytest.mark.cuda
def test_another_device_than_the_tensors_is_refused():
    with pytest.raises(SpecError, match="device: expected cuda:0, where tensors of the target lie, got cpu"):
        weightbus.Subscriber([("a", torch.zeros(2, device="cuda"))], device="cpu", rank=0, replica_size=1)
