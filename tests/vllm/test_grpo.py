"""``examples/vllm_grpo.py``: a policy that learns from vLLM's rollouts, a verified update before each step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import free_address
from processes_of_vllm import ended, environment, started

pytestmark = [pytest.mark.vllm, pytest.mark.release, pytest.mark.timeout(360)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm_grpo.py"
STEPS = 12


def test_a_policy_learns_from_rollouts_of_the_version_just_committed(tmp_path):
    log, path = tmp_path / "grpo.log", tmp_path / "steps.json"
    env = environment(VLLM_ENABLE_V1_MULTIPROCESSING="1", WEIGHTBUS_ADDRESS=free_address())
    with started(EXAMPLE, "--steps", STEPS, "--json", path, log=log, env=env) as process:
        text = ended(
            process, log, 200
        )  # it fails for tokens of another version, and unless the reward has risen
    for version in range(1, STEPS + 1):
        assert f"verified version {version}:" in text
    rows = json.loads(path.read_text())
    assert [(row["step"], row["word"]) for row in rows] == [(n, "verified") for n in range(1, STEPS + 1)]
    assert all(0 < row["reward"] < 1 for row in rows), rows
    assert all(0 < row["update_s"] < row["pause_s"] < row["step_s"] for row in rows), rows
    # vLLM computes with what was committed: with older weights it would be as far off as a step has moved.
    assert all(row["logprobs_apart"] < row["logprobs_moved"] / 4 for row in rows), rows
