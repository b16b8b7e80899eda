"""README's figures are those of the committed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_figures_come_from_the_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, f"run benchmarks/readme.py; {found.stderr}"
