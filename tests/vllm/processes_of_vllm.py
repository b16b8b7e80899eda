"""vLLM and trainers in processes of their own, one engine at a time: each takes gigabytes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
}


def environment(tp: int = 1, **more: str) -> dict[str, str]:
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if tp > 1:
        own["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(tp)))
    return {**os.environ, **SETTINGS, **own, **more}


@contextlib.contextmanager
def started(*arguments: object, log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A script of this folder. It and what it has started are ended with the block."""
    command = [sys.executable, *map(str, arguments)]
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: S603 - what tests say
            command, cwd=HERE, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env=env
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def ended(process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> str:
    """What it has printed. Fails the test with that if it does not end well in time."""
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    text = log.read_text(errors="replace")
    assert code == 0, f"expected exit status 0, got {code}:\n{text[-6000:]}"
    return text


def engine(spec: dict[str, Any], folder: Path, name: str, timeout_s: float) -> list[dict[str, Any]]:
    """What ``run_engine.py`` gives for a spec."""
    out, log = folder / f"{name}.json", folder / f"{name}.log"
    tp = spec.get("tp", 1)
    with started("run_engine.py", json.dumps(spec), out, log=log, env=environment(tp)) as process:
        ended(process, log, timeout_s)
    return json.loads(out.read_text())
