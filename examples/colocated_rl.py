"""A policy learns by its own rollouts, which other processes of this host sample with the newest weights.

    python examples/colocated_rl.py

The task: count up, modulo 16, from a given number. The reward of a token is 1 if it is its predecessor plus
one. The trainer (REINFORCE, rewards against their mean) updates both rollout processes after every step, by
peer copies: out of its GPU's memory where there is one, else out of shared memory. Each rollout says which
version it was sampled with and how probable its tokens were, and the trainer compares both with its own.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import weightbus

NUMBERS, LENGTH = 16, 8
WORKERS, EPISODES, STEPS = 2, 64, 40


class Policy(nn.Module):
    """Logits of the next number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUMBERS, 32)
        self.hidden = nn.Linear(32, 64)
        self.out = nn.Linear(64, NUMBERS)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.embed(numbers))))


def device_of(worker: int) -> torch.device:
    """The trainer is worker 0; rollouts share its GPU where there is only one."""
    gpus = torch.cuda.device_count()
    return torch.device("cuda", worker % gpus) if gpus else torch.device("cpu")


def rollout(worker: int, address: str, batches: Any) -> None:
    """Samples a batch with each version that is committed, until the trainer leaves."""
    torch.set_num_threads(1)
    torch.manual_seed(worker)
    device = device_of(worker)
    policy = Policy().to(device)

    @torch.no_grad()
    def sample(version: int) -> None:
        numbers = torch.randint(NUMBERS, (EPISODES, 1), device=device)
        for _ in range(LENGTH):
            following = torch.multinomial(policy(numbers[:, -1]).softmax(-1), 1)
            numbers = torch.cat([numbers, following], 1)
        scores = log_probabilities(policy, numbers)
        batches.put((version, numbers.tolist(), scores.tolist()))

    with weightbus.Subscriber(policy, address=address, replica=worker, on_commit=sample) as subscriber:
        subscriber.serve()


def log_probabilities(policy: Policy, numbers: Tensor) -> Tensor:
    """Of each number given the one before it: [episodes, LENGTH]."""
    scores = policy(numbers[:, :-1]).log_softmax(-1)
    return scores.gather(2, numbers[:, 1:, None]).squeeze(2)


def train(address: str, batches: Any) -> float:
    """The mean reward of the last step."""
    device = device_of(0)
    policy = Policy().to(device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.005)
    reward = torch.zeros(())
    with weightbus.Publisher(policy, address=address, min_replicas=WORKERS, route="peer") as publisher:
        for step in range(STEPS + 1):
            report = publisher.update(step)
            if not report.verified:
                raise SystemExit(f"step {step}: {report}")
            # What the workers sampled with these weights: they do so as soon as they have them.
            found = [batches.get(timeout=60) for _ in range(WORKERS)]
            if [version for version, _, _ in found] != [step] * WORKERS:
                raise SystemExit(f"step {step}: expected rollouts of its weights, got {found}")
            numbers = torch.cat([torch.tensor(numbers, device=device) for _, numbers, _ in found])
            sampled = torch.cat([torch.tensor(scores, device=device) for _, _, scores in found])
            scores = log_probabilities(policy, numbers)
            torch.testing.assert_close(scores.detach(), sampled, rtol=1e-3, atol=1e-3)
            rewards = (numbers[:, 1:] == (numbers[:, :-1] + 1) % NUMBERS).float()
            reward = rewards.mean()
            if step % 5 == 0:
                print(f"step {step:2}  reward {reward:.3f}  {report}", flush=True)
            if step == STEPS:
                break
            loss = -((rewards - reward) * scores).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return float(reward)


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    begun = time.monotonic()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    batches = context.Queue()
    workers = [
        context.Process(target=rollout, args=(worker, address, batches), daemon=True)
        for worker in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    reward = train(address, batches)
    for worker in workers:
        worker.join(30)
    seconds = time.monotonic() - begun
    print(f"reward {reward:.3f} after {STEPS} steps, {STEPS + 1} verified updates, {seconds:.1f} s")
    return 0 if reward > 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
