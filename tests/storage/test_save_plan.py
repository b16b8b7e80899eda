"""Names in files, who writes what, and what one rank may say to the others in a save."""

from __future__ import annotations

import threading

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import weightbus
from weightbus.control import messages as m
from weightbus.errors import SpecError, UpdateError, WeightbusError
from weightbus.hub.server import Hub
from weightbus.planning.box import Box
from weightbus.planning.facts import Holding, encode_facts
from weightbus.planning.spec import Spec
from weightbus.session.save import Save, _Prepared
from weightbus.storage.digest_list import NAME as LIST
from weightbus.storage.digest_list import PartSums, load_saved
from weightbus.storage.save_plan import merge_places, places_of, usual_places
from weightbus.storage.saved_names import file_stem, kept_name, modules_of, tied_patterns
from weightbus.tensors.layout import layout_of


@pytest.fixture
def hub(address):
    served = Hub(address)
    thread = threading.Thread(target=served.serve)
    thread.start()
    yield address
    served.stop()
    thread.join()


class Tied(nn.Module):
    """Three names for one tensor; two may be left out, as the class says."""

    def __init__(self, keys=("head.weight", r"layers\.\d+")):
        super().__init__()
        self.head = nn.Linear(3, 5, bias=False)
        self.shared = nn.Embedding(5, 3)
        self.layers = nn.ModuleList([nn.Embedding(5, 3), nn.Linear(3, 3)])
        self.layers[0].embed = self.shared.weight
        self.layers[0].weight = self.head.weight = self.shared.weight
        self._tied_weights_keys = keys


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Tied(keys={"head.weight": "shared.weight", "layers.0.weight": "shared.weight"})


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        (["head.weight", r"layers\.0"], "shared.weight"),
        ({"shared.weight": "x", "layers.0.weight": "x", "embed": "x"}, "head.weight"),
        ({"head.weight": 0, "shared": 0, "embed": 0, "layers.0.weight": 0}, "shared.weight"),  # one must stay
        (None, "head.weight"),
        (7, "head.weight"),
        ([r"head"], "layers.0.embed"),
    ],
)
def test_the_name_that_a_library_keeps(keys, kept):
    model = Tied(keys)
    places = places_of(layout_of(model), {"": tied_patterns(model)})
    assert places["head.weight"] == [("", kept)]
    assert places["layers.1.weight"] == [("", "layers.1.weight")]


def test_names_of_inner_models_and_wrappers():
    model = Outer()
    assert tied_patterns(model) == ["model.head.weight", "model.layers.0.weight"]
    compiled = torch.compile(model, backend="eager")
    places = places_of(layout_of(compiled), {"": tied_patterns(compiled)})
    assert places["model.head.weight"] == [("", "model.layers.0.embed")]


def test_names_are_kept_whatever_their_order():
    assert kept_name(["b", "a", "c"], ["a"]) == kept_name(["c", "b", "a"], ["^a"]) == "b"
    assert kept_name(["b", "a"], []) == "a"


def test_a_tensor_of_two_modules_lies_in_the_files_of_both():
    one, two = Tied(), nn.Linear(3, 5, bias=False)
    two.weight = one.shared.weight
    source = {"one": one, "two": two}
    layout = layout_of(source)
    patterns = {name: tied_patterns(module) for name, module in modules_of(source).items()}
    assert places_of(layout, patterns)["one.head.weight"] == [("one", "shared.weight"), ("two", "weight")]
    only = places_of(layout.select(["two"]), patterns)
    assert only == {"one.head.weight": [("two", "weight")]}


def test_modules_whose_names_begin_alike():
    inner = nn.Module()
    inner.b = nn.Linear(1, 1, bias=False)
    places = places_of(layout_of({"a": inner, "a.x": nn.Linear(1, 1)}), {})
    assert places == {
        "a.b.weight": [("a", "b.weight")],
        "a.x.bias": [("a.x", "bias")],
        "a.x.weight": [("a.x", "weight")],
    }
    assert usual_places("a.x.bias", ["a", "a.x"]) == []  # so it is told
    assert usual_places("a.b.weight", ["a", "a.x"]) == [("a", "b.weight")]
    assert usual_places("w", []) == [("", "w")]


SPECS = {name: Spec(name=name, dtype="float32", shape=(1,)) for name in ("a", "b")}


@pytest.mark.parametrize(
    ("of_ranks", "reason"),
    [
        ({0: {"a": [("", "x")]}, 1: {"a": [("", "y")], "b": [("", "z")]}}, "a: expected one place in files"),
        ({0: {"a": [("", "x")], "b": [("", "x")]}}, "x: expected one tensor of this name, got a and b"),
        ({0: {"a": [("m", "x")], "b": [("m", "x")]}}, "in the folder m, got a and b"),
    ],
)
def test_places_that_do_not_agree(of_ranks, reason):
    with pytest.raises(SpecError, match=reason):
        merge_places(of_ranks, SPECS)


def test_places_by_folder():
    places = {0: {"a": [("m", "x"), ("n", "y")]}, 1: {"b": [("n", "x")]}}
    assert merge_places(places, SPECS) == {"m": {"x": "a"}, "n": {"y": "a", "x": "b"}}


def of_library(name):
    """A class as a library has it, and one of a user's that is made of it."""
    base = type("Model", (nn.Linear,), {"__module__": f"{name}.models.any"})
    return type("Mine", (base,), {"__module__": "my"})(2, 2)


