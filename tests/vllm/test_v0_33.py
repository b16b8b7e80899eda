"""vLLM 0.33, of which there is no build for the CPU: its own base classes, factories and client."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from processes import free_address, free_port
from processes_of_vllm import ended, environment, started

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

WHEEL = Path(sys.prefix) / "vllm-0.33"


@pytest.mark.skipif(
    not WHEEL.exists(), reason="needs the Python files of vLLM 0.33, as make test-vllm gets them"
)
def test_a_worker_and_a_trainer_over_its_client(tmp_path):
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(WHEEL), env["PYTHONPATH"]])
    port, logs = free_port(), [tmp_path / "worker.log", tmp_path / "client.log"]
    with started("run_worker.py", "qwen3", port, log=logs[0], env=env) as worker:
        deadline = time.monotonic() + 100
        while "TrainerEngine" not in logs[0].read_text() and worker.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        url = f"http://127.0.0.1:{port}"
        with started("run_client.py", "qwen3", free_address(), url, "1,2", log=logs[1], env=env) as client:
            reports = ended(client, logs[1], 120)
        said = ended(worker, logs[0], 30)
    assert "0.33.0 WorkerEngine []" in said
    assert "0.33.0 TrainerEngine []" in said
    assert "version 1 equal\n" in said
    assert "version 2 equal\n" in said
    assert reports.count("verified version") == 2
