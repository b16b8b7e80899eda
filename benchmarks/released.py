"""``update()`` beside a released weight-update engine, checkpoint-engine, on the same tensors and in one run.

    pip install checkpoint-engine
    python benchmarks/released.py --json benchmarks/results/released.json

The trainer's weights are on GPU 0, the live model is on GPU 1. checkpoint-engine has an inference process
beside each of its ranks: here the one on GPU 1 copies each named tensor into the live model, which it shares
with the server rank through CUDA IPC; it insists on one on GPU 0 too, which takes nothing. In its favour, the
process group is kept between updates (``auto_pg=False``; its default makes a new one each time), and so is
pinned memory (``use_shared_memory_pool``; its default allocates anew). "registered before" is ``update()``
alone, of weights that are in pinned memory already; "with registering" is what a trainer waits for whose
weights are on its GPU: ``register_checkpoint``, ``gather_metas`` and ``update``. It holds three buckets on each
GPU meanwhile, of 8 GiB by default; smaller ones are compared. Bits, turns and timing are as in update.py.

Exits with 77 where checkpoint-engine or a second GPU is missing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import record
import torch
import torch.distributed as dist
import zmq
from shapes import MODELS
from torch import Tensor
from update import RAW, Bus, Rank, free_ports, next_answer, show, take_turns

NAME = "weights"
SKIPPED = 77


class CheckpointEngine:
    """checkpoint-engine's rank beside ours, in the same process group. Both ranks call each method."""

    def __init__(self, rank: Rank, tensors: dict[str, Tensor], worker: Any) -> None:
        from checkpoint_engine import ParameterServer

        self.rank, self.tensors, self.worker = rank, tensors, worker
        os.environ["RANK"] = str(rank.rank)  # an argument of 0 counts as none
        self.server = ParameterServer(
            rank=rank.rank,
            world_size=2,
            auto_pg=False,
            master_addr="127.0.0.1",
            master_port=rank.args.engine_port,
        )

    def register(self) -> None:
        """The trainer's weights into pinned memory, the same each time."""
        if self.rank.sends:
            self.server.unregister_checkpoint(NAME)
            self.server.register_checkpoint(NAME, named_tensors=self.tensors, use_shared_memory_pool=True)
        self.server.gather_metas(NAME)

    def update(self, bucket_gib: int, *, registers: bool) -> None:
        os.environ["PS_MAX_BUCKET_SIZE_GB"] = str(bucket_gib)
        if registers:
            self.register()
        self.server.update(NAME, self._request)

    def _request(self, handles: list[tuple[str, str]]) -> None:
        """What an inference server is asked by HTTP otherwise."""
        self.worker.put(handles[self.rank.rank][1])
        self.worker.join()


def infer(index: int, requests: Any) -> None:
    """The inference process on a GPU. Requests: the live model, a handle for each update, at last None."""
    from checkpoint_engine import update_weights_from_ipc

    torch.cuda.set_device(index)
    context = zmq.Context()
    live: dict[str, Tensor] = requests.get()
    requests.task_done()

    def load(weights: list[tuple[str, Tensor]]) -> None:
        for name, tensor in weights if live else ():
            live[name].copy_(tensor)

    while handle := requests.get():
        update_weights_from_ipc(context, handle, index, run=load)
        requests.task_done()
    live.clear()
    requests.task_done()


def pinned_bytes() -> int:
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


def work(index: int, model: str, args: argparse.Namespace, worker: Any, results: Any) -> None:
    rank = Rank(index, args)
    tensors = rank.tensors(model, torch.bfloat16, filled=rank.sends)
    worker.put({} if rank.sends else tensors)
    worker.join()
    raw = torch.empty(sum(t.nbytes for t in tensors.values()), dtype=torch.uint8, device=rank.device)
    engine = CheckpointEngine(rank, tensors, worker)
    before = pinned_bytes()
    engine.register()
    pinned = int(rank.both(pinned_bytes() - before))
    runs: dict[str, Callable[[], Any]] = {RAW: lambda: dist.broadcast(raw, 0)}
    for gib in args.bucket_gib:
        for how, registers in (("registered before", False), ("with registering", True)):
            runs[f"checkpoint-engine, {gib} GiB, {how}"] = partial(engine.update, gib, registers=registers)
    buses = {route: Bus(rank, tensors, None, route) for route in ("broadcast", "peer")}
    for route, bus in buses.items():
        runs[f"weightbus, {route}"] = lambda bus=bus: bus.update(False)
        runs[f"weightbus, {route}, verified"] = lambda bus=bus: bus.update(True)
    rows = take_turns(rank, model, "bf16", tensors, runs)
    for row in rows:
        if row["what"].startswith("checkpoint-engine"):
            row["pinned_bytes"] = pinned
    worker.put(None)
    worker.join()
    for bus in buses.values():
        bus.close()
    if rank.sends:
        results.put((rank.backend, rows))
    dist.destroy_process_group()


def compare(model: str, args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """The backend and the rows of one model, from processes of its own."""
    args.port, args.engine_port, *args.ports = free_ports(4)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.JoinableQueue() for _ in range(2)]
    ends = [(work, (index, model, args, workers[index], results)) for index in range(2)]
    ends += [(infer, (index, workers[index])) for index in range(2)]
    processes = [context.Process(target=run, args=given, daemon=True) for run, given in ends]
    for process in processes:
        process.start()
    found: tuple[str, list[dict[str, Any]]] = next_answer(results, processes)
    for process in processes:
        process.join(60)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="update() beside checkpoint-engine's")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["qwen3-0.6b", "qwen3-8b"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--bucket-gib", nargs="+", type=int, default=[8, 1], help="checkpoint-engine's buckets, in GiB"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result")
    args = parser.parse_args()
    if find_spec("checkpoint_engine") is None or torch.cuda.device_count() < 2:
        print("skipped: needs two GPUs, and checkpoint-engine, which pip can install")
        return SKIPPED
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")  # else lines for each bucket, while it is timed
    rows: list[dict[str, Any]] = []
    for model in args.models:
        backend, found = compare(model, args)
        show(found)
        pinned = max(row.get("pinned_bytes", 0) for row in found)
        print(f"{model}: checkpoint-engine keeps {pinned / 2**20:.0f} MiB of pinned memory on the host")
        rows += found
        peer = f"checkpoint-engine {version('checkpoint-engine')}"
        record.write(args.json, "released", rows, backend=backend, peer=peer)
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
