"""A server that is killed or stopped in mid-update on two GPUs, over NCCL and by peer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import run_python

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks" / "faults_gpu.py"


@pytest.mark.gpus(2)
@pytest.mark.timeout(400)
def test_the_trainer_has_its_answer_in_time_and_no_bit_is_wrong(tmp_path):
    path = tmp_path / "faults.json"
    found = run_python(PROGRAM, "--times", "1", "--gb", "8", "--json", path, timeout=380.0)
    assert found.returncode == 0, found.stdout + found.stderr
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 4
    assert all(row["right"] and row["next"] == "ok" for row in rows)
    # By peer there is another server, which has the update by the same call.
    assert [row["word"] for row in rows if row["route"] == "peer"] == ["ok", "ok"]
