"""Every implementation gives the sums of tests/vectors/grid61.json, and of random parts of all kinds."""

from __future__ import annotations

import importlib.util
import json
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_on_host import COMPILER, CudaOnHost, compiled
from grid61_boxes import from_bytes, part_of, random_part, to_bytes
from grid61_definition import sums as defined_sums
from seeded import seeded
from vectors.make_grid61 import box_bytes, cases

from weightbus.digest import Digester
from weightbus.digest.reference import ReferenceSums
from weightbus.memory.shard import Part
from weightbus.planning.box import Box

RECORD = json.loads((Path(__file__).parents[1] / "vectors" / "grid61.json").read_text())

Make = Callable[[Sequence[Part]], Any]


def cpu(parts: Sequence[Part]) -> Any:
    return pytest.importorskip("weightbus.digest.cpu").CpuSums(parts)


@cache
def extension_without_int128() -> Any:
    """csrc/grid61_cpu.cpp as a compiler without 128-bit integers sees it."""
    headers = sysconfig.get_path("include")
    if not (Path(headers) / "Python.h").exists():
        pytest.skip(f"no Python.h in {headers}")
    source = Path(__file__).parents[2] / "csrc" / "grid61_cpu.cpp"
    library = compiled(source, "-U__SIZEOF_INT128__", f"-I{headers}")
    spec = importlib.util.spec_from_file_location("_grid61", library)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CpuWithoutInt128:
    def __init__(self, parts: Sequence[Part]) -> None:
        self.module = extension_without_int128()
        self.sums_of_parts = cpu(parts)

    def launch(self, seed: bytes, stream: None) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("weightbus.digest.cpu._grid61", self.module)
            return self.sums_of_parts.launch(seed, stream)


def cuda(parts: Sequence[Part]) -> Any:
    from weightbus.digest.cuda import CudaSums

    return CudaSums(parts)


def cuda_source(tile_bytes: int) -> Make:
    return lambda parts: CudaOnHost(parts, tile_bytes)


needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
IMPLEMENTATIONS = [
    pytest.param(ReferenceSums, "cpu", id="reference"),
    pytest.param(cpu, "cpu", id="cpu"),
    pytest.param(CpuWithoutInt128, "cpu", id="cpu-without-int128", marks=needs_compiler),
    pytest.param(cuda_source(512), "cpu", id="cuda-source-512", marks=needs_compiler),
    pytest.param(cuda_source(1 << 13), "cpu", id="cuda-source-8K", marks=needs_compiler),
    pytest.param(cuda, "cuda", id="cuda", marks=pytest.mark.cuda),
    pytest.param(ReferenceSums, "cuda", id="reference-cuda", marks=pytest.mark.cuda),
]


@pytest.mark.parametrize(("make", "device"), IMPLEMENTATIONS)
def test_vectors(make: Make, device: str) -> None:
    by_seed: dict[str, list[tuple[Part, str]]] = {}
    for vector in RECORD["vectors"]:
        shape, offsets, sizes = (tuple(vector[key]) for key in ("shape", "offsets", "sizes"))
        tensor = from_bytes(
            box_bytes(vector["itemsize"], shape, offsets, sizes), vector["itemsize"], sizes, device
        )
        found = by_seed.setdefault(vector["seed"], [])
        found.append((part_of(tensor, shape, Box(offsets, sizes)), vector["digest"]))
    for seed, pairs in by_seed.items():
        sums = make([part for part, _ in pairs]).launch(bytes.fromhex(seed), None)()
        for (part, want), (lane0, lane1) in zip(pairs, sums.tolist(), strict=True):
            assert f"grid61:{lane0:016x}{lane1:016x}" == want, f"{part.spec} {part.box}"


def test_the_vectors_are_those_of_the_definition() -> None:
    for vector, case in zip(RECORD["vectors"], cases(), strict=True):
        itemsize, shape, offsets, sizes, seed = case
        lane0, lane1 = defined_sums(
            box_bytes(itemsize, shape, offsets, sizes), itemsize, shape, offsets, sizes, seed
        )
        assert vector["digest"] == f"grid61:{lane0:016x}{lane1:016x}"


@pytest.mark.parametrize(("make", "device"), IMPLEMENTATIONS)
@pytest.mark.parametrize("first", [0, 1000])
def test_random_parts(make: Make, device: str, first: int) -> None:
    parts = [random_part(seeded(first + i), device) for i in range(60)]
    seed = seeded(first).randbytes(32)
    sums = make(parts).launch(seed, None)()
    assert sums.dtype == np.uint64
    for part, got in zip(parts, sums.tolist(), strict=True):
        box, itemsize = part.box, part.tensor.element_size()
        want = defined_sums(to_bytes(part.tensor), itemsize, part.spec.shape, box.offsets, box.sizes, seed)
        assert tuple(got) == want, f"{part.spec} {part.box} strides {part.tensor.stride()}"


@pytest.mark.parametrize(("make", "device"), IMPLEMENTATIONS)
def test_tiles_of_many_rows_and_strips(make: Make, device: str) -> None:
    """Large enough for several tiles along rows and runs, against the reference on the same bytes."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).to(device)

    wide = draw(300, 1500)
    parts = [
        part_of(wide),
        part_of(wide[3:, 1:1200], (400, 3000), Box((5, 7), (297, 1199))),
        part_of(wide.t()),
        part_of(draw(700_001)),
        part_of(draw(3, 40_000)[:, 1:], (3, 40_001), Box((0, 1), (3, 39_999))),
        part_of(draw(5, 6, 7, 128).transpose(0, 2)),
        part_of(draw(40, 1000, 3)[:, 100:900, :2], (40, 1000, 3), Box((0, 100, 1), (40, 800, 2))),
    ]
    seed = bytes(range(32))
    want = ReferenceSums([Part(spec=p.spec, box=p.box, tensor=p.tensor.cpu()) for p in parts]).launch(
        seed, None
    )()
    assert np.array_equal(make(parts).launch(seed, None)(), want)


def test_a_tensor_of_very_many_axes_is_left_to_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    shape = (2,) * 18 + (64,)
    box = Box((1,) * 18 + (0,), (1,) * 18 + (64,))
    tensor = from_bytes(range(64), 1, box.sizes)
    (got,) = Digester([part_of(tensor, shape, box)]).sums(bytes(32)).tolist()
    assert tuple(got) == defined_sums(bytes(range(64)), 1, shape, box.offsets, box.sizes)
    assert "exact but slower" in caplog.text
