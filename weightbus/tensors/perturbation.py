"""Other values in place of live weights, so that a test can prove what an update wrote."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from weightbus.errors import SpecError
from weightbus.memory.shard import Part, bits_of
from weightbus.tensors.layout import Source, layout_of

CHUNK_ELEMENTS = 1 << 22


def perturb(source: Source, *, seed: int = 0, persistent_only: bool = True) -> None:
    """Overwrite what this rank holds of ``source`` in place, for tests: no element keeps its bits.

    Every element of every tensor is written with another value than it had: floats, and both parts of complex
    numbers, of size 0.5 to 2 (float8_e8m0fnu: 1/128 to 128), integers of any, a bool its opposite. So an
    element that an update should have written and did not shows in a digest. Storage is never rebound; a tied
    tensor is written once.
    seed: any integer. On one kind of device, seed, name, box, dtype and values before decide the values, so
        that replicas which are equal stay equal. torch's global random state is not used.
    Talks to no other rank; runs on each device's current stream, in pieces of CHUNK_ELEMENTS elements.
    Raises SpecError, with nothing written, where tensors share memory without being tied.
    """
    layout = layout_of(source, persistent_only=persistent_only)
    if pairs := layout.overlapping():
        first, second = pairs[0]
        raise SpecError(f"{first}: expected memory of its own, got some that {second} has too; perturb")
    with torch.no_grad():
        for parts in layout.parts.values():
            for part in parts:
                _perturb(part, seed)


def _perturb(part: Part, seed: int) -> None:
    text = f"weightbus perturb v1\0{seed}\0{part.spec.name}\0{part.box}"
    generator = torch.Generator(part.tensor.device)
    generator.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1)
    for piece in part.box.split(CHUNK_ELEMENTS):
        view = part.tensor[piece.within(part.box)]
        _write(torch.view_as_real(view) if view.is_complex() else view, generator)


def _write(view: Tensor, generator: torch.Generator) -> None:
    if view.dtype == torch.bool:
        view.logical_not_()
        return
    old, new = bits_of(view), bits_of(_draw(view, generator))
    # The lowest bit tells a drawn value from an equal one before it: a step of a mantissa, or of an integer.
    old.copy_(torch.where(new == old, new ^ 1, new))


def _draw(like: Tensor, generator: torch.Generator) -> Tensor:
    if like.dtype == torch.float8_e8m0fnu:  # powers of two: the byte is the exponent
        low, high, dtype = 120, 135, torch.uint8
    elif like.is_floating_point():
        # Away from zero, where the neighbor of a float8 may be a NaN.
        drawn = torch.rand(like.shape, dtype=torch.float32, device=like.device, generator=generator) * 3 - 1.5
        return (drawn + torch.copysign(torch.full_like(drawn, 0.5), drawn)).to(like.dtype)
    else:
        low, high, dtype = -(2**63), 2**63 - 1, torch.int64
    drawn = torch.randint(low, high, like.shape, dtype=dtype, device=like.device, generator=generator)
    return drawn.to(bits_of(like).dtype)
