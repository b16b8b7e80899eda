"""What servers that come and go cost the updates of those that stay, and how soon they are current.

    python benchmarks/joiners.py --json benchmarks/results/joiners-cpu.json

One trainer rank, one replica that stays, and one that joins, stays for a while once it is current, leaves and
joins again, on gloo over loopback. Timed are the updates, from the call to the commit, and how long the joiner
waits from its hello until it holds the committed version. Cases, each with processes of its own: ``alone``,
without a joiner; ``next update``, with ``catch_up=False``, where it gets what comes next; ``catch-up``, where
between updates it gets what the other replica holds. Steps: with pauses between updates, and without.
Bits first: the joiner compares what it holds with what the version is drawn to be, each time.
Exits with 1 if a bit was wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from typing import Any

import record
import torch
from rich.console import Console
from rich.table import Table
from update import free_ports

import weightbus

CASES = ("alone", "next update", "catch-up")


def tensors(args: argparse.Namespace) -> list[tuple[str, torch.Tensor]]:
    rows = args.mb * (1 << 20) // 4 // 1024 // 8
    return [(f"layers.{i}.weight", torch.zeros(rows, 1024)) for i in range(8)]


def trainer(args: argparse.Namespace, step_s: float, case: str, results: Any, over: Any) -> None:
    source = tensors(args)
    seconds, replicas = [], []
    with weightbus.Publisher(
        source, address=args.address, rank=0, size=1, ready_timeout_s=20, catch_up=case == "catch-up"
    ) as publisher:
        for version in range(1, args.updates + 2):
            for _, tensor in source:
                tensor.fill_(float(version))
            begun = time.perf_counter()
            report = publisher.update(version)
            if version > 1:  # the first one makes the plan
                seconds.append(time.perf_counter() - begun)
                replicas.append(len(report.replicas))
            time.sleep(step_s)
        over.set()  # for the joiner, which may just be away
        time.sleep(2 * args.away_s + 1.0)
        results.put(("trainer", seconds, replicas))


def server(args: argparse.Namespace) -> None:
    with weightbus.Subscriber(tensors(args), address=args.address, replica=0, rank=0, replica_size=1) as one:
        one.serve()


def joiner(args: argparse.Namespace, results: Any, over: Any) -> None:
    waited, right = [], True
    while not over.is_set():
        target = tensors(args)
        with weightbus.Subscriber(target, address=args.address, replica=1, rank=0, replica_size=1) as one:
            begun = time.perf_counter()
            while one.version is None and not over.is_set():
                one.poll(0.05)
            if one.version is not None:
                waited.append(time.perf_counter() - begun)
                right &= all(bool((tensor == one.version).all()) for _, tensor in target)
            until = time.monotonic() + args.stay_s
            while time.monotonic() < until and not over.is_set():
                one.poll(0.05)
        time.sleep(args.away_s)
    results.put(("joiner", waited, right))


def run(args: argparse.Namespace, case: str, step_s: float) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    results, over = spawn.Queue(), spawn.Event()
    (port,) = free_ports(1)
    args.address = f"tcp://127.0.0.1:{port}"
    processes = [spawn.Process(target=trainer, args=(args, step_s, case, results, over), daemon=True)]
    processes.append(spawn.Process(target=server, args=(args,), daemon=True))
    if case != "alone":
        processes.append(spawn.Process(target=joiner, args=(args, results, over), daemon=True))
    for process in processes:
        process.start()
    found = {}
    for _ in range(1 if case == "alone" else 2):
        name, *rest = results.get(timeout=args.limit_s)
        found[name] = rest
    for process in processes:
        process.join(20)
        process.kill()
    seconds, replicas = found["trainer"]
    waited, right = found.get("joiner", ([], True))
    return {
        "case": case,
        "step_s": step_s,
        "updates": len(seconds),
        "with_joiner": sum(count == 2 for count in replicas),
        "p50_s": statistics.median(seconds),
        "mean_s": statistics.fmean(seconds),
        "most_s": max(seconds),
        "joined": len(waited),
        "current_after_p50_s": statistics.median(waited) if waited else None,
        "current_after_most_s": max(waited, default=None),
        "right": right,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--steps", type=float, nargs="+", default=[3.0, 0.0], help="seconds between updates")
    parser.add_argument("--stay-s", type=float, default=0.5)
    parser.add_argument("--away-s", type=float, default=0.3)
    parser.add_argument("--limit-s", type=float, default=300.0)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    rows, load = [], os.getloadavg()[0]
    for step_s in args.steps:
        updates, args.updates = args.updates, args.updates * (1 if step_s else 10)
        rows += [run(args, case, step_s) for case in CASES]
        args.updates = updates
    table = Table(
        "case", "step s", "updates", "of both", "p50 ms", "mean ms", "most ms", "joined", "current after s"
    )
    for row in rows:
        after = row["current_after_p50_s"]
        table.add_row(
            row["case"],
            f"{row['step_s']:.1f}",
            str(row["updates"]),
            str(row["with_joiner"]),
            *(f"{row[key] * 1e3:.1f}" for key in ("p50_s", "mean_s", "most_s")),
            str(row["joined"]),
            "" if after is None else f"{after:.2f}, at most {row['current_after_most_s']:.2f}",
        )
    Console().print(table)
    record.write(args.json, "joiners", rows, mb=args.mb, load_before=load)
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
