"""How fast grid61 digests: on one GPU beside a kernel that only reads, on the CPU beside hashlib's SHA-256.

    python benchmarks/digest.py [--device cuda|cpu] [--json FILE]

Bits first: ``#wrong`` counts the tensors whose sums differ from another implementation's over the same
bytes (CUDA against the CPU extension, that against the torch reference). Times are medians of whole calls of
``Digester.sums``, launches, synchronisation and copy of the results included; on the CPU the calls that are
compared take turns. From a checkout that is not installed, run `python setup.py build_ext --inplace` first.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import record
import torch
from rich.console import Console
from rich.table import Table
from shapes import MODELS

from weightbus.digest import STABLE_SEED, Digester
from weightbus.digest.cpu import CpuSums
from weightbus.digest.reference import ReferenceSums
from weightbus.memory.shard import Part
from weightbus.planning.box import Box
from weightbus.planning.spec import Spec

GIB = 1 << 30
QWEN = MODELS["qwen3-8b"]
READ_ONLY = r"""
extern "C" __global__ void read_only(const uint4* data, long long vectors, unsigned* out) {
  long long stride = (long long)gridDim.x * blockDim.x, i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  unsigned x = 0;
  for (; i + (FLIGHT - 1) * stride < vectors; i += FLIGHT * stride) {
    uint4 v[FLIGHT];
#pragma unroll
    for (int k = 0; k < FLIGHT; ++k) {
      const uint4* p = data + i + k * stride;
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
          : "=r"(v[k].x), "=r"(v[k].y), "=r"(v[k].z), "=r"(v[k].w) : "l"(p));
    }
#pragma unroll
    for (int k = 0; k < FLIGHT; ++k) x ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  if (x == 0x9e3779b9u) *out = x;
}
"""


def part(tensor: torch.Tensor, name: str = "t", shape: Sequence[int] = (), offsets: Sequence[int] = ()) -> Part:
    shape = tuple(shape or tensor.shape)
    spec = Spec(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=shape)
    return Part(spec=spec, box=Box(tuple(offsets or (0,) * len(shape)), tuple(tensor.shape)), tensor=tensor)


def random_bf16(shape: Sequence[int], device: str) -> torch.Tensor:
    return (
        torch.empty(tuple(shape), dtype=torch.bfloat16, device=device)
        .view(torch.int16)
        .random_()
        .view(torch.bfloat16)
    )


Call = Callable[[], object]


def medians(calls: dict[str, Call | tuple[Call, Call]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, taken in turns; of a pair, the first sets up and is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            if isinstance(call, tuple):
                set_up, call = call
                set_up()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def wrong(parts: Sequence[Part], found: np.ndarray, other: type[CpuSums] | type[ReferenceSums]) -> int:
    """How many parts' sums differ from another implementation's over copies in host memory."""
    count = 0
    for one, row in zip(parts, found, strict=True):
        copy = Part(spec=one.spec, box=one.box, tensor=one.tensor.cpu().contiguous())
        count += not np.array_equal(other([copy]).launch(STABLE_SEED, None)()[0], row)
    return count


def cuda_cases() -> list[tuple[str, Callable[[], list[Part]]]]:
    def whole() -> list[Part]:
        return [part(random_bf16((GIB, 4), "cuda").reshape(-1, 4096))]

    def qwen() -> list[Part]:
        return [part(random_bf16(shape, "cuda"), name) for name, shape in QWEN.items()]

    def columns(ways: int, strided: bool) -> list[Part]:
        """Rank 1's columns of each matrix: as its own tensor, or in place in the whole one."""
        parts = []
        for name, shape in QWEN.items():
            if len(shape) == 2:
                width = shape[1] // ways
                held = random_bf16(shape if strided else (shape[0], width), "cuda")
                view = held[:, width : 2 * width] if strided else held
                parts.append(part(view, name, shape, (0, width)))
        return parts

    return [
        ("8 GiB bf16 [1048576, 4096]", whole),
        ("8 GiB bf16 [4294967296]", lambda: [part(random_bf16((4 * GIB,), "cuda"))]),
        ("Qwen3-8B, 399 tensors", qwen),
        ("its matrices' columns, 1 of 2", lambda: columns(2, False)),
        ("its matrices' columns, 1 of 4", lambda: columns(4, False)),
        ("its matrices' columns, 1 of 8", lambda: columns(8, False)),
        ("its matrices' columns, 1 of 2, in place", lambda: columns(2, True)),
        ("10,000 tensors of 4 KiB", lambda: [part(random_bf16((2048,), "cuda")) for _ in range(10_000)]),
    ]


