"""What the control channel costs: a small update beside its broadcast alone, and a hub with many ranks.

    python benchmarks/control.py --json benchmarks/results/control-cpu.json

Overhead: one trainer rank and one server rank on gloo over loopback; a planned, unverified update of 1 MB, in
pairs with the same broadcast alone, in turn. A broadcast is timed until both ranks have finished it, an update
from the call to the commit on all ranks.
Ranks: simulated server ranks (simulated.py) in processes of their own, 8 to a replica, and one trainer rank;
timed from its call to the outcome on it, first with facts to exchange, then planned. No byte of a weight
moves, so this is what the hub's phases take.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import record
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from simulated import Crowd, enter
from update import free_ports

import weightbus
from weightbus.control.start import listens

HERE = Path(__file__).parent
REPLICA = 8
IN_ONE_PROCESS = 128


def raw_broadcast(buffer: torch.Tensor) -> float:
    """Seconds until both ranks have finished one broadcast of ``buffer``."""
    dist.barrier()
    begun = time.perf_counter()
    dist.broadcast(buffer, 0)
    seconds = torch.tensor(time.perf_counter() - begun)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def source(nbytes: int) -> list[tuple[str, torch.Tensor]]:
    return [("weight", torch.arange(nbytes // 4, dtype=torch.float32))]


def trainer(args: argparse.Namespace, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{args.port}", rank=0, world_size=2)
    tensors = source(args.nbytes)
    raw = tensors[0][1].view(torch.uint8)
    updates, raws, stages = [], [], []
    with weightbus.Publisher(tensors, address=args.address, rank=0, size=1) as publisher:
        for version in range(args.warmup + args.pairs):
            dist.barrier()
            report = publisher.update(version, verify=args.verify)
            seconds = raw_broadcast(raw)
            if version >= args.warmup:
                updates.append(report.seconds)
                raws.append(seconds)
                stages.append(dict(report.stages))
    results.put({"update_s": updates, "raw_s": raws, "stages_s": medians(stages)})
    dist.destroy_process_group()


def medians(stages: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(stage[name] for stage in stages) for name in stages[0]}


def server(args: argparse.Namespace, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{args.port}", rank=1, world_size=2)
    target = [("weight", torch.zeros(args.nbytes // 4))]
    raw = torch.empty(args.nbytes, dtype=torch.uint8)
    with weightbus.Subscriber(target, address=args.address, rank=0, replica_size=1) as subscriber:
        for version in range(args.warmup + args.pairs):
            dist.barrier()
            while not subscriber.poll(timeout_s=1.0):
                pass
            if not torch.equal(target[0][1], source(args.nbytes)[0][1]):
                raise SystemExit(f"wrong weights after version {version}")
            target[0][1].zero_()
            raw_broadcast(raw)
    results.put({"wrong": 0})
    dist.destroy_process_group()


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    args.port, hub_port = free_ports(2)
    args.address = f"tcp://127.0.0.1:{hub_port}"
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=end, args=(args, results), daemon=True) for end in (trainer, server)]
    for process in processes:
        process.start()
    row: dict[str, Any] = {
        "what": "overhead",
        "nbytes": args.nbytes,
        "verify": args.verify,
        "pairs": args.pairs,
    }
    for _ in processes:
        row |= results.get(timeout=600)
    for process in processes:
        process.join(60)
    above = [(u - r) * 1e3 for u, r in zip(row["update_s"], row["raw_s"], strict=True)]
    return row | {
        "update_p50_ms": statistics.median(row["update_s"]) * 1e3,
        "update_p99_ms": quantile(row["update_s"], 0.99) * 1e3,
        "raw_p50_ms": statistics.median(row["raw_s"]) * 1e3,
        "above_p50_ms": (statistics.median(row["update_s"]) - statistics.median(row["raw_s"])) * 1e3,
        "pairs_above_p50_ms": statistics.median(above),
    }


def many_ranks(count: int, rounds: int) -> dict[str, Any]:
    """Seconds of the hub's phases with ``count`` simulated server ranks."""
    address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    root = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, "-m", "weightbus.hub", "--address", address]
    hub = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)  # noqa: S603 - ours
    crowds = []
    crowd = Crowd(address)
    try:
        while not listens(address):
            time.sleep(0.05)
        for first in range(0, count, IN_ONE_PROCESS):
            command = [sys.executable, str(HERE / "simulated.py"), "--address", address, "--size", str(REPLICA)]
            ranks = f"{first}:{min(count, first + IN_ONE_PROCESS)}"
            crowds.append(subprocess.Popen([*command, "--ranks", ranks], env=env))  # noqa: S603 - ours
        begun = time.monotonic()
        with weightbus.Client(address) as client:
            while len(client.status(0).peers) < count:
                if time.monotonic() - begun > 120:
                    raise SystemExit("the simulated ranks did not join")
                time.sleep(0.2)
            rank = crowd.join("trainer", 0, 1)
            crowd.run(lambda: rank.is_member, 30)
            seconds, phases = [], []
            for version in range(1, rounds + 2):
                begun = time.perf_counter()
                rank.send(enter(rank, version))
                if not crowd.run(lambda v=version: len(rank.outcomes) >= v, 60):
                    raise SystemExit("no outcome")
                seconds.append(time.perf_counter() - begun)
                outcome = rank.outcomes[-1]
                if (outcome.verdict, outcome.servers) != ("verified", count):
                    raise SystemExit(f"expected {count} verified, got {outcome.servers} {outcome.verdict}")
                phases.append(client.status(1).past[-1].phases)
    finally:
        for process in (*crowds, hub):
            process.terminate()
        for process in (*crowds, hub):
            process.wait(30)
        crowd.close()
    return {
        "what": "ranks",
        "ranks": count,
        "rounds": rounds,
        "surveyed_s": seconds[0],
        "planned_s": seconds[1:],
        "planned_p50_s": statistics.median(seconds[1:]),
        "planned_max_s": max(seconds[1:]),
        "phases_surveyed_s": phases[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="what the control channel costs")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--nbytes", type=int, default=1 << 20)
    parser.add_argument("--verify", action="store_true", help="digest both ends, too")
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", metavar="FILE", help="write the result")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = [overhead(args), many_ranks(args.ranks, args.rounds)]
    small, many = rows
    table = Table(title=f"{small['nbytes']} bytes, 1+1 ranks, {small['pairs']} pairs; {many['ranks']} ranks")
    for column in ("what", "p50 ms", "p99 or max ms"):
        table.add_column(column, justify="left" if column == "what" else "right")
    table.add_row(
        "broadcast alone", f"{small['raw_p50_ms']:.2f}", f"{quantile(small['raw_s'], 0.99) * 1e3:.2f}"
    )
    table.add_row("planned update", f"{small['update_p50_ms']:.2f}", f"{small['update_p99_ms']:.2f}")
    table.add_row("update above broadcast", f"{small['above_p50_ms']:.2f}", "")
    table.add_row(f"hub, {many['ranks']} ranks, first update", f"{many['surveyed_s'] * 1e3:.1f}", "")
    planned = (many["planned_p50_s"] * 1e3, many["planned_max_s"] * 1e3)
    table.add_row(f"hub, {many['ranks']} ranks, planned", *(f"{ms:.1f}" for ms in planned))
    Console().print(table)
    record.write(args.json, "control", rows)
    return 1 if small["above_p50_ms"] > 3.0 or many["planned_max_s"] > 1.0 or many["surveyed_s"] > 1.0 else 0


if __name__ == "__main__":
    raise SystemExit(main())
