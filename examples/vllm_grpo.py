"""GRPO with vLLM: a policy under FSDP2 learns from rollouts that vLLM samples with its newest weights.

    python examples/vllm_grpo.py [--steps 40] [--seed 0] [--checkpoint DIRECTORY]

Makes a checkpoint (a tiny Qwen3, random weights), starts vLLM and, by torchrun, two trainer ranks; all on the
CPU. Prints both commands: with a checkpoint that is kept, each can be run by hand. Needs transformers and vLLM.

The task: count up, modulo 16, from a prompt's last number. A completion's reward is the share of its tokens
that are one above the token before. Each step: update the server, have it sample groups of completions, train.
Exits with 0 if every update was verified, every token was sampled with the version just committed, and the last
ten steps' reward is above that of the first ten.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from weightbus.engines.vllm import Servers

NUMBERS, PROMPT, LENGTH = 16, 4, 8  # tokens that count; tokens of a prompt, of a completion
PROMPTS, GROUP = 8, 16  # prompts of each rank in a step, completions of each prompt
EPOCHS, CLIP, LEARNING_RATE = 2, 0.2, 2e-3
RANKS = 2
START_S = 180.0


def rewards_of(tokens: Tensor) -> Tensor:
    """[prompts, GROUP]: the share of a completion's tokens that are one above the token before."""
    before, after = tokens[..., PROMPT - 1 : -1], tokens[..., PROMPT:]
    return (after == (before + 1) % NUMBERS).float().mean(-1)


def logprobs_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Of the completions' tokens: [prompts, GROUP, LENGTH]."""
    rows = tokens.flatten(0, 1)
    logprobs = model(input_ids=rows).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    return logprobs.gather(2, rows[:, PROMPT:, None]).view(*tokens.shape[:2], LENGTH)


def advantages_of(rewards: Tensor) -> Tensor:
    """Of each reward within its group: [prompts, GROUP, 1]."""
    normal = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    return normal[..., None]


def loss_of(logprobs: Tensor, sampled: Tensor, advantages: Tensor) -> Tensor:
    """The mean over all tokens, by the clipped ratio to the policy that sampled them."""
    ratio = (logprobs - sampled).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()


def rollouts(url: str, prompts: Tensor, version: int) -> tuple[Tensor, Tensor]:
    """GROUP completions of each prompt, all sampled by vLLM with ``version``.

    Gives the tokens after their prompts, [prompts, GROUP, PROMPT + LENGTH], and the logprobs that vLLM sampled
    them with, [prompts, GROUP, LENGTH].
    """
    sampling = {"n": GROUP, "max_tokens": LENGTH, "ignore_eos": True, "temperature": 1.0, "logprobs": 0}

    def group(prompt: list[int]) -> list[dict[str, Any]]:
        body = {"token_ids": prompt, "sampling_params": sampling}
        choices: list[dict[str, Any]] = post(f"{url}/inference/v1/generate", body)["choices"]
        return choices

    with ThreadPoolExecutor(len(prompts)) as threads:
        groups = list(threads.map(group, prompts.tolist()))
    for choice in (choice for choices in groups for choice in choices):
        expected = [{"version": str(version), "start": 0, "end": LENGTH}]
        if choice["weight_versions"] != expected:
            raise SystemExit(f"rollout: expected {expected}, got {choice['weight_versions']}")
    completions = torch.tensor([[choice["token_ids"] for choice in choices] for choices in groups])
    tokens = torch.cat([prompts[:, None].expand(-1, GROUP, -1), completions], 2)
    content = [[choice["logprobs"]["content"] for choice in choices] for choices in groups]
    return tokens, torch.tensor([[[token["logprob"] for token in row] for row in rows] for rows in content])


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310 - the caller's server
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 - as above
        return json.load(answer)


