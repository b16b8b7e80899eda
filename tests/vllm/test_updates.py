"""After each update a running vLLM is, tensor for tensor and token for token, one that was loaded anew."""

from __future__ import annotations

import pytest
import tiny
import torch
from processes import free_address
from processes_of_vllm import ended, engine, environment, started
from run_engine import PROMPTS

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default"), pytest.mark.timeout(1200)]


def different(live, fresh):
    """Names by rank of tensors that are not alike."""
    return [
        f"rank {rank} {name}: {mine.get(name)} instead of {theirs.get(name)}"
        for rank, (mine, theirs) in enumerate(zip(live["tensors"], fresh["tensors"], strict=True))
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]


def both(folder, kind, tp, versions, dtype="bfloat16", **more):
    """What vLLM says after each update, and what it says when it has loaded each version."""
    address = free_address()
    paths = [str(tiny.save(folder, kind, version)) for version in (0, *versions)]
    common = {"tp": tp, "dtype": dtype, "backend": "weightbus", **more}
    spec = {**common, "models": paths[:1], "updates": versions, "address": address}
    arguments = (kind, address, ",".join(map(str, versions)))
    log = folder / "trainer.log"
    with started("run_trainer.py", *arguments, log=log, env=environment()) as trainer:
        live = engine(spec, folder, "updated", 300)
        reports = ended(trainer, log, 30)
    assert sum(line.startswith("verified version") for line in reports.splitlines()) == len(versions), reports
    return live, engine({**common, "models": paths[1:]}, folder, "fresh", 150 + 60 * tp * len(versions))


# What each change must pass, with how many versions; the others are for releases.
ALWAYS = {("qwen3-tied", 1): 2, ("qwen3-moe", 1): 2, ("qwen3", 2): 2}
CASES = [pytest.param(kind, tp, count, id=f"{kind}-tp{tp}-{count}") for (kind, tp), count in ALWAYS.items()]
CASES += [
    pytest.param(kind, tp, 5, id=f"{kind}-tp{tp}-5", marks=pytest.mark.release)
    for tp in (1, 2)
    for kind in tiny.KINDS
]


@pytest.mark.parametrize(("kind", "tp", "count"), CASES)
def test_like_a_fresh_load(kind, tp, count, tmp_path):
    compare(*both(tmp_path, kind, tp, list(range(1, count + 1))))


@pytest.mark.release
def test_a_compiled_model_is_like_a_fresh_load(tmp_path):
    """What was compiled before an update is run right after it."""
    compare(*both(tmp_path, "qwen3", 1, [1, 2, 3], compile=True))


def compare(live, fresh):
    for version, (mine, theirs) in enumerate(zip(live, fresh, strict=True), 1):
        assert different(mine, theirs) == [], version
        assert mine["tokens"] == theirs["tokens"], version
        assert mine["logprobs"] == theirs["logprobs"], version
        assert mine["prompt"] == theirs["prompt"], version
    assert len({str(one["logprobs"]) for one in live}) == len(live), "updates change what it says"


@pytest.mark.release
@pytest.mark.parametrize("kind", ["qwen3", "qwen3-tied", "qwen3-moe", "gemma3"])
def test_prompt_logprobs_are_those_of_transformers(kind, tmp_path):
    live, _ = both(tmp_path, kind, 1, [1], dtype="float32")
    model = tiny.fill(tiny.build(kind), 1).float()
    for prompt, mine in zip(PROMPTS, live[0]["prompt"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0].float()
        theirs = torch.log_softmax(logits, -1)[range(len(prompt) - 1), prompt[1:]].tolist()
        assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) <= 0.02
