"""What a digest copies as it reads: the sums of a digest alone, and the bits of a copy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_on_host import COMPILER, CudaOnHost
from grid61_boxes import part_of, partition
from seeded import seeded
from torch import Tensor

from weightbus.digest import Digester, why_not_copied
from weightbus.digest.segments import BoxCopy, why_not_written
from weightbus.memory.shard import Part, bits_of
from weightbus.planning.box import Box

SEED = bytes(range(32))
GUARD = 0x5A
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
IMPLEMENTATIONS = [
    pytest.param("cpu", id="cuda-source", marks=needs_compiler),
    pytest.param("cuda", id="cuda", marks=pytest.mark.cuda),
]
WIRES = {
    torch.uint8: (torch.uint8,),
    torch.bfloat16: (torch.bfloat16,),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.int64: (torch.int64,),
}


def copying(parts: Sequence[Part], copies: Sequence[Sequence[BoxCopy]], device: str) -> Any:
    if device == "cpu":
        return CudaOnHost(parts, 512, copies)
    from weightbus.digest.cuda import CudaSums

    return CudaSums(parts, copies)


def memory(rng: random.Random, sizes: Sequence[int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A view of these sizes, its axes in some order with gaps between, and the memory around it, all guards."""
    axes = len(sizes)
    order = rng.sample(range(axes - 1), axes - 1) if axes > 1 and rng.random() < 0.3 else list(range(axes - 1))
    order += [axes - 1] * (axes > 0)
    gaps = [rng.choice([0, 0, 16, 3]) if i == axes - 1 else rng.choice([0, 0, 1]) for i in order]
    room = [sizes[axis] + gap for axis, gap in zip(order, gaps, strict=True)]
    whole = torch.full((*room, dtype.itemsize), GUARD, dtype=torch.uint8, device=device).view(dtype)
    whole = whole.reshape(room)
    view = whole.permute([order.index(axis) for axis in range(axes)])
    return view[tuple(slice(0, n) for n in sizes)], whole


