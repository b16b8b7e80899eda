"""The examples that the README quotes run as they stand: two torchruns that know one address."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from processes import free_address, free_port, run_python, start_python

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")


def test_trainer_updates_servers(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "WEIGHTBUS_ADDRESS": free_address(),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    logs, jobs = {}, {}
    try:
        for side in ("trainer", "server"):
            logs[side] = tmp_path / side
            script = ROOT / "examples" / f"torchrun_{side}.py"
            with logs[side].open("wb") as log:
                jobs[side] = start_python(
                    *TORCHRUN, script, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
        codes = {side: job.wait(90) for side, job in jobs.items()}
    finally:
        for job in jobs.values():
            if job.poll() is None:
                job.terminate()
                job.wait(30)
    said = {side: log.read_text() for side, log in logs.items()}
    assert codes == {"trainer": 0, "server": 0}, said
    reports = [line for line in said["trainer"].splitlines() if line.startswith("verified version")]
    assert [line.split(":")[0] for line in reports] == [f"verified version {step}" for step in (1, 2, 3)]
    for rank in range(2):
        assert f"rank {rank} serves version 3" in said["server"]


def test_engine_is_updated_over_each_path(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "WEIGHTBUS_ADDRESS": free_address(),
        "WEIGHTBUS_HTTP_PORT": str(free_port()),
        "TMPDIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    job = start_python(
        *TORCHRUN,
        ROOT / "examples" / "engine.py",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = job.communicate(timeout=100)
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait(30)
    assert job.returncode == 0, said
    for expected in (
        "group: verified version 1",
        "save: saved 17 tensors",
        "verified on 2 ranks",
        "tensors: load of tensors",
    ):
        assert expected in said
    # From the trainer, from disk and from tensors; and, if an image was made before, the first ones.
    assert re.search(r"images of [34] sets of weights", said), said


def test_a_policy_learns_from_rollouts_that_are_updated_after_every_step() -> None:
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    run = run_python(ROOT / "examples" / "colocated_rl.py", env=environment, timeout=110)
    assert run.returncode == 0, run.stdout + run.stderr
    steps = re.findall(
        r"^step +(\d+)  reward ([\d.]+)  verified version (\d+): .*, peer; unnamed job: .*$", run.stdout, re.M
    )
    assert (
        [step for step, _, _ in steps]
        == [version for _, _, version in steps]
        == [str(s) for s in range(0, 41, 5)]
    )
    rewards = [float(reward) for _, reward, _ in steps]
    assert rewards[0] < 0.2 < 0.9 < rewards[-1], rewards
    assert "41 verified updates" in run.stdout
