"""The laws of docs/digest.md over random tensors, partitions and shardings. The plain-integer definition is the
oracle where it is quick enough; where a law relates sums to sums, it stands without one."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist
from grid61_boxes import (
    DTYPES,
    chunked,
    from_bytes,
    held_otherwise,
    part_of,
    partition,
    random_part,
    random_tensor,
    strided_shards,
    to_bytes,
)
from grid61_definition import canonical, key
from grid61_definition import sums as defined_sums
from hypothesis import given, settings
from hypothesis import strategies as st
from seeded import seeded
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from weightbus import Digest, combine, tensor_digest
from weightbus.digest import STABLE_SEED, Digester, P, fold, sub_part
from weightbus.planning.box import Box

SEED = bytes(range(32))
rngs = st.integers(0, 2**32).map(seeded)
quick = settings(deadline=None, max_examples=40)
Sums = tuple[int, int]


def sums_of(tensor: Tensor, shape: Sequence[int], box: Box, seed: bytes = SEED) -> Sums:
    (row,) = Digester([part_of(tensor, shape, box)]).sums(seed).tolist()
    return row[0], row[1]


def whole_sums(tensor: Tensor, seed: bytes = SEED) -> Sums:
    return sums_of(tensor, tensor.shape, Box.whole(tensor.shape), seed)


def total(rows: Sequence[Sums]) -> Sums:
    return sum(row[0] for row in rows) % P, sum(row[1] for row in rows) % P


def local(tensor: Tensor, box: Box) -> Tensor:
    return tensor[box.within(Box.whole(tensor.shape))]


def random_whole(rng: random.Random) -> Tensor:
    part = random_part(rng, max_bytes=6000)
    return random_tensor(rng, part.tensor.element_size(), part.spec.shape)


@quick
@given(rngs)
def test_any_partition_adds_up(rng: random.Random) -> None:
    tensor = random_whole(rng)
    boxes = partition(rng, Box.whole(tensor.shape), rng.randint(1, 12))
    rng.shuffle(boxes)
    parts = [part_of(held_otherwise(rng, local(tensor, box)), tensor.shape, box) for box in boxes]
    rows = [tuple(row) for row in Digester(parts).sums(SEED).tolist()]
    want = defined_sums(to_bytes(tensor), tensor.element_size(), tensor.shape, seed=SEED)
    assert total(rows) == want
    assert whole_sums(tensor) == want


@quick
@given(rngs)
def test_combine_of_any_partition_with_replicas(rng: random.Random) -> None:
    tensor = random_whole(rng)
    boxes = partition(rng, Box.whole(tensor.shape), rng.randint(1, 8))
    groups = [boxes[i::3] for i in range(3)]  # ranks that hold several boxes, or none
    digests = [
        Digest(
            sums=total([sums_of(local(tensor, box), tensor.shape, box) for box in group]),
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            boxes=tuple(group),
            seed=SEED,
        )
        for group in groups
    ]
    digests += rng.choices(digests, k=2)
    rng.shuffle(digests)
    assert combine(digests) == tensor_digest(tensor, seed=SEED)


@quick
@given(rngs, st.integers(1, 5), st.integers(1, 5))
def test_shards_of_fsdp_times_tensor_parallel(rng: random.Random, rows: int, columns: int) -> None:
    """Shard(0) of Shard(0) and of Shard(1), uneven and empty ones included."""
    shape = (rng.randint(1, 23), rng.choice([1, 3, 9, 33, 70]), *rng.choice([(), (3,), (3, 3)]))
    tensor = random_tensor(rng, rng.choice([1, 2, 4]), shape)
    axis = rng.randint(0, 1)
    boxes = [piece for shard in chunked(Box.whole(shape), axis, columns) for piece in chunked(shard, 0, rows)]
    assert len(boxes) == rows * columns
    found = [sums_of(local(tensor, box).clone(), shape, box) for box in boxes]
    assert total(found) == whole_sums(tensor)


@quick
@given(rngs, st.integers(1, 4), st.integers(1, 4))
def test_shards_of_strided_shard(rng: random.Random, ways: int, split_factor: int) -> None:
    """A rank's rows lie apart in the tensor but together in its memory."""
    shape = (rng.randint(1, 30), rng.choice([1, 5, 16, 40]))
    tensor = random_tensor(rng, rng.choice([1, 2, 4]), shape)
    found: list[Sums] = []
    for boxes in strided_shards(Box.whole(shape), 0, ways, split_factor):
        held = torch.cat([local(tensor, box) for box in boxes])
        first = 0
        for box in boxes:
            found.append(sums_of(held[first : first + box.sizes[0]], shape, box))
            first += box.sizes[0]
    assert total(found) == whole_sums(tensor)