def train(checkpoint: Path, url: str, steps: int, seed: int) -> list[dict[str, Any]]:
    """What each trainer rank does. Gives a row for each step: its times, and means over all ranks."""
    dist.init_process_group("gloo")
    rank, rows = dist.get_rank(), []
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)  # bfloat16 in vLLM: updates cast
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    random = torch.Generator().manual_seed(RANKS * seed + rank)

    with Servers(model, [url], job="grpo") as servers:
        for step in range(1, steps + 1):
            begun = time.monotonic()
            update = servers.update(step)
            if not update.report.verified:
                raise SystemExit(f"step {step}: {update}")
            dist.barrier()  # rank 0 has resumed the server
            updated = time.monotonic()

            prompts = torch.randint(NUMBERS, (PROMPTS, PROMPT), generator=random)
            tokens, sampled = rollouts(url, prompts, version=step)
            rolled_out = time.monotonic()

            rewards = rewards_of(tokens)
            means = [rewards.mean()]
            for _ in range(EPOCHS):
                logprobs = logprobs_of(model, tokens)
                loss_of(logprobs, sampled, advantages_of(rewards)).backward()
                optimizer.step()
                optimizer.zero_grad()
                means.append((logprobs.detach() - sampled).abs().mean())
            totals = torch.stack(means)
            dist.all_reduce(totals)
            # The trainer's logprobs are vLLM's at first, as both hold the same weights; then they move away.
            reward, *apart = (totals / dist.get_world_size()).tolist()
            ended = time.monotonic()
            if rank == 0:
                rows.append(
                    {
                        "step": step,
                        "reward": reward,
                        "word": update.report.word,
                        "logprobs_apart": apart[0],
                        "logprobs_moved": apart[-1],
                        "pause_s": update.servers[0].paused_s,
                        "update_s": update.report.seconds,
                        "rollout_s": rolled_out - updated,
                        "train_s": ended - rolled_out,
                        "step_s": ended - begun,
                    }
                )
                print(f"reward {reward:.3f}  logprobs {apart[0]:.4f} apart  {update.report}", flush=True)
    dist.destroy_process_group()
    return rows


def summary(rows: list[dict[str, Any]]) -> bool:
    """Print what the steps have come to; whether the reward has risen."""
    few = min(10, len(rows) // 2)
    rewards = [row["reward"] for row in rows]
    first, last = statistics.fmean(rewards[:few]), statistics.fmean(rewards[-few:])
    times = ("update_s", "pause_s", "rollout_s", "train_s", "step_s")
    medians = {name: statistics.median(row[name] for row in rows) for name in times}
    print("median: " + ", ".join(f"{name[:-2]} {1000 * value:.0f} ms" for name, value in medians.items()))
    print(f"{len(rows)} verified updates; reward of {few} steps: {first:.3f} at first, {last:.3f} at last")
    return last > first


def make_checkpoint(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shown(arguments: list[str], more: dict[str, str]) -> list[str]:
    print("$", *(f"{name}={value}" for name, value in more.items()), shlex.join(arguments), flush=True)
    return arguments


@contextlib.contextmanager
def vllm_serve(checkpoint: Path, log: Path, seed: int) -> Iterator[str]:
    """The URL of a server of the checkpoint, once it is up."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),  # what `vllm serve` runs
        *("--model", str(checkpoint), "--host", "127.0.0.1", "--port", str(port), "--seed", str(seed)),
        *("--dtype", "bfloat16", "--skip-tokenizer-init", "--enforce-eager"),
        *("--enable-scale-out", "--weight-transfer-config", '{"backend": "weightbus"}'),
    ]
    with log.open("wb") as out:
        server = subprocess.Popen(  # noqa: S603 - the command above
            shown(command, settings), env={**os.environ, **settings}, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"vLLM is not up:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def run_all(checkpoint: Path | None, steps: int, seed: int, path: str | None) -> int:
    """The checkpoint, vLLM and the trainer's ranks; the trainer's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, log = checkpoint or Path(folder, "checkpoint"), Path(folder, "vllm.log")
        if not checkpoint.exists():
            make_checkpoint(checkpoint, seed)
        with vllm_serve(checkpoint, log, seed) as url:
            address = os.environ.get("WEIGHTBUS_ADDRESS", f"tcp://127.0.0.1:{free_port()}")
            settings = {"WEIGHTBUS_ADDRESS": address, "OMP_NUM_THREADS": "1"}
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
                *("--nproc-per-node", str(RANKS), __file__, "--checkpoint", str(checkpoint), "--url", url),
                *("--steps", str(steps), "--seed", str(seed), *(["--json", path] if path else [])),
            ]
            trainer = subprocess.run(shown(command, settings), env={**os.environ, **settings}, check=False)  # noqa: S603 - the command above
        if trainer.returncode:
            print(f"the last lines of vLLM:\n{log.read_text(errors='replace')[-4000:]}")
        return trainer.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of checkpoint, prompts and sampling")
    parser.add_argument("--json", metavar="FILE", help="write a row for each step")
    parser.add_argument("--checkpoint", type=Path, help="of the model; made where there is none")
    parser.add_argument("--url", help="of a running vLLM: this process is a trainer rank")
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.steps < 2:
        parser.error(f"--steps: expected 2 or more, got {args.steps}")
    if args.url and not args.checkpoint:
        parser.error("--url: expected --checkpoint with it, got none")
    if not args.url:
        return run_all(args.checkpoint, args.steps, args.seed, args.json)
    rows = train(args.checkpoint, args.url, args.steps, args.seed)
    if not rows:
        return 0  # rank 0 says it
    if args.json:
        Path(args.json).write_text(json.dumps(rows))
    return 0 if summary(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
