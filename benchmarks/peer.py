"""The peer route between two processes of one host, beside a raw broadcast and a plain copy of the same bytes.

    python benchmarks/peer.py --json benchmarks/results/peer.json

Bits first, and again after the timed rounds: ``#wrong`` counts bytes of the server's tensors that differ from
what the trainer drew. In a round all rows of a case take their turn. An update is timed from the call to the
commit on all ranks; a raw broadcast is one NCCL ``broadcast`` of one buffer, timed until both ranks have
finished it; a plain copy is one device-to-device copy of one buffer. With two GPUs, the cases are: GPU 0 to
GPU 1, whole tensors and the left half of the columns of each matrix; the same within GPU 0; products on the
receiving GPU meanwhile; a model of 1 MB. With one GPU, those within it. On the CPU, shared memory and gloo.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import record
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from schemes import as_bytes
from shapes import MODELS
from timing import timings
from torch import Tensor
from update import drawn, free_ports, next_answer

import weightbus
from weightbus.memory import export

RAW, COPY = "raw broadcast of one buffer", "one copy of one buffer"
UPDATE, VERIFIED = "update", "update, verified"
COPY_BYTES = 8 << 30
GEMMS = 100
SIDE = 8192


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pair of source and target. halves: the source's tensors are the left halves of wider matrices.

    kernel: strided copies between GPUs by weightbus's own kernel instead of the copy engines, to compare.
    """

    name: str
    model: str
    server: torch.device
    halves: bool = False
    raw: bool = False
    copy: bool = False
    gemms: bool = False
    kernel: bool = False
    rounds_factor: int = 1


def cases(model: str, rounds_of_small: int = 10) -> list[Case]:
    gpus = torch.cuda.device_count()
    zero = torch.device("cuda", 0) if gpus else torch.device("cpu")
    found = []
    if gpus >= 2:
        one = torch.device("cuda", 1)
        found += [
            Case(name="GPU 0 to 1", model=model, server=one, raw=True, gemms=True),
            Case(name="GPU 0 to 1, half columns", model=model, server=one, halves=True, raw=True),
            Case(name="GPU 0 to 1, half columns, kernel", model=model, server=one, halves=True, kernel=True),
            Case(name="GPU 0 to 1", model="1mb", server=one, raw=True, rounds_factor=rounds_of_small),
        ]
    where = "within GPU 0" if gpus else "CPU"
    return [
        *found,
        Case(name=where, model=model, server=zero, copy=True, raw=not gpus),
        Case(name=f"{where}, half columns", model=model, server=zero, copy=True, halves=True),
        Case(name=where, model="1mb", server=zero, copy=True, rounds_factor=rounds_of_small),
    ]


