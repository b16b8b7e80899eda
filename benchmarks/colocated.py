"""Colocated reinforcement learning: FSDP2's rows to tensor-parallel shards over the same ranks.

    python benchmarks/colocated.py                                  # one process
    torchrun --nproc-per-node 2 benchmarks/colocated.py --json benchmarks/results/colocated.json

Each rank is a trainer rank, with rows of every tensor, and a server rank, with its rows or columns. Masters are
bf16, or fp32, as under FSDP2's mixed precision; the target is bf16. In the layout ``reversed`` the ranks
of the tensor-parallel group are in the opposite order, so that hardly anything stays on its rank.

Beside each other, in turn: updates, not verified and verified; ``gather``, the usual scheme: all-gather each
tensor, cast first, and copy the shard out of it; ``exchange``: the bytes that must move between ranks, in bf16,
in one message for each pair; ``memcpy``: as many bytes as the target has, within each rank's device. Times are
of the slowest rank, from a barrier. Bits first: all of the target is compared with what the masters give, after
the first update of each kind, and after the last.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import record
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from shapes import MODELS
from timing import timings
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import weightbus

SPLIT_INPUT = ("o_proj.weight", "down_proj.weight")  # by columns; all other matrices by rows
WIRE = torch.bfloat16
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13
MASTERS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Of this process: its rank, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def of_environment(cls) -> Place:
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        return cls(rank=rank, size=size, device=device)

    def shard(self, whole: Tensor, dim: int, index: int) -> Tensor:
        return whole.chunk(self.size, dim)[index]

    def slowest(self, seconds: float) -> float:
        if self.size == 1:
            return seconds
        most = torch.tensor(seconds)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(most)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, run: Callable[[], None]) -> float:
        self.wait()
        if self.size > 1:
            dist.barrier()
        begun = time.perf_counter()
        run()
        self.wait()
        return self.slowest(time.perf_counter() - begun)


class Case:
    """One layout with masters of one dtype, and all that is timed in it."""

    def __init__(self, place: Place, model: str, layout: str, masters: str) -> None:
        self.place, self.shapes = place, MODELS[model]
        self.turned = layout == "reversed"
        self.masters = {
            name: place.shard(self.drawn(i), 0, place.rank).to(MASTERS[masters]).clone()
            for i, name in enumerate(self.shapes)
        }
        self.target = {
            name: torch.zeros_like(self.wanted(name, self.drawn(i))) for i, name in enumerate(self.shapes)
        }
        self.nbytes = sum(tensor.nbytes for tensor in self.target.values())
        self.pair = weightbus.colocate(self._sources(), self._targets())
        self._send, self._receive = self._exchanged()
        self._copied = (
            torch.empty(self.nbytes, dtype=torch.uint8, device=place.device),
            torch.empty(self.nbytes, dtype=torch.uint8, device=place.device),
        )
        self.version = 0
        self.route = ""

    # -- who holds what ----------------------------------------------------------------------------

    def drawn(self, index: int) -> Tensor:
        """A whole tensor, as floats that bf16 has to round."""
        shape = list(self.shapes.values())[index]
        generator = torch.Generator(device=self.place.device).manual_seed(index)
        return torch.randn(shape, generator=generator, device=self.place.device)

    @property
    def _place_in_tp(self) -> int:
        return self.place.size - 1 - self.place.rank if self.turned else self.place.rank

    def _split(self, name: str) -> int | None:
        if len(self.shapes[name]) < 2:
            return None
        return 1 if name.endswith(SPLIT_INPUT) else 0

    def wanted(self, name: str, whole: Tensor) -> Tensor:
        """This rank's shard of the target."""
        split = self._split(name)
        cast = whole.to(WIRE)
        return cast if split is None else self.place.shard(cast, split, self._place_in_tp).contiguous()

    def _sources(self) -> list[tuple[str, Tensor]]:
        if self.place.size == 1:
            return list(self.masters.items())
        mesh = DeviceMesh(self.place.device.type, list(range(self.place.size)))
        return [
            (name, DTensor.from_local(rows, mesh, [Shard(0)], run_check=False))
            for name, rows in self.masters.items()
        ]

    def _targets(self) -> list[tuple[str, Tensor]]:
        if self.place.size == 1:
            return list(self.target.items())
        ranks = list(range(self.place.size))
        mesh = DeviceMesh(self.place.device.type, ranks[::-1] if self.turned else ranks)
        found = []
        for name, local in self.target.items():
            split = self._split(name)
            placement = Replicate() if split is None else Shard(split)
            found.append((name, DTensor.from_local(local, mesh, [placement], run_check=False)))
        return found

    def wrong(self) -> int:
        """How many tensors of the target differ in a bit, on all ranks; then they are zeroed."""
        count = 0
        for i, (name, found) in enumerate(self.target.items()):
            count += not torch.equal(
                found.view(torch.int16), self.wanted(name, self.drawn(i)).view(torch.int16)
            )
            found.zero_()
        total = torch.tensor(count)
        if self.place.size > 1:
            dist.all_reduce(total)
        return int(total)

    # -- what is timed -----------------------------------------------------------------------------

    def update(self, *, verify: bool) -> None:
        self.version += 1
        report = self.pair.update(self.version, verify=verify)
        self.route = report.route
        if report.word != ("verified" if verify else "unverified"):
            raise SystemExit(f"expected an update, got {report.word}")

    def gather(self) -> None:
        for name, rows in self.masters.items():
            cast = rows.to(WIRE)
            whole = cast
            if self.place.size > 1:
                whole = torch.empty(self.shapes[name], dtype=WIRE, device=self.place.device)
                ALL_GATHER(whole, cast)
            split = self._split(name)
            mine = whole if split is None else self.place.shard(whole, split, self._place_in_tp)
            self.target[name].copy_(mine)

    def _exchanged(self) -> tuple[list[Tensor], list[Tensor]]:
        """A message to each rank, and from each, as long as what moves between the two."""
        size, rank = self.place.size, self.place.rank
        counts = torch.zeros(size, size, dtype=torch.int64)  # of elements, [from, to]
        for name, shape in self.shapes.items():
            elements, split = torch.Size(shape).numel(), self._split(name)
            for src in range(size):
                for dst in range(size):
                    in_tp = size - 1 - dst if self.turned else dst
                    if split is None:
                        counts[src, dst] += elements // size
                    elif split == 1:
                        counts[src, dst] += elements // size**2
                    elif src == in_tp:
                        counts[src, dst] += elements // size
        counts.fill_diagonal_(0)
        self.moved_bytes = int(counts.sum(0).max()) * WIRE.itemsize

        def buffers(row: Tensor) -> list[Tensor]:
            return [torch.zeros(int(n), dtype=WIRE, device=self.place.device) for n in row]

        return buffers(counts[rank]), buffers(counts[:, rank])

    def exchange(self) -> None:
        others = [rank for rank in range(self.place.size) if rank != self.place.rank]
        sends = [dist.P2POp(dist.isend, self._send[r], r) for r in others if self._send[r].numel()]
        receives = [dist.P2POp(dist.irecv, self._receive[r], r) for r in others if self._receive[r].numel()]
        for work in dist.batch_isend_irecv(sends + receives) if sends + receives else ():
            work.wait()

    def memcpy(self) -> None:
        dst, src = self._copied
        dst.copy_(src)

    def run(self, rounds: int) -> list[dict[str, Any]]:
        kinds: dict[str, Callable[[], None]] = {
            "memcpy": self.memcpy,
            "update": lambda: self.update(verify=False),
            "update, verified": lambda: self.update(verify=True),
            "gather": self.gather,
        }
        if self.place.size > 1:
            kinds["exchange"] = self.exchange
        wrong: dict[str, int] = {}
        first: dict[str, float] = {}
        for what, run in kinds.items():
            first[what] = self.place.time(run)
            if what not in ("memcpy", "exchange"):
                wrong[what] = self.wrong()
        for run in kinds.values():
            run()
        seconds: dict[str, list[float]] = {what: [] for what in kinds}
        for number in range(rounds):
            for what in kinds if number % 2 == 0 else list(kinds)[::-1]:
                seconds[what].append(self.place.time(kinds[what]))
        self.update(verify=True)
        wrong["update, verified"] += self.wrong()
        rows = []
        for what, times in seconds.items():
            row = timings(times, seconds["memcpy"])
            row["of_memcpy"], row["of_memcpy_95"] = row.pop("of_raw"), row.pop("of_raw_95")
            rows.append({"what": what, "nbytes": self.nbytes, "moved_bytes": self.moved_bytes, **row})
            rows[-1] |= {"first_s": first[what], "seconds": times}
            if what in wrong:
                rows[-1]["wrong"] = wrong[what]
            if what.startswith("update"):
                rows[-1]["route"] = self.route
        return rows

    def close(self) -> None:
        self.pair.close()


