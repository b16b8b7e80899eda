"""Safetensors headers: where each tensor lies, and one refusal for each way to be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightbus.errors import SpecError
from weightbus.planning.spec import ITEMSIZE
from weightbus.storage.disk import DTYPES, stored_tensors

Header = dict[str, Any]


def write(path: Path, header: Header | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "U8", shape: tuple[int, ...] | None = None) -> Header:
    return {"dtype": dtype, "shape": list(shape or (end - begin,)), "data_offsets": [begin, end]}


def test_finds_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(12, dtype=torch.float32).view(3, 4),
        "b": torch.tensor(3.5, dtype=torch.bfloat16),
        "ä": torch.zeros(0, 7, dtype=torch.int64),
        "c": torch.tensor([True, False, True]),
        "d": torch.arange(5).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    raw = path.read_bytes()
    found = stored_tensors(path)
    assert list(found) == ["a", "b", "c", "d", "ä"]
    for name, tensor in tensors.items():
        stored = found[name]
        assert (stored.spec.dtype, stored.spec.shape) == (str(tensor.dtype)[6:], tuple(tensor.shape))
        assert raw[stored.begin : stored.end] == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        assert stored.path == path


def test_every_dtype_name_is_one_of_ours() -> None:
    assert set(DTYPES.values()) <= set(ITEMSIZE)


@pytest.mark.parametrize(
    ("header", "data", "expected"),
    [
        ({"w": entry(0, 8)}, b"1234567", "w: expected data up to byte .* got a file of .*; truncated"),
        ({"w": entry(0, 2)}, b"123", "expected .* bytes as the header says, got a file of"),
        ({"v": entry(0, 2), "w": entry(3, 4)}, b"1234", "w: expected data from byte"),
        ({"v": entry(0, 3), "w": entry(2, 4)}, b"1234", "w: expected data from byte"),
        ({"w": entry(1, 4)}, b"1234", "w: expected data from byte"),
        ({"w": entry(0, 4, "F32", (2,))}, b"1234", r"w: expected 8 bytes for F32 \[2\], got data \[0, 4\)"),
        ({"w": entry(0, 1, "F4")}, b"1", "w: expected a dtype among .* got 'F4'"),
        ({"w": entry(0, 4, "U8", (-2, -2))}, b"1234", r"w: expected sizes from 0, .* got \[-2, -2\]"),
        ({"w": {"dtype": "U8", "shape": [1]}}, b"1", "w: bad entry in the header: .*data_offsets"),
        ({"w": {**entry(0, 1), "shape": "1"}}, b"1", "w: bad entry in the header: .*shape"),
        ({"w": 7}, b"", "w: bad entry in the header"),
        (b"[]", b"", "expected a JSON object"),
        (b"{]", b"", "expected a JSON object"),
        (b"\xff\xff", b"", "expected a JSON object"),
        (b'{"\\ud800": 1}', b"", "expected a JSON object, got .*surrogates"),
        (b'{"w": ' + b"9" * 5000 + b"}", b"", "expected a JSON object|bad entry"),
        (b"[" * 200_000, b"", "expected a JSON object"),
        (b'{"w": {}, "w": {}}', b"", "w: expected each name once"),
    ],
)
def test_refuses_an_unsound_file(tmp_path: Path, header: Header | bytes, data: bytes, expected: str) -> None:
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(SpecError, match=f"bad.safetensors: {expected}"):
        stored_tensors(tmp_path)
    with pytest.raises(SpecError, match=f"bad.safetensors: {expected}"):
        stored_tensors(path)


@pytest.mark.parametrize("raw", [b"", b"1234567", b"\xff" * 8, (100).to_bytes(8, "little") + b"{}"])
def test_refuses_a_file_too_short_for_its_header(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(SpecError, match=r"bad.safetensors: expected a safetensors header in \d+ bytes"):
        stored_tensors(path)


def test_several_files_and_a_name_in_two_of_them(tmp_path: Path) -> None:
    write(tmp_path / "1.safetensors", {"b": entry(0, 1)}, b"1")
    write(tmp_path / "2.safetensors", {"a": entry(0, 1)}, b"1")
    assert {name: s.path.name for name, s in stored_tensors(tmp_path).items()} == {
        "a": "2.safetensors",
        "b": "1.safetensors",
    }
    write(tmp_path / "3.safetensors", {"a": entry(0, 1)}, b"1")
    with pytest.raises(
        SpecError, match=r"3.safetensors: a: expected each name once, got it in .*2.safetensors"
    ):
        stored_tensors(tmp_path)


def index(folder: Path, weight_map: dict[str, str], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 2}, "weight_map": weight_map}))


def test_an_index_says_which_files_count(tmp_path: Path) -> None:
    write(tmp_path / "1.safetensors", {"b": entry(0, 1)}, b"1")
    write(tmp_path / "2.safetensors", {"a": entry(0, 1)}, b"1")
    write(tmp_path / "consolidated.safetensors", {"a": entry(0, 1), "b": entry(1, 2)}, b"12")
    index(tmp_path, {"b": "1.safetensors", "a": "2.safetensors"})
    assert [s.path.name for s in stored_tensors(tmp_path).values()] == ["2.safetensors", "1.safetensors"]
    assert stored_tensors(tmp_path / "model.safetensors.index.json") == stored_tensors(tmp_path)


def unlisted(folder: Path) -> None:
    index(folder, {"a": "1.safetensors"})


def unheld(folder: Path) -> None:
    index(folder, {"a": "1.safetensors", "b": "1.safetensors", "c": "1.safetensors"})


def elsewhere(folder: Path) -> None:
    write(folder / "2.safetensors", {"c": entry(0, 1)}, b"1")
    index(folder, {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"})


def no_such_file(folder: Path) -> None:
    index(folder, {"a": "1.safetensors", "b": "9.safetensors"})


def outside(folder: Path) -> None:
    index(folder, {"a": "../1.safetensors"})


def two_indexes(folder: Path) -> None:
    index(folder, {}, "a.safetensors.index.json")
    index(folder, {}, "b.safetensors.index.json")


def no_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (unlisted, r"index.json: b: expected the index to agree .* got no entry but 1.safetensors"),
        (unheld, r"index.json: c: expected the index to agree .* got 1.safetensors but no file"),
        (elsewhere, r"index.json: b: expected the index to agree .* got 2.safetensors but 1.safetensors"),
        (no_such_file, r"9.safetensors: expected a readable file, got No such file"),
        (outside, r"index.json: a: expected the name of a file beside the index, got '../1.safetensors'"),
        (two_indexes, r"expected one index file, got a.safetensors.index.json, b.safetensors.index.json"),
        (no_map, r"index.json: expected a JSON object, got .*weight_map"),
    ],
)
def test_refuses_an_index_that_does_not_fit(
    tmp_path: Path, spoil: Callable[[Path], None], expected: str
) -> None:
    write(tmp_path / "1.safetensors", {"a": entry(0, 1), "b": entry(1, 2)}, b"12")
    spoil(tmp_path)
    with pytest.raises(SpecError, match=expected):
        stored_tensors(tmp_path)


def test_refuses_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="expected safetensors files in the directory, got none"):
        stored_tensors(tmp_path)
    with pytest.raises(SpecError, match="nowhere: expected a readable file, got No such file"):
        stored_tensors(tmp_path / "nowhere")
