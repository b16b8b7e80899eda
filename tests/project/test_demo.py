"""The demo's judge refuses what it must, and no child outlives a demo that failed."""

from __future__ import annotations

import importlib
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
NAN = float("nan")


@pytest.fixture(scope="module")
def run() -> Iterator[ModuleType]:
    sys.path.insert(0, str(DEMO))
    yield importlib.import_module("run")
    sys.path.remove(str(DEMO))


GOOD = {
    "loss": "0.5",
    "seconds": "0.1",
    "nbytes": "100",
    "update": "verified version 1: ...",
    "check": "verified version 1",
    "check_seconds": "0.0123",
}


def row(run: ModuleType, **changes: object) -> object:
    fields = {"step": 1, "facts": GOOD, "weights": 3, "changed": 2, "equal": 3, "difference": 1e-7}
    return run.Row(**{**fields, **changes})


def test_a_good_step_passes(run: ModuleType) -> None:
    assert row(run).faults() == []
    assert row(run).cells()[-2] == "12 ms"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"facts": {**GOOD, "update": "failed version 1"}}, "failed version 1"),
        ({"facts": {**GOOD, "update": "unverified version 1"}}, "unverified version 1"),
        ({"facts": {**GOOD, "check": "layer.weight: expected"}}, "check: layer.weight: expected"),
        ({"equal": 2}, "expected 3 bit-equal weights, got 2"),
        ({"changed": 0}, "expected weights that training had changed, got none"),
        ({"difference": 2e-5}, "expected within 1e-05, got 2.0e-05"),
        ({"difference": NAN}, "expected within 1e-05, got nan"),
        ({"step": 0, "equal": 1}, "before the first update: expected 0 equal weights, got 1"),
    ],
)
def test_a_bad_step_does_not(run: ModuleType, changes: dict[str, object], fault: str) -> None:
    (found,) = row(run, **changes).faults()
    assert fault in found


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), True),
        (torch.tensor(3.0), torch.tensor(3.0), True),
        (torch.zeros(0, 2), torch.zeros(0, 2), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([1.0]), torch.tensor([1.0]).nextafter(torch.tensor(2.0)), False),
        (torch.ones(2, 3), torch.ones(3, 2), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
    ],
)
def test_bits_are_compared(run: ModuleType, a: torch.Tensor, b: torch.Tensor, equal: bool) -> None:
    assert run.snapshot.bit_equal(a, b) is equal


def test_a_snapshot_comes_back_whole(run: ModuleType, tmp_path: Path) -> None:
    file = run.snapshot.path(tmp_path, "trainer", 1)
    weights = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(1.5)}
    run.snapshot.write(file, weights, torch.ones(1, 2), {"loss": "1"})
    snapshot = run.snapshot.read(file)
    assert snapshot.facts == {"loss": "1"}
    assert snapshot.weights.keys() == weights.keys()
    assert run.snapshot.count_equal(snapshot, run.snapshot.read(file)) == 2
    assert torch.equal(snapshot.weights["a"], weights["a"])
    assert torch.equal(snapshot.embeddings, torch.ones(1, 2))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_job_that_dies_ends_the_other(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server rank waits for ever; the trainer rank dies once the server has said who it is."""
    pid_file = tmp_path / "pid-0"
    (tmp_path / "server.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, 'pid-' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        "print('server waits')\ntime.sleep(100)\n"
    )
    (tmp_path / "trainer.py").write_text(
        "import pathlib, time\n"
        f"while not pathlib.Path({str(pid_file)!r}).exists(): time.sleep(0.05)\n"
        "time.sleep(0.5)\nraise SystemExit('the trainer has no more to say')\n"
    )
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "AFTERMATH_S", 0.2)
    monkeypatch.setattr(run, "gpus_of_jobs", lambda: ([], []))
    out = io.StringIO()
    with pytest.raises(
        run.DemoError, match="the trainer job ended with exit status 1, the server job still runs"
    ):
        run.run(1, 60.0, tmp_path, [], Console(file=out, width=200))
    assert "the trainer has no more to say" in out.getvalue()
    assert "server waits" in out.getvalue()
    server = int(pid_file.read_text())
    deadline = time.monotonic() + 10
    while alive(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(server)


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [
        (0, None, ([], [])),
        (1, None, ([], [])),
        (2, None, (["0"], ["1"])),
        (3, None, (["0"], ["1"])),
        (4, None, (["0", "1"], ["2", "3"])),
        (8, None, (["0", "1"], ["2", "3"])),
        (2, "5,7", (["5"], ["7"])),
    ],
)
def test_gpus_are_shared_out(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None, expected: object
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert run.gpus_of_jobs() == expected
