"""A hub that trainer rank 0 starts: from its own code, and without a word to the user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from processes import run_python

PROGRAM = """
import gc, sys, weightbus.control.start as start
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
    root = Path(__file__).resolve().parents[2]
    strict = ("-X", "dev", "-W", "error")
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = run_python(*strict, script / "train.py", address, cwd=here, env=env)
    assert done.stdout.strip() == "up True", done.stderr
    assert not marker.exists()
    assert done.stderr == "", "no warning of a process that still runs"