@pytest.mark.parametrize(
    "placements",
    [
        (Shard(0), Shard(0)),
        (Shard(0), Shard(1)),
        (Shard(1), Replicate()),
        (Replicate(), Replicate()),
        (_StridedShard(0, split_factor=2), Shard(0)),
        (_StridedShard(0, split_factor=2), Replicate()),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(13, 40), (4, 9), (2, 3, 2), (6, 0)], ids=str)
def test_dtensors_of_all_ranks_combine_to_the_tensor(
    placements: tuple[Placement, ...], shape: tuple[int, ...]
) -> None:
    tensor = random_tensor(seeded(1), 2, shape)
    digests = []
    for rank in range(6):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=6)
        try:
            mesh = init_device_mesh("cpu", (3, 2))
            digests.append(
                tensor_digest(distribute_tensor(tensor, mesh, placements, src_data_rank=None), seed=SEED)
            )
        finally:
            dist.destroy_process_group()
    assert combine(digests) == tensor_digest(tensor, seed=SEED)


@quick
@given(rngs, st.integers(1, 2**40))
def test_an_outer_offset_is_a_factor(rng: random.Random, offset: int) -> None:
    """Also beyond 2**32 elements: the box is small, its place is not."""
    itemsize = rng.choice([1, 2, 4, 8, 16])
    sizes = (rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 70))
    row = rng.randint(max(64 // itemsize, sizes[2]), 2**20)
    axis = rng.randint(0, 1)
    middle = rng.randint(3, 9) + offset * axis
    shape = (3 + offset * (1 - axis), middle, row)
    start = rng.randint(0, row - sizes[2])
    tensor = random_tensor(rng, itemsize, sizes)
    near = sums_of(tensor, shape, Box((0, 0, start), sizes))
    moved = [0, 0, start]
    moved[axis] = offset
    far = sums_of(tensor, shape, Box(tuple(moved), sizes))
    factors = [pow(key(SEED, lane, 2 - axis), offset, P) for lane in (0, 1)]
    assert far == (near[0] * factors[0] % P, near[1] * factors[1] % P)


@quick
@given(rngs, st.integers(1, 2**38), st.integers(0, 3))
def test_an_offset_of_whole_words_in_the_row_is_a_factor(rng: random.Random, words: int, phase: int) -> None:
    size = rng.randint(1, 200)
    tensor = random_tensor(rng, 1, (size,))
    shape = (4 * words + phase + size + rng.randint(0, 9),)
    near = sums_of(tensor, shape, Box((phase,), (size,)))
    far = sums_of(tensor, shape, Box((phase + 4 * words,), (size,)))
    factors = [pow(key(SEED, lane, 0), words, P) for lane in (0, 1)]
    assert far == (near[0] * factors[0] % P, near[1] * factors[1] % P)


@quick
@given(rngs)
def test_pieces_of_a_tensor_beyond_all_memory_add_up(rng: random.Random) -> None:
    shape = rng.choice([(2**36,), (2**33, 64), (2**20, 2**20), (2**33, 3), (2**32, 5, 7)])
    dims = range(len(shape))
    sizes = tuple(rng.randint(1, min(shape[d], 20)) for d in dims)
    offsets = tuple(rng.randint((shape[d] - sizes[d]) // 2, shape[d] - sizes[d]) for d in dims)
    itemsize = rng.choice([1, 2, 4])
    tensor = random_tensor(rng, itemsize, sizes)
    box = Box(offsets, sizes)
    want = defined_sums(to_bytes(tensor), itemsize, shape, offsets, sizes, SEED)
    assert sums_of(tensor, shape, box) == want
    pieces = partition(rng, box, rng.randint(2, 6))
    assert total([sums_of(tensor[piece.within(box)], shape, piece) for piece in pieces]) == want


@quick
@given(rngs)
def test_a_sparse_update_is_seen_from_its_bytes_alone(rng: random.Random) -> None:
    old = random_whole(rng)
    if not old.numel():
        return
    box = rng.choice(partition(rng, Box.whole(old.shape), 5))
    new = old.clone()
    view = local(new, box)
    view.copy_(random_tensor(rng, old.element_size(), box.sizes))
    before, after = sums_of(local(old, box), old.shape, box), sums_of(view, old.shape, box)
    was = whole_sums(old)
    assert whole_sums(new) == ((was[0] - before[0] + after[0]) % P, (was[1] - before[1] + after[1]) % P)


@quick
@given(rngs, st.integers(1, 255))
def test_any_changed_byte_changes_both_lanes(rng: random.Random, flip: int) -> None:
    tensor = random_whole(rng)
    raw = bytearray(to_bytes(tensor))
    if not raw:
        return
    raw[rng.randrange(len(raw))] ^= flip
    was, now = whole_sums(tensor), whole_sums(from_bytes(raw, tensor.element_size(), tensor.shape))
    assert was[0] != now[0]
    assert was[1] != now[1]


@pytest.mark.parametrize("shape", [(6, 70), (6, 5), (420,), (2, 3, 70), (6, 5, 3)], ids=str)
def test_rows_in_another_order_are_seen(shape: tuple[int, ...]) -> None:
    tensor = random_tensor(seeded(4), 2, shape)
    swapped = tensor.flip(0).contiguous()
    shifted = tensor.roll(1, -1).contiguous()
    assert len({whole_sums(t) for t in (tensor, swapped, shifted)}) == 3


def test_shapes_agree_where_their_canonical_shapes_do() -> None:
    data = seeded(5).randbytes(2 * 3 * 4 * 16)
    shapes = [(96, 4), (24, 16), (6, 64), (3, 128), (384,), (2, 3, 64), (6, 16, 4), (2, 3, 4, 16), (6, 4, 16)]
    by_canonical: dict[tuple[int, ...], set[Sums]] = {}
    for shape in shapes:
        found = by_canonical.setdefault(tuple(canonical(shape, 1)), set())
        found.add(whole_sums(from_bytes(data, 1, shape)))
    assert (6, 64) in by_canonical
    assert (384,) in by_canonical
    assert all(len(found) == 1 for found in by_canonical.values())
    assert len(set.union(*by_canonical.values())) == len(by_canonical) > 3


def test_the_seed_decides() -> None:
    tensor = random_tensor(seeded(6), 2, (7, 64))
    seeds = [STABLE_SEED, SEED, SEED[::-1], b"\1" + bytes(31), bytes(31) + b"\1"]
    lanes = [lane for seed in seeds for lane in whole_sums(tensor, seed)]
    assert len(set(lanes)) == 2 * len(seeds)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_storage_that_starts_anywhere(itemsize: int) -> None:
    """At addresses that no load of a word or a vector is aligned to, next to bytes that do not count."""
    data = seeded(7).randbytes(5 * 48 * itemsize)
    want = defined_sums(data, itemsize, (5, 48), seed=SEED)
    for shift in range(17):
        memory = bytearray(b"\xff" * shift + data + b"\xff" * 40)
        tensor = torch.frombuffer(memory, dtype=DTYPES[itemsize], count=5 * 48, offset=shift).view(5, 48)
        assert whole_sums(tensor) == want


@quick
@given(rngs, st.integers(1, 15), st.sampled_from([1, 2, 4, 8]))
def test_columns_narrower_than_a_vector(rng: random.Random, width: int, itemsize: int) -> None:
    shape = (rng.randint(1, 200), rng.randint(64, 90))
    tensor = random_tensor(rng, itemsize, shape)
    boxes = [Box((0, start), (shape[0], min(width, shape[1] - start))) for start in range(0, shape[1], width)]
    in_place = [sums_of(local(tensor, box), shape, box) for box in boxes]
    copied = [sums_of(local(tensor, box).clone(), shape, box) for box in boxes]
    assert in_place == copied
    assert total(in_place) == whole_sums(tensor)


@quick
@given(rngs)
def test_boxes_that_cut_a_merged_axis(rng: random.Random) -> None:
    """A convolution's kernel split by its input channels, or by a place in its window."""
    window = rng.choice([(3, 3), (1, 1), (3,), (5,), (2, 2, 2), (7,)])
    shape = (rng.randint(1, 9), rng.randint(2, 12), *window)
    itemsize = rng.choice([1, 2, 4])
    tensor = random_tensor(rng, itemsize, shape)
    axis = rng.randint(1, len(shape) - 1)
    boxes = chunked(Box.whole(shape), axis, rng.randint(2, 4))
    rows = [sums_of(local(tensor, box), shape, box) for box in boxes]
    assert total(rows) == whole_sums(tensor)
    assert total(rows) == defined_sums(to_bytes(tensor), itemsize, shape, seed=SEED)


def test_strides_of_zero_and_overlapping_windows() -> None:
    """Views that read a byte many times are the tensors that they look like."""
    rows = random_tensor(seeded(8), 4, (1, 70)).expand(9, 70)
    scalar = random_tensor(seeded(9), 2, ()).expand(40, 33)
    windows = random_tensor(seeded(10), 1, (300,)).unfold(0, 90, 3)
    for view in (rows, scalar, windows):
        assert whole_sums(view) == whole_sums(view.clone(memory_format=torch.contiguous_format))


@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0), (3, 0, 5), (2, 70, 0)], ids=str)
def test_no_elements_have_sums_of_zero(shape: tuple[int, ...]) -> None:
    assert whole_sums(torch.zeros(shape)) == (0, 0)


def test_zeros_have_sums_of_zero_and_negative_zeros_do_not() -> None:
    assert whole_sums(torch.zeros(9, 70)) == (0, 0)
    assert whole_sums(-torch.zeros(9, 70)) != (0, 0)
    assert whole_sums(torch.tensor(0.0)) != whole_sums(torch.tensor(-0.0))


def test_nans_are_their_bits() -> None:
    quiet, other = (
        torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001)
    )
    assert quiet.isnan().all()
    assert other.isnan().all()
    assert whole_sums(quiet) == whole_sums(quiet.clone())
    assert whole_sums(quiet) != whole_sums(other)


