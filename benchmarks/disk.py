"""``update_from_disk`` beside a plain parallel read of the same bytes: bits first, then interleaved pairs.

    python benchmarks/disk.py --model qwen3-0.6b --pairs 9 --json benchmarks/results/disk-cpu.json

Server ranks of one replica on this host, each with its rows, or its columns, of every matrix. The plain read
is what a program of a few lines would do: the same threads, each with ``preadv`` of whole blocks into memory
that is there already, as many bytes for each rank as it holds. Both are timed until the slowest rank has ended.
*Cold*: the files are dropped from the page cache before each read. ``rchar`` is what all ranks have asked files
for in one load, by the bytes that they hold; ``peak`` is what the largest rank's resident memory grew by.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import record
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from shapes import MODELS
from timing import timings
from torch import Tensor, nn

import weightbus
from weightbus.storage.digest_list import NAME as LIST
from weightbus.storage.digest_list import saved_of
from weightbus.storage.disk import stored_tensors
from weightbus.storage.ranges import BUFFER_BYTES
from weightbus.storage.reading import READERS
from weightbus.tools.digest_files import digest_files

FILE_BYTES = 512 << 20


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).add_(len(name)).to(torch.bfloat16)


def write(folder: Path, model: str, *, listed: bool) -> None:
    """The model in files of about FILE_BYTES."""
    group: dict[str, Tensor] = {}
    number = 0
    for name, shape in MODELS[model].items():
        group[name] = draw(name, shape)
        if sum(tensor.nbytes for tensor in group.values()) >= FILE_BYTES:
            save_file(group, folder / f"{number}.safetensors")
            group, number = {}, number + 1
    if group:
        save_file(group, folder / f"{number}.safetensors")
    if listed:
        (folder / LIST).write_bytes(msgspec.json.encode(saved_of(digest_files(stored_tensors(folder)))))


class Shards(nn.Module):
    """A rank's part of every matrix, by loaders as engines have them; vectors whole."""

    def __init__(self, model: str, axis: int, rank: int, size: int) -> None:
        super().__init__()
        self.names = {}
        for i, (name, shape) in enumerate(MODELS[model].items()):
            whole = len(shape) == 1
            own = shape if whole else tuple(n // size if a == axis else n for a, n in enumerate(shape))
            parameter = nn.Parameter(torch.ones(own, dtype=torch.bfloat16), requires_grad=False)
            if not whole:
                parameter.weight_loader = lambda p, w: p.data.copy_(w.chunk(size, axis)[rank])
            self.register_parameter(f"p{i}", parameter)
            self.names[name] = f"p{i}"

    def wrong(self, axis: int, rank: int, size: int) -> int:
        """Elements whose bits are not the file's."""
        count = 0
        for name, own in self.names.items():
            live = getattr(self, own)
            whole = draw(name, MODELS[MODEL][name])
            mine = whole if whole.ndim == 1 else whole.chunk(size, axis)[rank]
            count += int((live.view(torch.int16) != mine.contiguous().view(torch.int16)).sum())
        return count


MODEL = ""


def drop(folder: Path) -> None:
    """Take the files out of the page cache."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def plain_read(folder: Path, memory: Tensor, rank: int, size: int) -> None:
    """Blocks of every file, so many bytes as the rank holds, by the same number of threads."""
    view, at = memoryview(memory.numpy()), 0
    work = []
    for path in sorted(folder.glob("*.safetensors")):
        length = path.stat().st_size
        low, high = length * rank // size, length * (rank + 1) // size
        for begin in range(low, high, BUFFER_BYTES):
            end = min(high, begin + BUFFER_BYTES, begin + len(view) - at)
            work.append((path, begin, at, end - begin))
            at += end - begin
    files = {path: os.open(path, os.O_RDONLY) for path in {row[0] for row in work}}

    def one(row: tuple[Path, int, int, int]) -> None:
        path, begin, at, count = row
        while count:
            got = os.preadv(files[path], [view[at : at + count]], begin)
            begin, at, count = begin + got, at + got, count - got

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(one, work))
    for handle in files.values():
        os.close(handle)


def rchar() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def slowest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def total(number: int) -> int:
    value = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(value)
    return int(value)


def server(rank: int, args: argparse.Namespace, folders: dict[bool, Path], results: Any) -> None:
    global MODEL
    MODEL = args.model
    torch.set_num_threads(1)
    size = args.ranks
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{args.port}", rank=rank, world_size=size)
    rows = []
    for axis, what in ((0, "rows"), (1, "columns")):
        if args.shards not in (None, what):
            continue
        model = Shards(args.model, axis, rank, size)
        held = sum(p.nbytes for p in model.parameters())
        memory = torch.ones(held, dtype=torch.uint8)
        name_map = model.names.__getitem__
        with weightbus.Subscriber(
            model, address=args.address, rank=rank, replica_size=size, name_map=name_map
        ) as subscriber:
            subscriber.update_from_disk(folders[False])  # what is imported at first use is there from now on
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            subscriber.update_from_disk(folders[False])
            grown = slowest(float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)) * 1024
            wrong = total(model.wrong(axis, rank, size))
            for cold in (False, True):
                for listed in (False, True):
                    loads, reads = [], []
                    for pair in range(args.pairs + 1):
                        for kind in ("load", "read") if pair % 2 else ("read", "load"):
                            if cold and rank == 0:
                                drop(folders[listed])
                            dist.barrier()
                            begun = time.perf_counter()
                            before = rchar()
                            if kind == "load":
                                subscriber.update_from_disk(folders[listed])
                            else:
                                plain_read(folders[listed], memory, rank, size)
                            seconds = slowest(time.perf_counter() - begun)
                            if kind == "load":
                                asked = total(rchar() - before)
                            if pair:
                                (loads if kind == "load" else reads).append(seconds)
                    rows.append(
                        {
                            "shards": what,
                            "cache": "cold" if cold else "warm",
                            "digests": "checked" if listed else "none",
                            "nbytes": total(held),
                            "load_s": loads,
                            "read_s": reads,
                            "rchar_per_held": asked / total(held),
                            "peak_growth_bytes": int(grown),
                            "wrong": wrong,
                        }
                    )
        del model, memory
    if rank == 0:
        results.put(rows)
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description="update_from_disk beside a plain parallel read")
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--shards", choices=["rows", "columns"], help="only these; by default both")
    parser.add_argument(
        "--folder", type=Path, help="where to put the files; by default the temporary directory"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result")
    args = parser.parse_args()
    args.port = free_port()
    args.address = f"tcp://127.0.0.1:{free_port()}"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "weightbus.hub", "--address", args.address]
    hub = subprocess.Popen(command)  # noqa: S603 - ours
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    try:
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            folders = {listed: Path(scratch) / str(listed) for listed in (False, True)}
            for listed, folder in folders.items():
                folder.mkdir()
                write(folder, args.model, listed=listed)
            processes = [
                context.Process(target=server, args=(rank, args, folders, results), daemon=True)
                for rank in range(args.ranks)
            ]
            for process in processes:
                process.start()
            rows = results.get(timeout=1200)
            for process in processes:
                process.join(60)
    finally:
        hub.terminate()
        hub.wait(30)
    table = Table(title=f"{args.model}, {args.ranks} ranks, {rows[0]['nbytes'] / 1e9:.3f} GB held")
    for column in (
        "shards",
        "cache",
        "digests",
        "load GB/s",
        "read GB/s",
        "of it",
        "95 %",
        "rchar",
        "peak",
        "#wrong",
    ):
        table.add_column(column)
    for row in rows:
        row |= {
            "load": timings(row.pop("load_s"), row["read_s"]),
            "read": timings(row["read_s"], row.pop("read_s")),
        }
        load, read = row["load"]["p50_s"], row["read"]["p50_s"]
        low, high = (1 / share for share in reversed(row["load"]["of_raw_95"]))
        table.add_row(
            row["shards"],
            row["cache"],
            row["digests"],
            f"{row['nbytes'] / load / 1e9:.2f}",
            f"{row['nbytes'] / read / 1e9:.2f}",
            f"{read / load:.0%}",
            f"{low:.0%}-{high:.0%}",
            f"{row['rchar_per_held']:.3f}",
            f"{row['peak_growth_bytes'] >> 20} MiB",
            str(row["wrong"]),
        )
    Console().print(table)
    record.write(args.json, "disk", rows, model=args.model, ranks=args.ranks)
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
