"""The pages' figures are those of the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_python

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("program", ["readme.py", "reliability.py"])
def test_figures_come_from_the_results(program):
    found = run_python(ROOT / "benchmarks" / program, "--check")
    assert found.returncode == 0, f"run benchmarks/{program}; {found.stderr}"
