"""``update()`` beside a raw broadcast of the same bytes and beside today's schemes, on the same tensors.

    python benchmarks/update.py --json benchmarks/results/update.json --plot benchmarks/results/update.png

One trainer rank and one server rank: NCCL where there are two GPUs, else gloo on the CPU. Bits first: each
scheme is run once onto zeroed tensors and compared bit by bit, and again after the timed rounds. In a round
all schemes take their turn. A raw broadcast is one ``broadcast`` of one buffer over a group of its own, timed
until both ranks have finished it; an update is timed from the call to the commit on all ranks. Ratios are of
medians over all rounds, with the interval that holds 95 % of resampled ratios.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import record
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from schemes import SCHEMES, as_bytes
from shapes import MODELS
from timing import timings
from torch import Tensor

import weightbus

PAUSE_S = 0.2  # longer than the hub looks out for a next update
PAUSED = f"weightbus, after {PAUSE_S:g} s of nothing"
RAW = "raw broadcast of one buffer"
HASHED_BYTES = 1 << 30
GEMMS = 100


class Rank:
    """One of the two processes, with what both do alike. Rank 0 trains, rank 1 serves."""

    def __init__(self, rank: int, args: argparse.Namespace) -> None:
        self.rank, self.args = rank, args
        self.sends = rank == 0
        self.cuda = torch.cuda.device_count() >= 2
        self.device = torch.device("cuda", rank) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        self.backend = "nccl" if self.cuda else "gloo"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.cuda else "gloo",
            init_method=f"tcp://127.0.0.1:{args.port}",
            rank=rank,
            world_size=2,
        )
        self.rows: list[dict[str, Any]] = []
        self._ports = iter(args.ports)

    def tensors(self, model: str, dtype: torch.dtype, *, filled: bool) -> dict[str, Tensor]:
        if filled:
            return {name: drawn(i, shape, self.device).to(dtype) for i, (name, shape) in items(model)}
        return {
            name: torch.zeros(shape, dtype=dtype, device=self.device) for name, shape in MODELS[model].items()
        }

    def wrong(self, model: str, target: dict[str, Tensor]) -> int:
        """How many bytes differ on the server rank from what the trainer rank drew."""
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        if not self.sends:
            for i, (name, shape) in items(model):
                expected = drawn(i, shape, self.device).to(target[name].dtype)
                count += (as_bytes(expected) != as_bytes(target[name])).sum()
        total = count.cpu()
        dist.all_reduce(total)
        return int(total)

    def both(self, value: float, op: Any = dist.ReduceOp.MAX) -> float:
        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number, op)
        return float(number)

    def timed(self, run: Callable[[], None]) -> float:
        """Seconds until both ranks have finished ``run``."""
        self.both(0.0)
        begun = time.perf_counter()
        run()
        if self.cuda:
            torch.cuda.synchronize()
        return self.both(time.perf_counter() - begun)

    def peak(self, run: Callable[[], Any]) -> tuple[Any, int]:
        """What ``run`` returns, and the device memory that it took, on the rank where it was more."""
        if not self.cuda:
            return run(), 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        answer = run()
        torch.cuda.synchronize()
        return answer, int(self.both(torch.cuda.max_memory_allocated() - before))

    def timings(self, seconds: Sequence[float], raw: Sequence[float]) -> dict[str, Any]:
        """Of the trainer rank, which alone writes rows."""
        return timings(seconds, raw) if self.sends else {}

    def allocations(self) -> int:
        return int(torch.cuda.memory_stats()["allocation.all.allocated"]) if self.cuda else 0


class Bus:
    """weightbus between the two ranks, with a hub of its own."""

    def __init__(
        self,
        rank: Rank,
        tensors: dict[str, Tensor],
        bucket_bytes: int | None,
        route: Literal["broadcast", "peer"] = "broadcast",
    ) -> None:
        self.rank, self.route = rank, route
        self.version = 0
        address = f"tcp://127.0.0.1:{next(rank._ports)}"
        if rank.sends:
            self.end: Any = weightbus.Publisher(
                list(tensors.items()),
                address=address,
                rank=0,
                size=1,
                bucket_bytes=bucket_bytes,
                route=route,
            )
        else:
            self.end = weightbus.Subscriber(list(tensors.items()), address=address, rank=0, replica_size=1)

    def update(self, verify: bool) -> weightbus.Report | None:
        """The trainer rank's report."""
        self.version += 1
        if self.rank.sends:
            report: weightbus.Report = self.end.update(self.version, verify=verify)
            word = "verified" if verify else "unverified"
            if (report.route, report.word) != (self.route, word):
                raise SystemExit(f"expected {word} by the {self.route} route, got {report}")
            return report
        self._serve()
        return None

    def check(self) -> float:
        if self.rank.sends:
            verdict = self.end.check()
            if verdict.word != "verified":
                raise SystemExit(f"expected verified, got {verdict}")
            return float(verdict.seconds)
        self._serve()
        return 0.0

    def _serve(self) -> None:
        while not self.end.poll(timeout_s=1.0):
            pass

    def close(self) -> None:
        self.rank.both(0.0)
        self.end.close()
        self.rank.both(0.0)


