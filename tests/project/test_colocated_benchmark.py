"""The benchmark of colocated ranks runs on the CPU, with small shapes, and finds no wrong bit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from processes import run_python

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")


@pytest.mark.parametrize("size", [1, 2])
def test_it_compares_bits_first(tmp_path: Path, size: int) -> None:
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    script = ROOT / "benchmarks" / "colocated.py"
    arguments = (script, "--model", "toy", "--rounds", "2", "--json", tmp_path / "found.json")
    run = run_python(*(TORCHRUN if size > 1 else ()), *arguments, timeout=110, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["benchmark"], found["model"], found["ranks"]) == ("colocated", "toy", size)
    layouts = ["in order", "reversed"] if size > 1 else ["in order"]
    kinds = ["memcpy", "update", "update, verified", "gather", *(["exchange"] if size > 1 else [])]
    rows = {(row["layout"], row["masters"], row["what"]): row for row in found["rows"]}
    assert rows.keys() == {(la, ma, what) for la in layouts for ma in ("bf16", "fp32") for what in kinds}
    for (layout, masters, what), row in rows.items():
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        if what.startswith("update") or what == "gather":
            assert row["wrong"] == 0
        if what.startswith("update"):
            assert row["route"] == ("peer" if size > 1 else "local")
        if layout == "reversed":
            assert row["moved_bytes"] > 2 * rows["in order", masters, what]["moved_bytes"] > 0
