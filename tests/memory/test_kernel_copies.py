"""csrc/runs.cu, compiled for the host and on a GPU: the bytes that runs name, and no others."""

from __future__ import annotations

import ctypes
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_on_host import COMPILER, compiled
from seeded import seeded

from weightbus.memory.driver import EngineCopies
from weightbus.memory.kernel_copies import KernelCopies, copy_table
from weightbus.planning.runs import Run

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(compiled(Path(__file__).parents[1] / "support" / "runs_on_host.cpp")))


def on_host(runs: list[Run]) -> None:
    table, run_of_tile = copy_table(runs)
    library().runs_on_host(
        ctypes.c_void_p(table.ctypes.data),
        ctypes.c_void_p(run_of_tile.ctypes.data),
        ctypes.c_longlong(len(run_of_tile)),
    )


def random_runs(generator: random.Random, length: int) -> list[Run]:
    """Runs inside two buffers of ``length`` bytes; destinations in order, so that none overlap."""
    runs, at = [], 0
    for _ in range(60):
        align = generator.choice([1, 2, 4, 8, 16, 16])
        rows = generator.choice([1, 1, 3, 40])
        width = generator.randint(1, generator.choice([40, 3000, 90000])) * align
        pitches = [(width + generator.randint(0, 3) * align) * (rows > 1) for _ in range(2)]
        start = -(-at // align) * align
        span, reach = (p * (rows - 1) + width for p in pitches)
        if start + span > length or reach > length:
            continue
        src = generator.randrange(0, length - reach + 1) // align * align
        runs.append(Run(start, src, width, rows, *pitches))
        at = start + span + generator.randint(0, 20)
    return runs


def expected(runs: list[Run], dst: np.ndarray, src: np.ndarray) -> np.ndarray:
    out = dst.copy()
    for run in runs:
        for row in range(run.rows):
            d, s = run.dst + row * run.dst_pitch, run.src + row * run.src_pitch
            out[d : d + run.width] = src[s : s + run.width]
    return out


def moved(runs: list[Run], dst: int, src: int) -> list[Run]:
    return [
        Run(run.dst + dst, run.src + src, run.width, run.rows, run.dst_pitch, run.src_pitch) for run in runs
    ]


def draw(seed: int, length: int) -> tuple[list[Run], np.ndarray, np.ndarray]:
    values = np.random.default_rng(seed)
    dst, src = (values.integers(0, 256, length, dtype=np.uint8) for _ in range(2))
    return random_runs(seeded(seed), length), dst, src


@needs_compiler
@pytest.mark.parametrize("seed", range(12))
def test_on_the_host(seed: int) -> None:
    runs, dst, src = draw(seed, 1 << 21)
    assert len(runs) > 5
    right = expected(runs, dst, src)
    on_host(moved(runs, dst.ctypes.data, src.ctypes.data))
    assert np.array_equal(dst, right)


def test_vectors_are_as_wide_as_can_be() -> None:
    table, run_of_tile = copy_table(
        [Run(16, 32, 1001), Run(4096, 4096, 64, 5, 128, 256), Run(8192 + 3, 3, 1000), Run(9999, 8, 10)]
    )
    columns = list(map(tuple, table[:, [2, 3, 6]].tolist()))
    assert columns == [(62, 1, 16), (9, 1, 1), (4, 5, 16), (13, 1, 1), (61, 1, 16), (11, 1, 1), (10, 1, 1)]
    assert run_of_tile.tolist() == list(range(7))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["kernel", "engine"])
@pytest.mark.parametrize("seed", range(4))
def test_on_the_gpu(kind: str, seed: int) -> None:
    runs, dst, src = draw(seed, 1 << 24)
    device = torch.device("cuda", torch.cuda.current_device())
    gpu_dst, gpu_src = (torch.from_numpy(x).to(device) for x in (dst, src))
    whole = moved(runs, gpu_dst.data_ptr(), gpu_src.data_ptr())
    copies = KernelCopies(whole, device) if kind == "kernel" else EngineCopies(whole)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        copies.start(stream)
    stream.synchronize()
    assert np.array_equal(gpu_dst.cpu().numpy(), expected(runs, dst, src))
