"""The benchmark of reshard runs on the CPU, with small shapes, and finds no wrong bit."""

from __future__ import annotations

import json
import os
from pathlib import Path

from processes import run_python
from test_colocated_benchmark import TORCHRUN

ROOT = Path(__file__).resolve().parents[2]


def test_it_compares_bits_first(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    script = ROOT / "benchmarks" / "reshard.py"
    arguments = (script, "--model", "toy", "--rounds", "2", "--json", tmp_path / "found.json")
    run = run_python(*TORCHRUN, *arguments, timeout=110, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["benchmark"], found["model"], found["ranks"]) == ("reshard", "toy", 2)
    routes = ["reshard", "broadcast"]
    kinds = ["raw", *routes, *(f"{route}, verified" for route in routes)]
    rows = {(row["case"], row["what"]): row for row in found["rows"]}
    assert rows.keys() == {(case, what) for case in ("both ends", "reversed", "half") for what in kinds}
    for (_, what), row in rows.items():
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert what == "raw" or row["wrong"] == 0
    assert rows["reversed", "raw"]["moved_bytes"] > rows["both ends", "raw"]["moved_bytes"] > 0
