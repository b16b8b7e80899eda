"""``update()`` beside a raw broadcast of the same bytes: bits first, then interleaved pairs.

    python benchmarks/update.py --model qwen3-0.6b --pairs 30 --json benchmarks/results/update-cpu.json

One trainer rank and one server rank, gloo on CPU, or NCCL where there are two GPUs. A raw broadcast is
one ``broadcast`` of one buffer over a group of its own, timed until both ranks have finished it; an
update is timed from the call to the commit on all ranks. Ratios are of medians over all pairs, with the
interval that holds 95 % of resampled ratios.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import socket
import statistics
import time
from collections.abc import Sequence
from typing import Any

import record
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from shapes import MODELS
from torch import Tensor

import weightbus


def tensors(model: str, seed: int, device: torch.device, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    generator = torch.Generator(device=device).manual_seed(seed)
    return [
        (name, torch.randn(shape, generator=generator, device=device).to(dtype))
        for name, shape in MODELS[model].items()
    ]


def setting(rank: int, port: int) -> tuple[torch.device, str]:
    """This rank's device and the group that carries the raw broadcasts."""
    cuda = torch.cuda.device_count() >= 2
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    return device, "nccl" if cuda else "gloo"


def raw_broadcast(buffer: Tensor) -> float:
    """Seconds until both ranks have finished one broadcast of ``buffer``."""
    dist.barrier(device_ids=[buffer.device.index] if buffer.is_cuda else None)
    begun = time.perf_counter()
    dist.broadcast(buffer, 0)
    if buffer.is_cuda:
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - begun)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def wrong_bytes(found: Sequence[tuple[str, Tensor]] = (), expected: Sequence[tuple[str, Tensor]] = ()) -> int:
    """How many bytes differ on the server rank, which alone gives tensors. Both ranks call."""
    count = torch.zeros((), dtype=torch.int64)
    for (_, one), (_, other) in zip(found, expected, strict=True):
        count += (one.view(-1).view(torch.uint8) != other.view(-1).view(torch.uint8)).sum().cpu()
    dist.all_reduce(count)
    return int(count)


def trainer(args: argparse.Namespace, results: Any) -> None:
    device, backend = setting(0, args.port)
    source = tensors(args.model, 0, device, args.dtype)
    raw = torch.cat([t.view(-1).view(torch.uint8) for _, t in source])
    updates, raws, stages = [], [], []
    with weightbus.Publisher(source, address=args.address, rank=0, size=1) as publisher:
        for version in range(args.warmup + args.pairs):
            report = publisher.update(version, verify=args.verify)
            seconds = raw_broadcast(raw)
            if version >= args.warmup:
                updates.append(report.seconds)
                raws.append(seconds)
                stages.append(dict(report.stages))
            if version == args.warmup - 1:
                wrong = wrong_bytes()
        wrong += wrong_bytes()
    results.put(
        {
            "backend": backend,
            "nbytes": report.nbytes,
            "tensors": report.tensors,
            "staging_bytes": report.staging_bytes,
            "wrong": wrong,
            "update_s": updates,
            "raw_s": raws,
            "stages_s": {k: statistics.median(s[k] for s in stages) for k in stages[0]},
        }
    )
    dist.destroy_process_group()


def server(args: argparse.Namespace) -> None:
    device, _ = setting(1, args.port)
    target = tensors(args.model, 1, device, args.dtype)
    raw = torch.empty(sum(t.nbytes for _, t in target), dtype=torch.uint8, device=device)
    with weightbus.Subscriber(target, address=args.address, rank=0, replica_size=1) as subscriber:
        for version in range(args.warmup + args.pairs):
            while not subscriber.poll(timeout_s=1.0):
                pass
            raw_broadcast(raw)
            if version == args.warmup - 1:
                wrong_bytes(target, tensors(args.model, 0, device, args.dtype))
                for _, tensor in target:
                    tensor.zero_()  # so that the timed updates have to write all of it again
        wrong_bytes(target, tensors(args.model, 0, device, args.dtype))
    dist.destroy_process_group()


def interval(one: Sequence[float], other: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95 % of the ratios of medians of resampled pairs (bootstrap, seeded)."""
    generator = random.Random(0)
    ratios = []
    for _ in range(draws):
        picked = [generator.randrange(len(one)) for _ in one]
        ratios.append(statistics.median(one[i] for i in picked) / statistics.median(other[i] for i in picked))
    ratios.sort()
    return ratios[int(0.025 * draws)], ratios[int(0.975 * draws)]


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description="update() beside a raw broadcast of the same bytes")
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=2, help="updates before bits are compared, at least 1")
    parser.add_argument("--verify", action="store_true", help="digest both ends in every update")
    parser.add_argument("--json", metavar="FILE", help="write the result")
    args = parser.parse_args()
    args.port, hub_port = free_port(), free_port()
    args.address = f"tcp://127.0.0.1:{hub_port}"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=trainer, args=(args, results), daemon=True),
        context.Process(target=server, args=(args,), daemon=True),
    ]
    for process in processes:
        process.start()
    row = results.get(timeout=1800)
    for process in processes:
        process.join(60)
    low, high = interval(row["update_s"], row["raw_s"])
    update, raw = statistics.median(row["update_s"]), statistics.median(row["raw_s"])
    row |= {
        "model": args.model,
        "dtype": str(args.dtype).removeprefix("torch."),
        "verify": args.verify,
        "ratio": update / raw,
        "ratio_95": [low, high],
    }
    table = Table(
        title=f"{args.model}, {row['tensors']} tensors, {row['nbytes'] / 1e9:.3f} GB, {row['backend']}"
    )
    for column in ("what", "p50 ms", "p99 ms", "GB/s", "#wrong"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, seconds in (("raw broadcast", row["raw_s"]), ("update", row["update_s"])):
        median = statistics.median(seconds)
        figures = (median * 1e3, quantile(seconds, 0.99) * 1e3, row["nbytes"] / median / 1e9)
        table.add_row(what, *(f"{figure:.2f}" for figure in figures), str(row["wrong"]))
    Console().print(table)
    print(f"ratio of medians {row['ratio']:.3f}, 95 % within {low:.3f} to {high:.3f}, {args.pairs} pairs")
    print("stages, ms: " + ", ".join(f"{k} {v * 1e3:.2f}" for k, v in row["stages_s"].items()))
    record.write(args.json, "update", [row])
    return 1 if row["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
