"""What small extensions of our own save a user, beside plain Python: interleaved pairs, bits first.

    python benchmarks/homemade.py --json benchmarks/results/homemade-cpu.json

- ``addresses``: an update in one process of many small tensors, of which each must still lie where it lay, with
  ``csrc/addresses.cpp`` and with a ``data_ptr()`` for each
- ``pread``: ``update_from_disk`` of one rank's columns of every matrix, that is of many short runs of a file,
  with ``csrc/pread.c`` and with ``os.preadv`` for each run

``of_raw`` is the time with the extension by that without it; ``saved_ms`` is the difference of medians.

    python benchmarks/homemade.py --kernels --json benchmarks/results/homemade-gpu.json

- ``runs``, on a GPU: all of a model copied within it by ``csrc/runs.cu``, and by ``csrc/copy.cu`` on all
  multiprocessors: whole tensors, and the left half of the columns of each
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disk
import record
import torch
from shapes import MODELS
from timing import timings

import weightbus
from weightbus.memory.copy_descriptors import piece_of
from weightbus.memory.cuda_copy import CudaCopies
from weightbus.memory.kernel_copies import KernelCopies
from weightbus.planning.runs import runs_of
from weightbus.storage import sources
from weightbus.tensors.torch_addresses import Addresses


def pairs(call: Callable[[], Any], use: Callable[[bool], None], count: int) -> dict[str, Any]:
    """``call`` with the extension and without, in an order that alternates."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(count + 2):
        for with_it in (True, False) if pair % 2 else (False, True):
            use(with_it)
            begun = time.perf_counter()
            call()
            if pair > 1:
                seconds[with_it].append(time.perf_counter() - begun)
    use(True)
    saved = statistics.median(seconds[False]) - statistics.median(seconds[True])
    return {**timings(seconds[True], seconds[False]), "saved_ms": 1000 * saved}


def remember(made: list[Addresses]) -> None:
    """Those that are made from now on."""
    init = Addresses.__init__

    def noted(self: Addresses, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self)

    Addresses.__init__ = noted  # type: ignore[method-assign]


def addresses(count: int, rounds: int) -> dict[str, Any]:
    source = [(f"layers.{i}.weight", torch.full((64,), float(i))) for i in range(count)]
    target = [(name, torch.zeros(64)) for name, _ in source]
    made: list[Addresses] = []
    remember(made)
    with weightbus.colocate(source, target) as both:
        both.update(1)
        wrong = sum(not torch.equal(a, b) for (_, a), (_, b) in zip(source, target, strict=True))
        kept = {one: one._offset for one in made if one._offset}
        if not kept:
            raise SystemExit(
                "expected the extension to be built, and in use (python setup.py build_ext --inplace)"
            )

        def use(with_it: bool) -> None:
            for one, offset in kept.items():
                one._offset = offset if with_it else 0

        version = itertools.count(2)
        row = pairs(lambda: both.update(next(version), verify=False), use, rounds)
    return {"what": "addresses", "tensors": count, "wrong": wrong, **row}


def pread(model: str, parts: int, rounds: int) -> dict[str, Any]:
    extension = sources._pread
    if extension is None:
        raise SystemExit("expected the extension to be built (python setup.py build_ext --inplace)")
    disk.MODEL = model
    address = f"tcp://127.0.0.1:{disk.free_port()}"
    shards = disk.Shards(model, 1, 0, parts)
    hub = subprocess.Popen([sys.executable, "-m", "weightbus.hub", "--address", address])  # noqa: S603 - ours
    try:
        with tempfile.TemporaryDirectory() as folder:
            disk.write(Path(folder), model, listed=False)
            options = {"address": address, "rank": 0, "replica_size": 1, "name_map": shards.names.__getitem__}
            with weightbus.Subscriber(shards, **options) as subscriber:
                subscriber.update_from_disk(folder)
                wrong = shards.wrong(1, 0, parts)

                def use(with_it: bool) -> None:
                    sources._pread = extension if with_it else None

                row = pairs(lambda: subscriber.update_from_disk(folder), use, rounds)
                wrong += shards.wrong(1, 0, parts)
    finally:
        hub.terminate()
        hub.wait(30)
    nbytes = sum(p.nbytes for p in shards.parameters())
    return {"what": "pread", "model": model, "columns_by": parts, "nbytes": nbytes, "wrong": wrong, **row}


def kernels(model: str, halves: bool, rounds: int) -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    low, high = torch.iinfo(torch.int16).min, torch.iinfo(torch.int16).max
    shapes = MODELS[model].values()
    sources = [torch.randint(low, high, shape, dtype=torch.int16, device=device) for shape in shapes]
    if halves:
        sources = [source[..., : source.shape[-1] // 2] for source in sources]
    targets = [torch.zeros_like(source, memory_format=torch.contiguous_format) for source in sources]
    both = list(zip(targets, sources, strict=True))
    runs = [
        run
        for dst, src in both
        for run in runs_of(
            src.shape, dst.stride(), src.stride(), itemsize=2, dst=dst.data_ptr(), src=src.data_ptr()
        )
    ]
    pieces = [piece for dst, src in both if (piece := piece_of(dst, src)) is not None]
    if len(pieces) < len(both):
        raise SystemExit("expected tensors that csrc/copy.cu can copy")
    ours, other = KernelCopies(runs, device), CudaCopies(pieces, device, share=1)
    stream = torch.cuda.current_stream()
    which = {True: lambda: ours.start(stream), False: other.run}
    wrong, now = 0, [True]
    for run in which.values():
        for dst in targets:
            dst.zero_()
        run()
        wrong += sum(not torch.equal(dst, src) for dst, src in both)

    def call() -> None:
        which[now[0]]()
        stream.synchronize()

    def use(with_it: bool) -> None:
        now[0] = with_it

    row = pairs(call, use, rounds)
    nbytes = sum(dst.nbytes for dst in targets)
    by = 2 if halves else 1
    return {"what": "runs", "model": model, "columns_by": by, "nbytes": nbytes, "wrong": wrong, **row}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b")
    parser.add_argument("--kernels", action="store_true", help="those of a GPU instead")
    parser.add_argument("--json", metavar="FILE", help="write the result")
    args = parser.parse_args()
    if args.kernels:
        rows = [kernels("qwen3-8b", halves, args.pairs) for halves in (False, True)]
    else:
        rows = [addresses(count, 4 * args.pairs) for count in (400, 20_000)]
        rows += [pread(args.model, parts, args.pairs) for parts in (2, 8)]
    for row in rows:
        low, high = row["of_raw_95"]
        size = row.get("tensors") or f"columns by {row['columns_by']}"
        print(
            f"{row['what']:10} {size!s:14} {1000 * row['p50_s']:8.2f} ms, {row['of_raw']:.3f} ({low:.3f} to"
            f" {high:.3f}) of the other, saves {row['saved_ms']:.2f} ms; {row['wrong']} wrong"
        )
    record.write(args.json, "homemade", rows)
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