@quick
@given(rngs)
def test_folds_add_up_as_parts_do(rng: random.Random) -> None:
    names, boxes, parts = [], [], []
    tensors = {f"layer.{i}.wäight": random_whole(rng) for i in range(4)}
    for name, tensor in tensors.items():
        for box in partition(rng, Box.whole(tensor.shape), rng.randint(1, 4)):
            names.append(name)
            boxes.append(box)
            parts.append(part_of(local(tensor, box), tensor.shape, box, name))
    sums = Digester(parts).sums(SEED)
    cut = rng.randint(0, len(parts))
    ranks = [fold(names[a:b], sums[a:b], SEED) for a, b in ((0, cut), (cut, len(parts)))]
    whole = np.array([whole_sums(tensor) for tensor in tensors.values()], dtype=np.uint64)
    want = fold(list(tensors), whole, SEED)
    assert total(ranks) == want
    if len({bytes(to_bytes(tensor)) for tensor in tensors.values()} - {b""}) > 1:
        assert fold(list(tensors)[::-1], whole, SEED) != want


@quick
@given(rngs)
def test_halving_boxes_finds_the_changed_byte(rng: random.Random) -> None:
    good = random_tensor(rng, 2, rng.choice([(40, 50), (700,), (9, 8, 7)]))
    bad = good.clone()
    place = tuple(rng.randrange(n) for n in good.shape)
    bad.view(torch.int16)[place] ^= 1 << rng.randrange(15)
    box, calls = Box.whole(good.shape), 0
    while box.volume > 1:
        (box,) = [piece for piece in box.split(math.ceil(box.volume / 2)) if differs(good, bad, piece)]
        calls += 1
    assert box.offsets == place
    assert calls < 25


def differs(a: Tensor, b: Tensor, box: Box) -> bool:
    pieces = [sub_part(part_of(tensor), box) for tensor in (a, b)]
    one, other = Digester([piece for piece in pieces if piece]).sums(SEED).tolist()
    return bool(one != other)
