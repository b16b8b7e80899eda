"""A hub that trainer rank 0 starts: from its own code, and without a word to the user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import gc, sys, weightbus.start as start
start.ensure_hub(sys.argv[1])
start.ensure_hub(sys.argv[1])
gc.collect()
print("up", start.listens(sys.argv[1]))
"""


@pytest.mark.parametrize("planted", ["msgspec.py", "zmq.py", "logging.py", "weightbus.py"])
def test_nothing_is_imported_from_the_current_directory(address, tmp_path, planted):
    marker = tmp_path / "ran"
    here, script = tmp_path / "cwd", tmp_path / "script"
    here.mkdir()
    script.mkdir()
    (here / planted).write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit\n")
    (script / "train.py").write_text(PROGRAM)
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", str(script / "train.py"), address],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "up True", done.stderr
    assert not marker.exists()
    assert done.stderr == "", "no warning of a process that still runs"