def test_files_are_named_as_each_library_does(hub, tmp_path):
    assert [file_stem(of_library(n)) for n in ("diffusers", "transformers", "my")] == [
        "diffusion_pytorch_model",
        "model",
        "model",
    ]
    modules = {"vae": of_library("diffusers"), "text": of_library("transformers")}
    path = tmp_path / "saved"
    with weightbus.Publisher(modules, address=hub, rank=0, size=1) as publisher:
        publisher.save(path, file_bytes=16)
    stem = "diffusion_pytorch_model"
    assert {found.name for found in (path / "vae").iterdir()} == {
        f"{stem}-00001-of-00002.safetensors",
        f"{stem}-00002-of-00002.safetensors",
        f"{stem}.safetensors.index.json",
        LIST,
    }
    assert (path / "text" / "model.safetensors.index.json").exists()


def test_tied_tensors_of_two_modules_on_the_disk(hub, tmp_path):
    one, two = Tied(), nn.Linear(3, 5)
    two.weight = one.shared.weight
    path = tmp_path / "saved"
    with weightbus.Publisher({"one": one, "two": two}, address=hub, rank=0, size=1) as publisher:
        publisher.save(path)
    for folder, name in (("one", "shared.weight"), ("two", "weight")):
        found = load_file(path / folder / "model.safetensors")
        assert torch.equal(found[name], one.shared.weight)
        assert set(load_saved(path / folder / LIST).tensors) == set(found)


@pytest.mark.parametrize("module", ["../x", "/x", "a/b", "..", "."])
def test_modules_that_would_lie_elsewhere(hub, tmp_path, module):
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "saved"
    expected = pytest.raises(
        UpdateError, match=r"a module's folder in .*expected the name of one file or folder"
    )
    source = {module: nn.Linear(1, 1)}
    with weightbus.Publisher(source, address=hub, rank=0, size=1) as publisher, expected:
        publisher.save(path)
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep"]


# -- what other ranks say ----------------------------------------------------------------------------


def save_of(path, place, tensor):
    task = m.SaveTask(path=str(path), modules=None, version=7, file_bytes=1 << 20)
    layout = layout_of([("a", tensor)])
    return Save(task, place, layout, look=lambda: None, progress=lambda done, total: None)


def gathered(of, *blobs):
    return m.Gathered(update=1, of=of, blobs=list(blobs), holder={i: i for i in range(len(blobs))})


@pytest.mark.parametrize("scratch", ["precious", "..", ".version-7.0123abcd.part"])
def test_only_rank_0_names_a_directory(tmp_path, scratch):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "weights").touch()
    save = save_of(tmp_path / "version-7", 0, torch.zeros(4))
    own = save.prepare()
    facts = msgspec.msgpack.decode(own, type=_Prepared).facts
    evil = msgspec.msgpack.encode(_Prepared(facts=facts, scratch=scratch))
    with pytest.raises(UpdateError, match="expected trainer rank 0 to name a scratch, got one of 1"):
        save.check(gathered("prepare", own, evil))
    save.close()
    assert {found.name for found in tmp_path.rglob("*")} == {"precious", "weights"}


@pytest.mark.parametrize("scratch", ["precious", "", "..", "/etc"])
def test_a_rank_writes_to_no_directory_of_another_name(tmp_path, scratch):
    """Whoever speaks for rank 0, the hub included."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "model.safetensors").write_bytes(b"the last good checkpoint")
    save = save_of(tmp_path / "version-7", 1, torch.zeros(4))
    own = save.prepare()
    spec = Spec(name="a", dtype="float32", shape=(4,))
    facts = encode_facts({"a": Holding(spec=spec, boxes=(Box.whole((4,)),))})
    evil = msgspec.msgpack.encode(_Prepared(facts=facts, scratch=scratch))
    save._place = 0  # the one who writes, but made nothing
    save._make = lambda: None
    save.check(gathered("prepare", evil))
    with pytest.raises(SpecError, match="expected a scratch directory named after it"):
        save.write()
    save.close()
    assert (tmp_path / "precious" / "model.safetensors").read_bytes() == b"the last good checkpoint"
    assert msgspec.msgpack.decode(own, type=_Prepared).scratch == ""


@pytest.mark.parametrize("stem", ["../x", "precious", ""])
def test_files_have_no_other_names(tmp_path, stem):
    save = save_of(tmp_path / "version-7", 0, torch.zeros(4))
    prepared = msgspec.msgpack.decode(save.prepare(), type=_Prepared)
    prepared.stems = {"": stem}
    with pytest.raises(SpecError, match="expected files named by one of model"):
        save.check(gathered("prepare", msgspec.msgpack.encode(prepared)))
    save.close()
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_hold_different_bytes(tmp_path):
    """Each digests all that it holds; the difference is named, and nothing is left."""
    saves = [save_of(tmp_path / "version-7", place, torch.full((4,), float(place == 2))) for place in range(3)]
    prepared = gathered("prepare", *[save.prepare() for save in saves])
    for save in saves:
        save.check(prepared)
    sums = gathered("write", *[save.write() for save in saves])
    for save in saves:
        with pytest.raises(
            WeightbusError, match=r"a: expected the same bytes .* \[0:4\].* rank 2 than on rank 0"
        ):
            save.finish(sums)
        save.close()
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_hold_the_same_bytes(tmp_path):
    saves = [save_of(tmp_path / "version-7", place, torch.arange(4.0)) for place in range(3)]
    prepared = gathered("prepare", *[save.prepare() for save in saves])
    for save in saves:
        save.check(prepared)
    assert [save.nbytes for save in saves] == [16, 0, 0]
    sums = gathered("write", *[save.write() for save in saves])
    assert len(set(sums.blobs)) == 1
    assert msgspec.msgpack.decode(sums.blobs[0], type=list[PartSums])[0].name == "a"
    for save in saves[::-1]:
        save.finish(sums)
        save.close()
    assert torch.equal(load_file(tmp_path / "version-7" / "model.safetensors")["a"], torch.arange(4.0))