class Rank:
    """One of the two processes. Rank 0 trains, on GPU 0; rank 1 serves, where the case says."""

    def __init__(self, rank: int, args: argparse.Namespace) -> None:
        self.args, self.sends = args, rank == 0
        self.cuda = torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= 2 else "gloo"
        store = f"tcp://127.0.0.1:{args.port}"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=2)
        self._ports = iter(args.ports)
        self.device = torch.device("cpu")

    def run(self, case: Case) -> list[dict[str, Any]]:
        """The rows of a case; only the trainer rank's have figures."""
        self.device = torch.device("cuda", 0) if self.cuda and self.sends else case.server
        if self.cuda:
            torch.cuda.set_device(self.device)
        tensors = dict(self._tensors(case))
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        kept = export.device_id
        if case.kernel:
            export.device_id = lambda device: "one GPU, as far as copies go"
        end = self._end(tensors)
        version = 0

        def update(verify: bool) -> float:
            nonlocal version
            version += 1
            if not self.sends:
                while not end.poll(timeout_s=1.0):
                    pass
                return 0.0
            report = end.update(version, verify=verify)
            if (report.route, report.word) != ("peer", "verified" if verify else "unverified"):
                raise SystemExit(f"expected an update by the peer route, got {report}")
            return float(report.seconds)

        runs: dict[str, Callable[[], float]] = {
            UPDATE: lambda: update(False),
            VERIFIED: lambda: update(True),
        }
        sizes = dict.fromkeys(runs, nbytes)
        if case.raw:
            raw = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            runs, sizes = (
                {RAW: lambda: self._timed(lambda: dist.broadcast(raw, 0)), **runs},
                {RAW: nbytes, **sizes},
            )
        if case.copy:
            # Memory for a copy of its own; where the model is larger, its rate is what counts.
            pair = [
                torch.empty(min(nbytes, COPY_BYTES), dtype=torch.uint8, device=self.device)
                for _ in range(0 if self.sends else 2)
            ]
            runs = {COPY: lambda: self._timed(lambda: None if self.sends else pair[0].copy_(pair[1])), **runs}
            sizes = {COPY: min(nbytes, COPY_BYTES), **sizes}
        wrong = dict.fromkeys(runs, 0)
        for name in (UPDATE, VERIFIED):
            if not self.sends:
                for tensor in tensors.values():
                    tensor.zero_()
            runs[name]()
            wrong[name] = self._wrong(case.model, tensors)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(self.args.rounds * case.rounds_factor + 2):
            for name, run in runs.items():
                self._both(0.0)
                took = self._both(run())
                if turn >= 2:
                    seconds[name].append(took)
        again = self._wrong(case.model, tensors)
        base = next(iter(runs))
        rows = [
            {
                "model": case.model,
                "case": case.name,
                "what": name,
                "tensors": len(tensors),
                "nbytes": sizes[name],
                "wrong": wrong[name] + again,
                **timings(seconds[name], seconds[base]),
            }
            for name in runs
        ]
        for row in rows:
            row["of_rate"] = row["nbytes"] / row["p50_s"] / (rows[0]["nbytes"] / rows[0]["p50_s"])
        if self.cuda and case.gemms:
            rows += self._beside_gemms(case, {name: runs[name] for name in (RAW, UPDATE, VERIFIED)})
        self._both(0.0)
        end.close()
        export.device_id = kept
        self._both(0.0)
        return rows

    def _end(self, tensors: dict[str, Tensor]) -> Any:
        address = f"tcp://127.0.0.1:{next(self._ports)}"
        if self.sends:
            return weightbus.Publisher(list(tensors.items()), address=address, rank=0, size=1, route="peer")
        return weightbus.Subscriber(list(tensors.items()), address=address, rank=0, replica_size=1)

    def _tensors(self, case: Case) -> Any:
        """The trainer's are drawn; of a matrix's halves, in place in the whole. The server's are zero."""
        for i, (name, shape) in enumerate(MODELS[case.model].items()):
            halves = case.halves and len(shape) == 2
            kept = (shape[0], shape[1] // 2) if halves else shape
            if self.sends:
                whole = drawn(i, shape, self.device).to(torch.bfloat16)
                yield name, whole[:, : kept[1]] if halves else whole
            else:
                yield name, torch.zeros(kept, dtype=torch.bfloat16, device=self.device)

    def _wrong(self, model: str, tensors: dict[str, Tensor]) -> int:
        """How many bytes differ on the server rank from what the trainer rank drew."""
        count = torch.zeros((), dtype=torch.int64)
        if self.sends:
            dist.all_reduce(count)
            return int(count)
        for i, (name, shape) in enumerate(MODELS[model].items()):
            found = tensors[name]
            expected = drawn(i, shape, self.device).to(torch.bfloat16)
            if expected.shape != found.shape:
                expected = expected[:, : found.shape[1]].contiguous()
            count += (as_bytes(expected) != as_bytes(found)).sum().cpu()
        dist.all_reduce(count)
        return int(count)

    def _both(self, value: float) -> float:
        """The larger of both ranks' values, once both are here."""
        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return float(number)

    def _timed(self, run: Callable[[], Any]) -> float:
        self._both(0.0)
        begun = time.perf_counter()
        run()
        if self.cuda:
            torch.cuda.current_stream().synchronize()
        return time.perf_counter() - begun

    def _beside_gemms(self, case: Case, runs: dict[str, Callable[[], float]]) -> list[dict[str, Any]]:
        """A loop of bf16 products on the server's GPU: what it and an update take of each other."""
        a, b, c = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device=self.device) for _ in range(3))
        stream = torch.cuda.Stream()

        def loop(run: Callable[[], float]) -> tuple[float, float]:
            """Seconds of the loop on the server, and of ``run`` beside it."""
            self._both(0.0)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if not self.sends:
                with torch.cuda.stream(stream):
                    begin.record()
                    for _ in range(GEMMS):
                        torch.matmul(a, b, out=c)
                    end.record()
            took = self._both(run())
            torch.cuda.synchronize()
            return self._both(0.0 if self.sends else begin.elapsed_time(end) / 1e3), took

        runs = {"nothing": lambda: 0.0, **runs}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for turn in range(self.args.rounds + 1):
            for name, run in runs.items():
                pair = loop(run)
                if turn:
                    found[name].append(pair)
        alone = statistics.median(loop_s for loop_s, _ in found["nothing"])
        rows = []
        for name, pairs in found.items():
            loops, seconds = zip(*pairs, strict=True)
            rows.append(
                {
                    "model": case.model,
                    "case": f"beside {GEMMS} products on GPU 1",
                    "what": name,
                    "wrong": 0,
                    "p50_s": statistics.median(seconds),
                    "loop_s": statistics.median(loops),
                    "loop_lost_s": statistics.median(loops) - alone,
                }
            )
        return rows


def work(index: int, args: argparse.Namespace, results: Any) -> None:
    rank = Rank(index, args)
    for case in cases(args.model):
        rows = rank.run(case)
        gc.collect()
        if rank.cuda:
            torch.cuda.empty_cache()
        if rank.sends:
            results.put(rows)
    if rank.sends:
        results.put(None)
    dist.destroy_process_group()


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table()
    for column in ("model", "case", "what", "p50 ms", "p99 ms", "GB/s", "of first", "#wrong"):
        table.add_column(column, justify="left" if column in ("model", "case", "what") else "right")
    for row in rows:
        timed = "nbytes" in row
        figures = [
            f"{row['p50_s'] * 1e3:.3f}",
            f"{row['p99_s'] * 1e3:.3f}" if timed else "",
            f"{row['nbytes'] / row['p50_s'] / 1e9:.2f}" if timed else "",
            f"{row['of_rate']:.3f}" if timed else f"loop {row['loop_lost_s'] * 1e3:+.1f} ms",
        ]
        table.add_row(row["model"], row["case"], row["what"], *figures, str(row["wrong"]))
    Console(width=140).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="the peer route beside a raw broadcast and a plain copy")
    on_cpu = torch.cuda.device_count() == 0
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b" if on_cpu else "qwen3-8b")
    parser.add_argument(
        "--rounds", type=int, default=15, help="timed rounds of each case, 10 times of the 1 MB one"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result")
    args = parser.parse_args()
    args.port, *args.ports = free_ports(1 + len(cases(args.model)))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=work, args=(i, args, results), daemon=True) for i in range(2)]
    for process in processes:
        process.start()
    rows: list[dict[str, Any]] = []
    while (found := next_answer(results, processes)) is not None:
        show(found)
        rows += found
        record.write(args.json, "peer", rows)  # each time: a later case may be cut off
    for process in processes:
        process.join(60)
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