def items(model: str) -> Any:
    return enumerate(MODELS[model].items())


def drawn(index: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(index)
    return torch.randn(shape, generator=generator, device=device)


def compare(rank: Rank, model: str, *, masters: bool) -> None:
    """All schemes on one model; with fp32 ``masters``, raw bytes of the wire and weightbus only."""
    args = rank.args
    dtype = torch.float32 if masters and rank.sends else torch.bfloat16
    tensors = rank.tensors(model, dtype, filled=rank.sends)
    order = list(tensors.values())
    nbytes = 2 * sum(t.numel() for t in order)
    raw = torch.empty(nbytes, dtype=torch.uint8, device=rank.device)
    buses = {
        (f"weightbus, {mib} MiB" if mib else "weightbus"): Bus(rank, tensors, mib << 20 if mib else None)
        for mib in args.bucket_mib
    }
    runs: dict[str, Callable[[], Any]] = {RAW: lambda: dist.broadcast(raw, 0)}
    if not masters and not args.only_weightbus:
        for name, scheme in SCHEMES.items():
            runs[name] = lambda scheme=scheme: scheme(order, rank.sends)
    for name, bus in buses.items():
        runs[name] = lambda bus=bus: bus.update(False)
        runs[f"{name}, verified"] = lambda bus=bus: bus.update(True)
    case = "fp32 masters to bf16" if masters else "bf16"
    rows = take_turns(rank, model, case, tensors, runs)
    for row in rows:
        if rank.sends and row["what"].startswith("weightbus"):
            bus = buses[row["what"].removesuffix(", verified")]
            row["staging_bytes"] = bus.end._session.context.staging.nbytes
    rank.rows += rows
    last = next(iter(buses.values()))
    if not masters and "checks" in args.cases:
        checks = [last.check() for _ in range(args.rounds + 1)][1:]
        rank.rows.append(
            {"model": model, "case": "check", "what": "publisher.check()", "nbytes": nbytes}
            | {"wrong": rank.wrong(model, tensors)}
            | rank.timings(checks, checks)
        )
        rank.rows.append(hashed(rank, model, order))
    if not masters and "gemm" in args.cases and rank.cuda:
        rank.rows += beside_gemms(rank, model, last, raw)
    for bus in buses.values():
        bus.close()


def take_turns(
    rank: Rank, model: str, case: str, tensors: dict[str, Tensor], runs: dict[str, Callable[[], Any]]
) -> list[dict[str, Any]]:
    """A row for each of ``runs``, of which RAW is one: first bits, each run onto zeroed tensors, then times."""
    facts: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        if not rank.sends:
            for tensor in tensors.values():
                tensor.zero_()
        _, peak = rank.peak(run)
        facts[name] = {"wrong": 0 if name == RAW else rank.wrong(model, tensors), "peak_bytes": peak}
    for run in runs.values():
        rank.timed(run)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    allocated = dict.fromkeys(runs, 0)
    for _ in range(rank.args.rounds):
        for name, run in runs.items():
            answer: list[Any] = []
            before = rank.allocations()
            whole = rank.timed(lambda run=run, answer=answer: answer.append(run()))
            allocated[name] += rank.allocations() - before
            report = answer[0]
            seconds[name].append(_of_trainer(rank, report) if name.startswith("weightbus") else whole)
            if isinstance(report, weightbus.Report):
                stages[name].append(dict(report.stages))
    wrong = rank.wrong(model, tensors)
    rows = []
    for name in runs:
        row = {
            "model": model,
            "case": case,
            "what": name,
            "tensors": len(tensors),
            "nbytes": 2 * sum(tensor.numel() for tensor in tensors.values()),
            **facts[name],
            "allocations_while_timed": int(rank.both(allocated[name])),
        }
        row["wrong"] += wrong
        row |= rank.timings(seconds[name], seconds[RAW])
        if stages[name]:
            row["stages_s"] = {k: statistics.median(s[k] for s in stages[name]) for k in stages[name][0]}
        rows.append(row)
    return rows


def _of_trainer(rank: Rank, report: Any) -> float:
    return rank.both(report.seconds if rank.sends else 0.0)


def hashed(rank: Rank, model: str, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """What checkers do that copy to the host and hash there: tensor by tensor, as much as fits the patience."""
    begun, nbytes = time.perf_counter(), 0
    for tensor in tensors:
        if nbytes + tensor.nbytes > HASHED_BYTES:
            continue
        hashlib.sha256(as_bytes(tensor).cpu().numpy()).hexdigest()
        nbytes += tensor.nbytes
    seconds = rank.both(time.perf_counter() - begun)
    row = {"model": model, "case": "check", "what": ".cpu() and hashlib's SHA-256, a piece of the model"}
    return row | {"nbytes": nbytes, "wrong": 0} | rank.timings([seconds], [seconds])


def beside_gemms(rank: Rank, model: str, bus: Bus, raw: Tensor) -> list[dict[str, Any]]:
    """A loop of bf16 products, 8192 cubed, on the server's GPU: what it and the update take of each other."""
    size = 8192
    a, b, c = (torch.randn(size, size, dtype=torch.bfloat16, device=rank.device) for _ in range(3))
    stream = torch.cuda.Stream()

    def loop(run: Callable[[], Any]) -> tuple[float, float]:
        """Seconds of the loop on the server, and of ``run`` beside it."""
        rank.both(0.0)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if not rank.sends:
            with torch.cuda.stream(stream):
                begin.record()
                for _ in range(GEMMS):
                    torch.matmul(a, b, out=c)
                end.record()
        begun = time.perf_counter()
        report = run()
        if isinstance(report, weightbus.Report):
            seconds = report.seconds
        else:
            torch.cuda.current_stream().synchronize()
            seconds = time.perf_counter() - begun
        torch.cuda.synchronize()
        loop_s = 0.0 if rank.sends else begin.elapsed_time(end) / 1e3
        return rank.both(loop_s), rank.both(seconds if rank.sends else 0.0)

    def raw_once() -> None:
        dist.broadcast(raw, 0)

    rows = []
    runs = {"nothing": lambda: None, RAW: raw_once, "weightbus, verified": lambda: bus.update(True)}
    for run in runs.values():
        loop(run)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rank.args.rounds):
        for name, run in runs.items():
            found[name].append(loop(run))
    alone = statistics.median(loop_s for loop_s, _ in found["nothing"])
    for name, pairs in found.items():
        loops, seconds = zip(*pairs, strict=True)
        row = {"model": model, "case": f"beside {GEMMS} products on the server's GPU", "what": name, "wrong": 0}
        row |= rank.timings(seconds, seconds)
        rows.append(row | {"loop_s": statistics.median(loops), "loop_lost_s": statistics.median(loops) - alone})
    return rows


def latency(rank: Rank) -> None:
    """Planned updates of a small model: what control costs."""
    rounds = 10 * rank.args.rounds
    tensors = rank.tensors("1mb", torch.bfloat16, filled=rank.sends)
    raw = torch.empty(sum(t.nbytes for t in tensors.values()), dtype=torch.uint8, device=rank.device)
    bus = Bus(rank, tensors, None)
    runs: dict[str, Callable[[], Any]] = {
        RAW: lambda: dist.broadcast(raw, 0),
        "weightbus": lambda: bus.update(False),
        "weightbus, verified": lambda: bus.update(True),
        PAUSED: lambda: (time.sleep(PAUSE_S), bus.update(False))[1],
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 5):
        for name, run in runs.items():
            if name == PAUSED and turn % 5:
                continue
            answer: list[Any] = []
            whole = rank.timed(lambda run=run, answer=answer: answer.append(run()))
            took = whole if name == RAW else _of_trainer(rank, answer[0])
            if turn >= 5:
                seconds[name].append(took)
    wrong = rank.wrong("1mb", tensors)
    for name in runs:
        row = {"model": "1mb", "case": "latency", "what": name, "tensors": len(tensors), "nbytes": raw.nbytes}
        rank.rows.append(row | {"wrong": wrong} | rank.timings(seconds[name], seconds[RAW]))
    bus.close()


def work(index: int, args: argparse.Namespace, results: Any) -> None:
    rank = Rank(index, args)
    if "latency" in args.cases:
        latency(rank)
    for model in args.models:
        for masters in [False, True] if "masters" in args.cases else [False]:
            compare(rank, model, masters=masters)
            gc.collect()
            if rank.cuda:
                torch.cuda.empty_cache()
        if rank.sends:
            results.put((rank.backend, rank.rows))
            rank.rows = []
    if rank.sends:
        results.put((rank.backend, rank.rows))
        results.put(None)
    dist.destroy_process_group()


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def show(rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    table = Table()
    for column in ("model", "case", "what", "p50 ms", "p99 ms", "GB/s", "of raw", "peak MiB", "#wrong"):
        table.add_column(column, justify="left" if column in ("model", "case", "what") else "right")
    for row in rows:
        figures = [
            f"{row['p50_s'] * 1e3:.2f}",
            f"{row['p99_s'] * 1e3:.2f}",
            f"{row['nbytes'] / row['p50_s'] / 1e9:.2f}" if "nbytes" in row else "",
            f"{row['of_raw']:.3f}" if row["case"] not in ("check",) else "",
            f"{row['peak_bytes'] / 2**20:.0f}" if row.get("peak_bytes") else "",
        ]
        table.add_row(row["model"], row["case"], row["what"], *figures, str(row["wrong"]))
    Console(width=150).print(table)
    for row in rows:
        if "stages_s" in row:
            stages = ", ".join(f"{k} {v * 1e3:.2f}" for k, v in row["stages_s"].items())
            print(f"{row['model']}, {row['case']}, {row['what']}: stages, ms: {stages}")
        if "loop_s" in row:
            print(f"{row['what']}: loop {row['loop_s'] * 1e3:.1f} ms, lost {row['loop_lost_s'] * 1e3:.1f} ms")


def plot(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Time against model size, a line for each scheme."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["case"] == "bf16":
            lines.setdefault(row["what"], []).append((row["nbytes"] / 1e9, row["p50_s"] * 1e3))
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, points in lines.items():
        points.sort()
        style = "o-" if name.startswith("weightbus") else "k--" if name == RAW else "s:"
        axes.plot([x for x, _ in points], [y for _, y in points], style, label=name)
    axes.set(xlabel="model, GB", ylabel="update, ms (median)", xscale="log", yscale="log")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(description="update() beside a raw broadcast and beside other schemes")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="by default those that fit this machine")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--cases", nargs="*", default=["masters", "checks", "latency", "gemm"], help="beside bf16 to bf16"
    )
    parser.add_argument(
        "--bucket-mib", nargs="+", type=int, default=[0], help="bucket_bytes to compare, in MiB"
    )
    parser.add_argument("--only-weightbus", action="store_true", help="leave the other schemes out")
    parser.add_argument("--json", metavar="FILE", help="write the result")
    parser.add_argument("--plot", metavar="FILE", help="draw time against model size (needs matplotlib)")
    args = parser.parse_args()
    gpus = torch.cuda.device_count() >= 2
    if not args.models:
        args.models = (
            ["qwen3-0.6b", "z-image-turbo", "qwen3-moe-scaled", "qwen3-8b"] if gpus else ["qwen3-0.6b"]
        )
    args.port, *args.ports = free_ports(2 + len(args.models) * 2 * len(args.bucket_mib))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=work, args=(i, args, results), daemon=True) for i in range(2)]
    for process in processes:
        process.start()
    rows: list[dict[str, Any]] = []
    backend = ""
    while (answer := next_answer(results, processes)) is not None:
        backend, found = answer
        show(found)
        rows += found
        record.write(args.json, "update", rows, backend=backend)  # each time: a later case may be cut off
    for process in processes:
        process.join(60)
    if args.plot:
        plot(args.plot, rows)
    return 1 if any(row["wrong"] for row in rows) else 0


def next_answer(results: Any, processes: Sequence[Any]) -> Any:
    """The next rows; SystemExit if a rank has died without them."""
    while True:
        try:
            return results.get(timeout=5)
        except Exception:
            if any(process.exitcode not in (None, 0) for process in processes):
                raise SystemExit("a rank has failed") from None


if __name__ == "__main__":
    raise SystemExit(main())
