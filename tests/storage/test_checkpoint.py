"""Which files of a directory are read: variants, old indexes, names of other libraries."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightbus.errors import SpecError
from weightbus.storage.checkpoint import STEMS, choose_files, is_index, single_of, whole_set
from weightbus.storage.disk import stored_modules, stored_tensors
from weightbus.storage.opened import Files

INDEX = "model.safetensors.index.json"
FP16_INDEX = "model.safetensors.index.fp16.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FP16_SHARDS = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("names", "index", "files"),
    [
        (["model.safetensors"], "", ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors"], "", ["model.safetensors"]),
        (["model.fp16.safetensors"], "", ["model.fp16.safetensors"]),
        ([INDEX, *SHARDS, FP16_INDEX, *FP16_SHARDS], INDEX, SHARDS),
        ([FP16_INDEX, *FP16_SHARDS], FP16_INDEX, FP16_SHARDS),
        ([*SHARDS, "model-00001-of-00002.fp16.safetensors"], "", SHARDS),
        ([INDEX, *SHARDS, "model.fp16.safetensors"], INDEX, SHARDS),
        (["other.fp16.safetensors", "other.safetensors"], "", ["other.fp16.safetensors", "other.safetensors"]),
        (["a.safetensors", "b.safetensors", "config.json", "x.bin"], "", ["a.safetensors", "b.safetensors"]),
        ([], "", []),
    ],
    ids=range(10),
)
def test_the_plain_variant_is_read_where_there_is_one(names, index, files):
    assert choose_files(Path("folder"), names) == (index, files)
    other = [name.replace("model", STEMS[1]) for name in names]
    expected = [name.replace("model", STEMS[1]) for name in files]
    assert choose_files(Path("folder"), other) == (index.replace("model", STEMS[1]), expected)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["model.fp16.safetensors", "model.bf16.safetensors"], "one variant of model, got bf16, fp16"),
        (["a.safetensors.index.json", "b.safetensors.index.json"], "one index file"),
    ],
)
def test_what_is_not_clear_is_refused(names, reason):
    with pytest.raises(SpecError, match=f"folder: expected .*{reason}"):
        choose_files(Path("folder"), names)


def test_names_of_indexes():
    assert [single_of(INDEX), single_of(FP16_INDEX)] == ["model.safetensors", "model.fp16.safetensors"]
    assert not is_index("model.safetensors")
    assert whole_set(SHARDS) == SHARDS
    assert whole_set(SHARDS[:1]) == whole_set([*SHARDS, "x.safetensors"]) == whole_set([]) == []


def save(path: Path, value: float, *names: str, at: int = 0) -> None:
    save_file({name: torch.full((2,), value) for name in names}, path)
    os.utime(path, (at, at))


def write_index(path: Path, weight_map: dict[str, str], at: int = 0) -> None:
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    os.utime(path, (at, at))


def held(folder: Path) -> dict[str, str]:
    return {name: tensor.path.name for name, tensor in stored_tensors(folder).items()}


def test_an_old_index_whose_files_are_gone(tmp_path, caplog):
    """As after a second save into the same directory, without an index."""
    write_index(tmp_path / INDEX, {"a": SHARDS[0], "b": SHARDS[1]}, at=9)
    save(tmp_path / "model.safetensors", 1.0, "a", "b")
    assert held(tmp_path) == {"a": "model.safetensors", "b": "model.safetensors"}
    assert f"{INDEX}: an old index, as {SHARDS[0]} is gone" in caplog.text


def test_an_old_index_beside_a_whole_set_of_another_number(tmp_path):
    write_index(tmp_path / INDEX, {"a": "model-00001-of-00003.safetensors"})
    save(tmp_path / SHARDS[0], 1.0, "a")
    with pytest.raises(SpecError, match=r"model-00001-of-00003.safetensors: expected a readable file"):
        stored_tensors(tmp_path)  # half of the new ones
    save(tmp_path / SHARDS[1], 1.0, "b")
    assert held(tmp_path) == {"a": SHARDS[0], "b": SHARDS[1]}


@pytest.mark.parametrize(("at", "single"), [(4, False), (5, False), (6, True)])
def test_the_newer_one_of_two_whole_checkpoints(tmp_path, at, single):
    for shard, name in zip(SHARDS, "ab", strict=True):
        save(tmp_path / shard, 1.0, name)
    write_index(tmp_path / INDEX, {"a": SHARDS[0], "b": SHARDS[1]}, at=5)
    save(tmp_path / "model.safetensors", 2.0, "a", "b", at=at)
    expected = dict.fromkeys("ab", "model.safetensors") if single else {"a": SHARDS[0], "b": SHARDS[1]}
    assert held(tmp_path) == expected


def test_an_index_that_names_the_single_file_is_no_old_one(tmp_path):
    save(tmp_path / "model.safetensors", 1.0, "a", at=9)
    write_index(tmp_path / INDEX, {"a": "model.safetensors", "b": "gone.safetensors"}, at=1)
    with pytest.raises(SpecError, match=r"gone.safetensors: expected a readable file"):
        stored_tensors(tmp_path)


def test_an_index_of_a_variant_that_is_named(tmp_path):
    save(tmp_path / "model.safetensors", 1.0, "a")
    save(tmp_path / "model.fp16.safetensors", 2.0, "a")
    write_index(tmp_path / FP16_INDEX, {"a": "model.fp16.safetensors"})
    assert held(tmp_path) == {"a": "model.safetensors"}
    assert held(tmp_path / FP16_INDEX) == {"a": "model.fp16.safetensors"}


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_metadata_may_be_null(tmp_path, metadata):
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    text = json.dumps({"__metadata__": metadata, "w": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"1")
    assert list(stored_tensors(tmp_path)) == ["w"]


@pytest.mark.parametrize("metadata", [[], 0, "text", {"a": None}])
def test_metadata_that_is_something_else(tmp_path, metadata):
    text = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(SpecError, match="__metadata__: expected text by text"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("module", ["../other", "..", ".", "sub/vae", "/absolute", "a\0b"])
def test_module_names_do_not_leave_the_directory(tmp_path, module):
    (tmp_path / "other").mkdir()
    save(tmp_path / "other" / "model.safetensors", 1.0, "a")
    (tmp_path / "models").mkdir()
    with Files() as files, pytest.raises(SpecError, match="expected the name of one file or folder in it"):
        stored_modules(tmp_path / "models", [module], files)


def test_modules_whose_names_begin_alike(tmp_path):
    for module, name in (("a", "b.c"), ("a.b", "d")):
        (tmp_path / module).mkdir()
        save(tmp_path / module / "model.safetensors", 1.0, name)
    with Files() as files:
        found, folders = stored_modules(tmp_path, ["a", "a.b"], files)
        assert {name: tensor.path.parent.name for name, tensor in found.items()} == {
            "a.b.c": "a",
            "a.b.d": "a.b",
        }
        assert list(folders) == ["a.", "a.b."]
        save(tmp_path / "a.b" / "more.safetensors", 1.0, "c")
        with pytest.raises(SpecError, match=r"a\.b\.c: expected each name once, got it in"):
            stored_modules(tmp_path, ["a", "a.b"], files)


def test_a_file_where_a_module_is_expected(tmp_path):
    save(tmp_path / "vae", 1.0, "a")
    with Files() as files:
        with pytest.raises(SpecError, match="vae: expected a directory, got a file"):
            stored_modules(tmp_path, ["vae"], files)
        with pytest.raises(SpecError, match="unet: expected a sub-folder of"):
            stored_modules(tmp_path, ["unet"], files)
