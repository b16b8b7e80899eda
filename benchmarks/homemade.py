"""What small extensions of our own save a user, beside plain Python: interleaved pairs, bits first.

    python benchmarks/homemade.py --json benchmarks/results/homemade-cpu.json

- ``addresses``: an update in one process of many small tensors, of which each must still lie where it lay, with
  ``csrc/addresses.cpp`` and with a ``data_ptr()`` for each
- ``pread``: ``update_from_disk`` of one rank's columns of every matrix, that is of many short runs of a file,
  with ``csrc/pread.c`` and with ``os.preadv`` for each run

``of_raw`` is the time with the extension by that without it; ``saved_ms`` is the difference of medians.
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b")
    parser.add_argument("--json", metavar="FILE", help="write the result")
    args = parser.parse_args()
    rows = [addresses(count, 4 * args.pairs) for count in (400, 20_000)]
    rows += [pread(args.model, parts, args.pairs) for parts in (2, 8)]
    for row in rows:
        low, high = row["of_raw_95"]
        size = row.get("tensors") or f"columns by {row['columns_by']}"
        print(
            f"{row['what']:10} {size!s:14} {1000 * row['p50_s']:8.2f} ms, {row['of_raw']:.3f} ({low:.3f} to"
            f" {high:.3f}) of plain Python, saves {row['saved_ms']:.2f} ms; {row['wrong']} wrong"
        )
    record.write(args.json, "homemade", rows)
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
