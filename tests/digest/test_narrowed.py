"""Floats that are cast on their way are digested as what they are cast to, by every implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_on_host import COMPILER, CudaOnHost
from grid61_boxes import part_of, random_part
from seeded import seeded
from torch import Tensor

from weightbus.digest import Digester
from weightbus.digest.reference import ReferenceSums
from weightbus.errors import SpecError
from weightbus.memory.shard import NARROWED, Part
from weightbus.planning.box import Box

SEED = bytes(range(32))
Make = Callable[[Sequence[Part]], Any]
SPECIAL = [0.0, -0.0, 1.00390625, 1.01171875, 65504.0, 65520.0, 1e-40, 6e-8, 3.3e38, float("inf"), -1e-45]


def cuda(parts: Sequence[Part]) -> Any:
    from weightbus.digest.cuda import CudaSums

    return CudaSums(parts)


IMPLEMENTATIONS = [
    pytest.param(ReferenceSums, "cpu", id="reference"),
    pytest.param(Digester, "cpu", id="cpu"),
    pytest.param(
        lambda parts: CudaOnHost(parts, 512),
        "cpu",
        id="cuda-source",
        marks=pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    ),
    pytest.param(cuda, "cuda", id="cuda", marks=pytest.mark.cuda),
    pytest.param(ReferenceSums, "cuda", id="reference-cuda", marks=pytest.mark.cuda),
]


def floats(*shape: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    tensor = torch.randn(shape, generator=generator)
    tensor.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)[: tensor.numel()]
    if device == "cuda":  # where torch and the kernel give a NaN the same bits
        tensor.view(-1)[-1:] = float("nan")
    return tensor.to(device)


def as_wire(part: Part, dtype: str) -> tuple[Part, Part]:
    """A part of floats that travels as ``dtype``, and the same as it has been cast, on the host."""
    spec = replace(part.spec, dtype=dtype)
    cast = part.tensor.to(getattr(torch, dtype)).cpu()
    return replace(part, spec=spec), Part(spec=spec, box=part.box, tensor=cast)


def parts_on(device: str) -> list[Part]:
    wide = floats(70, 1502, device=device)
    drawn = [random_part(seeded(i), device, max_bytes=4000) for i in range(200)]
    random = [part for part in drawn if part.tensor.dtype == torch.float32]
    for part in random:
        part.tensor.copy_(torch.randn(part.tensor.shape, generator=torch.Generator().manual_seed(1)))
    assert len(random) > 20
    return [
        *random,
        part_of(wide),
        part_of(wide[3:, 1:1200], (400, 3000), Box((5, 7), (67, 1199))),
        part_of(wide[:, 8:1000]),
        part_of(wide.t()),
        part_of(floats(70_001, device=device)),
        part_of(floats(3, 4000, device=device)[:, 1:], (3, 4001), Box((0, 1), (3, 3999))),
        part_of(floats(5, 6, 7, 128, device=device).transpose(0, 2)),
        part_of(floats(4, device=device)[0]),
        part_of(floats(0, 3, device=device)),
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("make", "device"), IMPLEMENTATIONS)
def test_the_sums_are_those_of_the_cast(make: Make, device: str, dtype: str) -> None:
    live, cast = zip(*(as_wire(part, dtype) for part in parts_on(device)), strict=True)
    assert all(part.narrowed == NARROWED["float32", dtype] for part in live)
    digester = make(live)
    want = Digester(cast).sums(SEED)
    found = digester.sums(SEED) if isinstance(digester, Digester) else digester.launch(SEED, None)()
    assert np.array_equal(found, want)


@pytest.mark.cuda
def test_beside_parts_that_are_not_cast() -> None:
    live, cast = as_wire(part_of(floats(300, 700, device="cuda")), "bfloat16")
    plain = part_of(floats(30, 7, device="cuda"))
    on_host = Part(spec=plain.spec, box=plain.box, tensor=plain.tensor.cpu())
    digester = Digester([plain, live, cast])
    assert digester.nbytes == plain.tensor.nbytes + 2 * cast.tensor.nbytes
    assert np.array_equal(digester.sums(SEED), Digester([on_host, cast, cast]).sums(SEED))


def test_a_cast_that_no_kernel_does_is_refused() -> None:
    part = part_of(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(SpecError, match="expected a float32 view"):
        Digester([replace(part, spec=replace(part.spec, dtype="float32"))])
