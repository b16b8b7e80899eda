"""Copies in batches: as ``copy_`` one by one, whatever the strides, dtypes and places."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from weightbus.memory.copy_descriptors import BYTES, CASTS, VECTORS, Piece, cast_pieces, piece_of
from weightbus.memory.cuda_copy import CudaCopies
from weightbus.memory.torch_copy import Copies

# What the kernel leaves to torch.
ODD = {"long unaligned", "transposed", "cast of odd length", "cast unaligned", "widening cast", "empty"}


def memory(nbytes: int, device: str, start: int) -> Tensor:
    """Bytes that start so many after a vector's boundary."""
    raw = torch.empty(nbytes + 64, dtype=torch.uint8, device=device)
    skip = -raw.data_ptr() % 16 + start
    return raw[skip : skip + nbytes]


def tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str, start: int = 0, fill: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(fill)
    count = torch.Size(shape).numel()
    values = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    place = memory(count * dtype.itemsize, device, start)
    place.copy_(values % 2 if dtype == torch.bool else values)
    if dtype.is_floating_point and dtype.itemsize == 4:
        special = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-40, 65520.0, 3.3e38, 1.00390625])
        place.view(dtype)[: len(special)] = special[:count].to(device)
    return place.view(dtype).view(shape)


def pairs(device: str) -> list[tuple[str, Tensor, Tensor]]:
    """Name, destination, source; destinations are zeroed."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    cases = [
        ("vectors", (512, 48), bf16, bf16, 0, 0, None),
        ("many tiles", (700, 1024), f32, f32, 0, 0, None),
        ("unaligned bytes", (7, 5), torch.uint8, torch.uint8, 3, 1, None),
        ("long unaligned", (300, 401), bf16, bf16, 2, 2, None),
        ("columns", (64, 128), bf16, bf16, 0, 0, (slice(None), slice(32, 96))),
        ("odd columns", (9, 31), f32, f32, 0, 0, (slice(1, 8), slice(3, 20))),
        ("rows of planes", (3, 40, 16), f32, f32, 0, 0, (slice(None), slice(8, 24))),
        ("transposed", (24, 40), f32, f32, 0, 0, "t"),
        ("cast", (500, 640), bf16, f32, 0, 0, None),
        ("cast of columns", (70, 256), bf16, f32, 0, 0, (slice(None), slice(64, 128))),
        ("cast of odd length", (11, 3), bf16, f32, 0, 0, None),
        ("cast unaligned", (16, 16), bf16, f32, 2, 4, None),
        ("cast to half", (40, 64), f16, f32, 0, 0, None),
        ("widening cast", (40, 64), f32, bf16, 0, 0, None),
        ("0-d", (), f32, f32, 0, 0, None),
        ("empty", (0, 4), f32, f32, 0, 0, None),
        ("complex", (5, 6), torch.complex64, torch.complex64, 0, 0, None),
        ("bool", (33,), torch.bool, torch.bool, 0, 0, None),
        ("fp8", (4, 24), torch.float8_e4m3fn, torch.float8_e4m3fn, 0, 0, None),
    ]
    found = []
    for i, (name, shape, to, of, dst_start, src_start, cut) in enumerate(cases):
        src = tensor(shape, of, device, src_start, fill=i)
        dst = tensor(shape, to, device, dst_start).zero_()
        if cut == "t":
            src, dst = src.t(), dst.t().contiguous()
        elif cut is not None:
            src, dst = src[cut], (dst[cut] if "odd" in name else dst[cut].contiguous())
        found.append((name, dst, src))
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8).cpu()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_copies_in_a_batch(device: str) -> None:
    found = pairs(device)
    copies = Copies()
    assert not copies
    for _, dst, src in found:
        copies.add(dst, src)
    assert copies
    for _ in range(2):
        for _, dst, _ in found:
            dst.zero_()
        copies.run()
        for name, dst, src in found:
            assert torch.equal(bits(dst), bits(src.to(dst.dtype))), name


@pytest.mark.cuda
def test_on_cuda_the_kernel_takes_them_all_but_the_odd_ones() -> None:
    found = pairs("cuda")
    fit = [piece for _, dst, src in found if (piece := piece_of(dst, src)) is not None]
    assert {name for name, dst, src in found if piece_of(dst, src) is None} == ODD
    CudaCopies(fit, found[0][1].device).run()
    for name, dst, src in found:
        if name not in ODD:
            assert torch.equal(bits(dst), bits(src.to(dst.dtype))), name


CAST_CASES = [
    ((500, 640), slice(None), 0, 0),
    ((70, 256), (slice(None), slice(64, 128)), 0, 0),
    ((70, 256), (slice(3, 60), slice(1, 132)), 0, 0),
    ((11, 3), slice(None), 0, 0),
    ((1003,), slice(None), 0, 0),
    ((16, 16), slice(None), 2, 4),
    ((3, 40, 16), (slice(None), slice(8, 24)), 0, 0),
    ((), ..., 0, 0),
    ((0, 4), slice(None), 0, 0),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_pieces_that_cast_whatever_is_aligned(device: str, to: torch.dtype) -> None:
    """Of floats that lie in another process's memory, say: by address and strides alone."""
    for shape, cut, dst_start, src_start in CAST_CASES:
        whole = tensor(shape, torch.float32, device, src_start, fill=5)
        if device == "cpu":  # torch casts a NaN otherwise in vectors than one by one
            whole.nan_to_num_(1.5)
        src = whole[cut]
        around = tensor(shape, to, device, dst_start)
        before, dst = around.clone(), around[cut]
        pieces = cast_pieces(dst, src.data_ptr(), src.stride(), CASTS[torch.float32, to])
        if device == "cpu":
            for piece in pieces:
                replay(piece, dst, src)
        elif pieces:
            for share in (1, 4):
                dst.zero_()
                CudaCopies(pieces, dst.device, share=share).run()
        assert torch.equal(bits(dst), bits(src.to(to))), (shape, cut)
        before[cut] = src.to(to)
        assert torch.equal(bits(around), bits(before)), "nothing beside it is written"


def replay(piece: Piece, dst: Tensor, src: Tensor) -> None:
    """What the kernel does, by its own fields."""
    unit = {VECTORS: 16, BYTES: 1}.get(piece.kind)
    for row in range(piece.rows):
        to, of = piece.dst + row * piece.dst_pitch, piece.src + row * piece.src_pitch
        if unit:
            ctypes.memmove(to, of, piece.units * unit)
            continue
        each = 32 if piece.kind in CASTS.values() else 4
        floats = (ctypes.c_char * (piece.units * each)).from_address(of)
        cast = torch.frombuffer(bytearray(bytes(floats)), dtype=torch.float32).to(dst.dtype)
        ctypes.memmove(to, cast.data_ptr(), cast.nbytes)


def test_pieces_say_where_everything_goes() -> None:
    taken = set()
    for name, dst, src in pairs("cpu"):
        piece = piece_of(dst, src)
        if piece is None:
            continue
        taken.add(name)
        replay(piece, dst, src)
        assert torch.equal(bits(dst), bits(src.to(dst.dtype))), name
    assert {
        "vectors",
        "many tiles",
        "unaligned bytes",
        "columns",
        "odd columns",
        "cast",
        "cast of columns",
    } <= taken
    assert not taken & {"long unaligned", "transposed", "cast of odd length", "cast unaligned", "widening cast"}
