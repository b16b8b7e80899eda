"""Jobs of the demo: a torchrun with its log and its GPUs, stopped as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

STOP_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self, lines: int = 60) -> str:
        """What its ranks and torchrun last said."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def start(name: str, script: Path, *, ranks: int, gpus: list[str], folder: Path, args: list[str]) -> Job:
    """Start ``script`` under torchrun. gpus: what CUDA_VISIBLE_DEVICES shall say; none for the CPU."""
    threads = max(1, (os.cpu_count() or 1) // (2 * ranks))
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603 - the demo's own script
            [*torchrun, "--nproc-per-node", str(ranks), str(script), *args],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return Job(name=name, process=process, log=log)


def stop(jobs: list[Job]) -> None:
    """End what still runs. torchrun ends its ranks on SIGTERM; one that it missed ends at its deadline."""
    running = [job for job in jobs if job.process.poll() is None]
    for job in running:
        job.process.terminate()
    for job in running:
        try:
            job.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
