"""The training job: pulls paraphrases together, and gives each new version to the servers and the judge.

Started by run.py as: torchrun trainer.py --address ... --folder ... --steps N --deadline S
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import os
import time
from pathlib import Path

import minilm
import snapshot
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW, Optimizer

import weightbus

SCALE = 5.0  # of the cosines, before the softmax: an inverse temperature


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    return parser.parse_args()


def pairs_of_rank(rank: int, size: int) -> tuple[list[str], list[str]]:
    with Path(__file__).with_name("pairs.tsv").open(newline="") as lines:
        pairs = list(csv.reader(lines, delimiter="\t"))[rank::size]
    return [a for a, _ in pairs], [b for _, b in pairs]


def contrastive_loss(a: Tensor, b: Tensor) -> Tensor:
    """Row i of ``a`` shall find row i of ``b`` among all rows of ``b``."""
    return torch.nn.functional.cross_entropy(SCALE * a @ b.T, torch.arange(len(a), device=a.device))


def train(encode: minilm.SentenceEncoder, optimizer: Optimizer, pairs: tuple[list[str], list[str]]) -> float:
    """One optimizer step on all pairs; the mean loss over the ranks."""
    encode.model.train()
    loss = contrastive_loss(encode(pairs[0]), encode(pairs[1]))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def show(file: Path, encode: minilm.SentenceEncoder, facts: dict[str, str]) -> None:
    """Write what this job holds, and wait until the judge has taken it away. Collective."""
    encode.model.eval()
    with torch.no_grad():
        embeddings = encode(minilm.SENTENCES)
    weights = snapshot.full_weights(encode.model)
    if dist.get_rank() == 0:
        snapshot.write(file, weights, embeddings, facts)
        while file.exists():
            time.sleep(0.02)
    dist.barrier()


def main() -> None:
    args = arguments()
    faulthandler.dump_traceback_later(args.deadline, exit=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
    torch.manual_seed(dist.get_rank())

    encode = minilm.SentenceEncoder(minilm.pretrained_fsdp(mesh), device)
    optimizer = AdamW(encode.model.parameters(), lr=2e-5)
    pairs = pairs_of_rank(dist.get_rank(), dist.get_world_size())
    show(snapshot.path(args.folder, "trainer", 0), encode, {})

    with weightbus.Publisher(encode.model, address=args.address, min_replicas=1) as publisher:
        for step in range(1, args.steps + 1):
            loss = train(encode, optimizer, pairs)
            report = publisher.update(version=step)
            verdict = publisher.check()  # a second look, at what the servers now hold live
            facts = {
                "loss": str(loss),
                "seconds": str(report.seconds),
                "nbytes": str(report.nbytes),
                "update": str(report),
                "check": str(verdict),
                "check_seconds": str(verdict.digest_s),
            }
            show(snapshot.path(args.folder, "trainer", step), encode, facts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