def read_ceiling() -> float:
    """Bytes per second of the best read-only kernel over 8 GiB."""
    import cupy

    data = torch.empty(GIB, dtype=torch.int64, device="cuda").random_()
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    best = 0.0
    for flight in (4, 8):
        kernel = cupy.RawKernel(READ_ONLY, "read_only", options=("-std=c++17", f"-DFLIGHT={flight}"))
        for blocks, threads in ((132 * 8, 256), (132 * 4, 512), (132 * 32, 256), (132 * 64, 256)):

            def call(kernel: Any = kernel, blocks: int = blocks, threads: int = threads) -> None:
                kernel((blocks,), (threads,), (data.data_ptr(), data.nbytes // 16, out.data_ptr()))
                cupy.cuda.get_current_stream().synchronize()

            best = max(best, data.nbytes / medians({"read": call}, 7)["read"])
    return best


def cuda_rows(rounds: int) -> list[dict[str, Any]]:
    ceiling = read_ceiling()
    rows = [row("only reading (ceiling)", 1, 8 * GIB, 8 * GIB / ceiling, ceiling, 0)]
    for name, make in cuda_cases():
        torch.cuda.empty_cache()
        parts = make()
        digester = Digester(parts)
        missed = wrong(parts, digester.sums(STABLE_SEED), CpuSums)
        seconds = medians({"sums": lambda d=digester: d.sums(STABLE_SEED)}, rounds)["sums"]  # type: ignore[misc]
        rows.append(row(name, len(parts), digester.nbytes, seconds, ceiling, missed))
        del parts, digester
    return rows


def cpu_rows(rounds: int) -> list[dict[str, Any]]:
    tensor = random_bf16((32768, 4096), "cpu")
    parts = [part(tensor)]
    digester = Digester(parts)
    data = memoryview(tensor.view(torch.uint8).numpy().reshape(-1))
    missed = wrong(parts, digester.sums(STABLE_SEED), ReferenceSums)

    def digest() -> np.ndarray:
        return digester.sums(STABLE_SEED)

    seconds = medians(
        {
            "hashlib SHA-256": lambda: hashlib.sha256(data).digest(),
            "grid61, 1 thread": (lambda: torch.set_num_threads(1), digest),
            "grid61, 2 threads": (lambda: torch.set_num_threads(2), digest),
        },
        rounds,
    )
    base = tensor.nbytes / seconds["hashlib SHA-256"]
    return [row(name, 1, tensor.nbytes, s, base, missed * ("grid" in name)) for name, s in seconds.items()]


def row(name: str, tensors: int, nbytes: int, seconds: float, base: float, missed: int) -> dict[str, Any]:
    rate = nbytes / seconds
    return {
        "what": name, "tensors": tensors, "bytes": nbytes, "us": round(seconds * 1e6, 1),
        "GB/s": round(rate / 1e9, 2), "of_baseline": round(rate / base, 3), "wrong": missed,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each case (default 15)")
    args = parser.parse_args()
    more: dict[str, Any] = {}
    if args.device == "cuda":
        import cupy

        rows, baseline, more = cuda_rows(args.rounds), "ceiling", {"cupy": cupy.__version__}
    else:
        rows, baseline = cpu_rows(args.rounds), "SHA-256"
        more["two_threads_over_one"] = round(rows[1]["us"] / rows[2]["us"], 3)
    table = Table("what", "tensors", "MB", "us", "GB/s", f"of {baseline}", "#wrong")
    for r in rows:
        cells = (
            r["tensors"],
            round(r["bytes"] / 1e6, 1),
            r["us"],
            r["GB/s"],
            f"{r['of_baseline']:.2f}",
            r["wrong"],
        )
        table.add_row(r["what"], *map(str, cells))
    Console(width=120).print(table)
    for name, value in more.items():
        print(f"{name} {value}")
    record.write(args.json, "digest", rows, **more)
    return 1 if any(r["wrong"] for r in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