def show(rows: list[dict[str, Any]], model: str, place: Place) -> None:
    table = Table(title=f"{model}, {place.size} ranks, each both ends, {place.device.type}")
    for column in ("layout", "masters", "what", "route", "p50 ms", "p99 ms", "of memcpy", "first ms", "#wrong"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["layout"],
            row["masters"],
            row["what"],
            row.get("route", ""),
            f"{row['p50_s'] * 1e3:.2f}",
            f"{row['p99_s'] * 1e3:.2f}",
            f"{row['of_memcpy']:.2f}",
            f"{row['first_s'] * 1e3:.0f}",
            str(row.get("wrong", "")),
        )
    Console(width=130).print(table)


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="rows to tensor-parallel shards over the same ranks")
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b" if on_gpu else "toy")
    parser.add_argument("--masters", nargs="+", choices=MASTERS, default=list(MASTERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write the result")
    args = parser.parse_args()
    place = Place.of_environment()
    rows: list[dict[str, Any]] = []
    for layout in ("in order", "reversed") if place.size > 1 else ("in order",):
        for masters in args.masters:
            case = Case(place, args.model, layout, masters)
            try:
                rows += [{"layout": layout, "masters": masters, **row} for row in case.run(args.rounds)]
            finally:
                case.close()
            del case
            if on_gpu:
                torch.cuda.empty_cache()
            if place.rank == 0:
                record.write(args.json, "colocated", rows, model=args.model, ranks=place.size)
    if place.rank == 0:
        show(rows, args.model, place)
    if place.size > 1:
        dist.destroy_process_group()
    return 1 if any(row.get("wrong") for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
