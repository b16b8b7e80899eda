"""Every number in docs/digest.md, recomputed by every implementation."""

from __future__ import annotations

import math
import re
from ast import literal_eval
from pathlib import Path

import numpy as np
import pytest
import torch
from grid61_boxes import from_bytes, part_of
from grid61_definition import canonical, key
from test_digest_vectors import IMPLEMENTATIONS, Make
from vectors.make_grid61 import box_bytes

from weightbus import model_digest
from weightbus.digest import STABLE_SEED, fold, tensor_digest
from weightbus.memory.shard import Part
from weightbus.planning.box import Box

TEXT = (Path(__file__).parents[2] / "docs" / "digest.md").read_text()
Row = tuple[str, ...]


def table(*titles: str) -> list[Row]:
    """Rows of the table with these column titles, without marks of code."""
    head = "| " + " | ".join(titles) + " |\n"
    assert TEXT.count(head) == 1, head
    lines = TEXT[TEXT.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [tuple(cell.strip().strip("`") for cell in line.strip("|").split("|")) for line in lines]


def part(shape: str, itemsize: str, offsets: str = "", sizes: str = "", device: str = "cpu") -> Part:
    whole = literal_eval(shape)
    box = Box(literal_eval(offsets), literal_eval(sizes)) if sizes else Box.whole(whole)
    data = box_bytes(int(itemsize), whole, box.offsets, box.sizes)
    return part_of(from_bytes(data, int(itemsize), box.sizes, device), whole, box)


def text(row: list[int]) -> str:
    return "grid61:{:016x}{:016x}".format(*row)


@pytest.mark.parametrize(("make", "device"), IMPLEMENTATIONS)
def test_digests(make: Make, device: str) -> None:
    wholes = table("global shape", "itemsize", "bytes", "digest")
    boxes = table("global shape", "itemsize", "offsets", "sizes", "digest")
    assert (len(wholes), len(boxes)) == (9, 6)
    parts = [part(shape, itemsize, device=device) for shape, itemsize, _, _ in wholes]
    parts += [part(*row[:4], device=device) for row in boxes]
    found = make(parts).launch(STABLE_SEED, None)().tolist()
    assert [text(row) for row in found] == [row[-1] for row in wholes + boxes]
    nbytes = [one.tensor.numel() * one.tensor.element_size() for one in parts[: len(wholes)]]
    assert nbytes == [int(row[2]) for row in wholes]
    (seeded,) = re.findall(r"\(7, 64\), itemsize 2, with the seed `00 01 02 ... 1f`: `(.*)`", TEXT)
    assert text(make([parts[4]]).launch(bytes(range(32)), None)().tolist()[0]) == seeded


def test_canonical_shapes() -> None:
    for shape, itemsize, want in table("global shape", "itemsize", "canonical shape"):
        found = literal_eval(want.split("`")[0])
        assert tuple(canonical(literal_eval(shape), int(itemsize))) == found


def test_keys() -> None:
    for axis, *lanes in table("axis", "lane 0", "lane 1"):
        assert lanes == [f"{key(STABLE_SEED, lane, int(axis)):016x}" for lane in (0, 1)]


def test_fold_and_model_digest() -> None:
    weight = part("(7, 64)", "2").tensor
    scale = part("()", "4").tensor
    assert (weight.dtype, scale.dtype) == (torch.bfloat16, torch.float32)
    tensors = {"layer.weight": weight, "layer.scale": scale}
    sums = np.array([tensor_digest(tensor).sums for tensor in tensors.values()], dtype=np.uint64)
    (found,) = re.findall(r"Their fold is `(\w{16})`, `(\w{16})`", TEXT)
    assert found == tuple(f"{lane:016x}" for lane in fold(list(tensors), sums, STABLE_SEED))
    one = np.ones((1, 2), dtype=np.uint64)
    for name, *lanes in table("name", "`F[0]`", "`F[1]`"):
        assert lanes == [f"{lane:016x}" for lane in fold([name], one, STABLE_SEED)]
    (found,) = re.findall(r"and the model digest is `(\w{64})`", TEXT)
    assert found == model_digest(tensors.items())


def test_bounds() -> None:
    for tensor, degree, bound in table("tensor", "`D`", "bound"):
        *outer, row = canonical(literal_eval(tensor.removeprefix("bfloat16 ")), 2)
        d = -(-row * 2 // 4) - 1 + sum(n - 1 for n in outer)
        assert int(degree.replace(",", "")) == d
        assert 2 * (math.log2(d) - 61) + 2**-60 <= int(bound.removeprefix("2**"))