def drawn(rng: random.Random, device: str) -> tuple[Part, list[BoxCopy], list[Tensor]]:
    """A part, where boxes of it go, and the memory around those places."""
    dtype = rng.choice(list(WIRES))
    wire = rng.choice(WIRES[dtype])
    shape = [rng.choice([1, 2, 3, 5, 9]) for _ in range(rng.randint(0, 3))]
    shape.append(rng.choice([1, 7, 8, 16, 32, 48, 64, 256, 264, 600, 1040]))
    offsets = [rng.randrange(n) if rng.random() < 0.4 else 0 for n in shape]
    offsets[-1] -= offsets[-1] % 16
    sizes = [
        rng.randint(1, n - o) if rng.random() < 0.4 else n - o for n, o in zip(shape, offsets, strict=True)
    ]
    source, _ = memory(rng, sizes, dtype, device)
    raw = torch.from_numpy(np.frombuffer(rng.randbytes(source.numel() * dtype.itemsize), np.uint8).copy())
    values = raw.view(dtype).view(sizes)
    if wire != dtype:
        values = torch.randn(sizes, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    source.copy_(values)
    part = part_of(source, shape, Box(tuple(offsets), tuple(sizes)))
    part = replace(part, spec=replace(part.spec, dtype=str(wire).removeprefix("torch.")))
    boxes = partition(rng, part.box, rng.choice([1, 1, 1, 2, 4]))
    placed = [memory(rng, box.sizes, wire, device) for box in boxes]
    return part, [(box, view) for box, (view, _) in zip(boxes, placed, strict=True)], [m for _, m in placed]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(bits_of(one.contiguous()), bits_of(other.contiguous()))


@pytest.mark.parametrize("device", IMPLEMENTATIONS)
def test_sums_and_bits_are_those_of_a_digest_and_a_copy(device: str) -> None:
    """Over random boxes, dtypes, strides and casts; nothing beside a copy is written."""
    cases = [drawn(seeded(i), device) for i in range(700)]
    cases = [case for case in cases if not why_not_written(case[0], case[1])]
    parts, copies, around = zip(*cases, strict=True)
    kinds = {(part.tensor.dtype, part.spec.dtype) for part in parts}
    assert len(cases) > 100
    assert len(kinds) == sum(map(len, WIRES.values()))
    assert any(len(found) > 1 for found in copies)
    want = Digester(parts).sums(SEED)
    expected = []
    for part, found, memories in cases:
        wholes = [memory.clone() for memory in memories]
        for (box, dst), memory, whole in zip(found, memories, wholes, strict=True):
            start = (dst.data_ptr() - memory.data_ptr()) // dst.itemsize
            place = torch.as_strided(whole, dst.shape, dst.stride(), start)
            place.copy_(part.tensor[box.within(part.box)])
        expected.append(wholes)
    digester = copying(parts, copies, device)
    for _ in range(2):
        found = digester.launch(SEED, None)()
        assert np.array_equal(found, want)
        for memories, wholes in zip(around, expected, strict=True):
            assert all(map(same_bits, memories, wholes))


@pytest.mark.parametrize("device", IMPLEMENTATIONS)
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("shape", [(3, 40_000), (400, 1040), (3000, 64), (90, 4096), (200_000,)])
def test_tiles_of_all_kinds(device: str, cast: bool, shape: tuple[int, ...]) -> None:
    """Rows of many strips, few long runs, many short ones, and the left half of columns."""
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    for source in (wide, wide[..., : shape[-1] // 2]):
        source = source if cast else source.bfloat16()
        part = part_of(source, shape, Box((0,) * len(shape), tuple(source.shape)))
        part = replace(part, spec=replace(part.spec, dtype="bfloat16"))
        dst = torch.zeros(source.shape, dtype=torch.bfloat16, device=device)
        assert not why_not_written(part, [(part.box, dst)])
        found = copying([part], [[(part.box, dst)]], device).launch(SEED, None)()
        assert np.array_equal(found, Digester([part]).sums(SEED))
        assert same_bits(dst, source.bfloat16())


def test_what_is_not_whole_vectors_or_not_all_once_is_left_to_others() -> None:
    source = torch.zeros(8, 64, dtype=torch.bfloat16)
    part, dst = part_of(source), torch.zeros(8, 64, dtype=torch.bfloat16)
    whole, half = part.box, Box((0, 0), (4, 64))
    assert not why_not_written(part, [(whole, dst)])
    for copies in ([], [(half, dst[:4])], [(half, dst[:4]), (half, dst[4:])], [(whole, dst), (whole, dst)]):
        assert "not all that is digested" in why_not_written(part, copies)
    odd = torch.zeros(8, 65, dtype=torch.bfloat16)
    for place in (odd[:, 1:], odd[:, :64], torch.zeros(64, 8, dtype=torch.bfloat16).t()):
        assert "16 bytes" in why_not_written(part, [(whole, place)])
    short = part_of(torch.zeros(8, 60, dtype=torch.bfloat16))
    assert "16 bytes" in why_not_written(short, [(short.box, torch.zeros(8, 60, dtype=torch.bfloat16))])


def test_on_the_host_nothing_is_copied_by_a_digest() -> None:
    part, dst = part_of(torch.zeros(8, 64)), torch.zeros(8, 64)
    assert why_not_copied(part, [(part.box, dst)]) == "both do not lie on one CUDA device"


@pytest.mark.cuda
def test_where_both_lie_on_a_gpu_all_is_copied_unless_it_is_of_another_dtype() -> None:
    part = part_of(torch.zeros(8, 64, device="cuda"))
    assert why_not_copied(part, [(part.box, torch.zeros(8, 64, device="cuda"))]) == ""
    assert "CUDA device" in why_not_copied(part, [(part.box, torch.zeros(8, 64))])
    other = torch.zeros(8, 64, dtype=torch.bfloat16, device="cuda")
    assert "another dtype" in why_not_copied(part, [(part.box, other)])
