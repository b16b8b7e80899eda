"""``weightbus digest``: the tensors' own digests from files, compared with a saved list."""

from __future__ import annotations

import io
import json
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from weightbus import SpecError, model_digest, tensor_digest
from weightbus.progress import Bar
from weightbus.storage.disk import stored_tensors
from weightbus.tools import cli, digest_files


def tensors_of_all_kinds() -> dict[str, Tensor]:
    """``long`` and ``rows`` are larger than the batches of these tests; ``thin`` has rows that are merged."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)

    return {
        "long": draw(70_001).view(torch.bfloat16),
        "rows": draw(300, 170).view(torch.float16),
        "thin": draw(9000, 3),
        "cube": draw(40, 50, 30),
        "odd": draw(1001).view(torch.uint8)[:2001].clone(),
        "zero": torch.tensor(-0.0),
        "none": torch.zeros(3, 0, 5),
        "long.tail": draw(8).view(torch.float8_e4m3fn),
        "wide": draw(4, 72).view(torch.complex64),
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files, read in batches of 10,000 bytes."""
    monkeypatch.setattr(digest_files, "BATCH_BYTES", 10_000)
    tensors = list(tensors_of_all_kinds().items())
    folder = tmp_path / "model"
    folder.mkdir()
    for i in range(3):
        save_file(dict(tensors[i::3]), folder / f"model-{i}.safetensors")
    return folder


def test_digests_are_those_of_the_tensors(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    digests = digest_files.digest_files(stored_tensors(folder), progress=lambda *at: seen.append(at))
    tensors = tensors_of_all_kinds()
    assert digests == {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    nbytes = sum(t.nbytes for t in tensors.values())
    assert seen == sorted(seen)
    assert len(seen) > 20
    assert seen[-1] == (nbytes, nbytes)


def test_a_terminal_sees_a_bar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=100)
    monkeypatch.setattr(digest_files, "Bar", partial(Bar, patience_s=0.0, console=console))
    assert cli.main(["digest", str(folder)]) == 0
    nbytes = sum(t.nbytes for t in tensors_of_all_kinds().values())
    assert f"digesting {folder.name}" in terminal.getvalue()
    assert f"{nbytes / 1000:.1f}/{nbytes / 1000:.1f} kB" in terminal.getvalue()


def test_unaligned_data(tmp_path: Path) -> None:
    """A header of odd length: no tensor starts where its dtype could be read in place."""
    path = tmp_path / "x.safetensors"
    data = bytes(range(200))
    header = json.dumps({"w": {"dtype": "F64", "shape": [25], "data_offsets": [0, 200]}}).encode()
    header += b" " * (len(header) % 2 == 0)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    tensor = torch.tensor(list(data), dtype=torch.uint8).view(torch.float64)
    assert digest_files.digest_files(stored_tensors(path)) == {"w": tensor_digest(tensor)}


def test_a_file_cut_while_it_is_read(folder: Path) -> None:
    found = stored_tensors(folder)
    last = max((s for s in found.values() if s.path.name == "model-1.safetensors"), key=lambda s: s.end)
    os.truncate(last.path, last.end - 1)
    with pytest.raises(SpecError, match=rf"model-1.safetensors: {last.spec.name}: expected data .*; truncated"):
        digest_files.digest_files(found)
    last.path.unlink()
    with pytest.raises(SpecError, match=r"model-1.safetensors: expected a readable file"):
        digest_files.digest_files(found)


def test_prints_each_tensor_and_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["digest", str(folder)]) == 0
    out, err = capsys.readouterr()
    tensors = tensors_of_all_kinds()
    lines = out.splitlines()
    assert lines[-1] == f"model {model_digest(tensors.items())}"
    assert f"{tensor_digest(tensors['rows'])}  float16[300, 170]  rows" in lines
    assert len(lines) == len(tensors) + 1
    assert err.startswith("9 tensors, 0.0")


def test_a_saved_list_matches(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "saved.json"
    assert cli.main(["digest", str(folder), "--json", "--save", str(saved)]) == 0
    out, _ = capsys.readouterr()
    assert out == saved.read_text()
    assert cli.main(["digest", "--check", str(saved), str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "as saved" in err


def test_a_check_names_each_difference(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved.json"
    assert cli.main(["digest", str(folder), "--save", str(saved)]) == 0
    stored = stored_tensors(folder)["thin"]
    raw = bytearray(stored.path.read_bytes())
    raw[stored.begin + 77] ^= 16  # one bit
    stored.path.write_bytes(raw)
    listed = json.loads(saved.read_text())
    listed["tensors"]["gone"] = listed["tensors"].pop("odd")
    listed["tensors"]["cube"]["shape"] = [40, 30, 50]
    saved.write_text(json.dumps(listed))
    capsys.readouterr()
    assert cli.main(["digest", str(folder), "--check", str(saved)]) == 1
    out, err = capsys.readouterr()
    starts = [
        "gone: expected grid61:",
        "odd: expected no such tensor, got grid61:",
        "cube: expected grid61:",
        "thin: expected grid61:",
    ]
    assert [line.startswith(start) for line, start in zip(out.splitlines(), starts, strict=True)] == [True] * 4
    assert "differs" in err
    assert cli.main(["digest", str(folder), "--check", str(saved), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["differences"]
    assert found == {"missing": ["gone"], "unexpected": ["odd"], "mismatching": ["cube", "thin"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "saved.json: expected a list that"),
        ('{"format": "weightbus digest 1", "model": "", "tensors": {"w": {}}}', r"\$.tensors"),
        ('{"format": "weightbus digest 2", "model": "", "tensors": {}}', "expected format"),
        ('{"format": "\xff", "model": "", "tensors": {}}', "saved.json: expected a list that"),  # no UTF-8
        (None, "saved.json: expected a readable file"),
    ],
)
def test_a_bad_list_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, expected: str
) -> None:
    saved = tmp_path / "saved.json"
    if text is not None:
        saved.write_bytes(text.encode("latin-1"))
    assert cli.main(["digest", str(folder), "--check", str(saved)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(expected, err)


def test_a_bad_model_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["digest", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: expected a readable file" in capsys.readouterr().err
