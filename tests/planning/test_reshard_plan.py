"""Plans of the reshard route by brute force: replayed on arrays, each element arrives once where it is wanted.

WEIGHTBUS_LAYOUTS: how many random layouts the long test draws; the suite draws a few hundred.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import count
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightbus.errors import CoverageError, SpecError
from weightbus.planning.box import Box, less, meets
from weightbus.planning.facts import Holding
from weightbus.planning.plan import SLOT_ALIGN, Want
from weightbus.planning.reshard_plan import _prove, plan_reshard
from weightbus.planning.spec import ITEMSIZE, Spec

LAYOUTS = int(os.environ.get("WEIGHTBUS_LAYOUTS", "300"))

# What decides is drawn from a Random, which hypothesis gives, and shrinks, or a seed.
DRAWN = st.randoms(use_true_random=False)


def cut(box, dice, depth=3):
    """A random partition of a box."""
    axes = [axis for axis, size in enumerate(box.sizes) if size > 1]
    if not axes or not depth or dice.random() < 0.3:
        return [box]
    axis = dice.choice(axes)
    at = dice.randint(1, box.sizes[axis] - 1)
    low = Box(box.offsets, (*box.sizes[:axis], at, *box.sizes[axis + 1 :]))
    offsets = (*box.offsets[:axis], box.offsets[axis] + at, *box.offsets[axis + 1 :])
    high = Box(offsets, (*box.sizes[:axis], box.sizes[axis] - at, *box.sizes[axis + 1 :]))
    return cut(low, dice, depth - 1) + cut(high, dice, depth - 1)


def grid(shape, dice):
    """Boxes as a mesh cuts them: every axis in chunks, the last ones short or empty."""
    boxes = [Box((), ())]
    for size in shape:
        parts = dice.randint(1, 4)
        step = -(-size // parts)
        spans = [(min(i * step, size), min((i + 1) * step, size)) for i in range(parts)]
        boxes = [Box((*b.offsets, low), (*b.sizes, high - low)) for b in boxes for low, high in spans]
    return boxes


def dealt(spec, ranks, dice):
    """Of ``ranks`` ranks each one's holding: a mesh's boxes or a random partition, some on several ranks."""
    boxes = grid(spec.shape, dice) if dice.random() < 0.5 else cut(Box.whole(spec.shape), dice)
    held = [[] for _ in range(ranks)]
    copies = dice.choice([0, 0, 1, ranks])
    for place, box in enumerate(boxes):
        for rank in {place % ranks, *(dice.randrange(ranks) for _ in range(copies))}:
            held[rank].append(box)
    direct = dice.random() < 0.5
    # A rank without a box of a tensor may not name it at all, as of other layers or experts.
    return [
        Holding(spec=spec, boxes=tuple(boxes), in_place=direct) if boxes or not rank else None
        for rank, boxes in enumerate(held)
    ]


def draw_job(dice):
    """Sources, wants, bytes of a bucket, and hosts."""
    trainers, replicas, servers = dice.randint(1, 4), dice.randint(1, 3), dice.randint(1, 4)
    first = trainers - dice.randint(0, min(trainers, servers))  # below ``trainers``, ranks are both ends
    members = [(replica, rank) for replica in range(replicas) for rank in range(servers)]
    sources = {rank: {} for rank in range(trainers)}
    wants = {first + place: {} for place in range(len(members))}
    alike = dice.random() < 0.5
    for i in range(dice.randint(1, 3)):
        shape = tuple(dice.randint(0, 5) for _ in range(dice.randint(0, 4)))
        src = Spec(name=f"t{i}", dtype=dice.choice(["float32", "bfloat16"]), shape=shape)
        names = [src.name, f"u{i}"] if dice.random() < 0.25 else [src.name]
        tied = names[0] if len(names) > 1 else ""
        of_trainers = dealt(src, trainers, dice)
        for name in names:
            spec = replace(src, name=name)
            for rank, held in enumerate(of_trainers):
                if held is not None:
                    sources[rank][name] = replace(held, spec=spec, tied=tied)
            spec = replace(spec, dtype=dice.choice(["float32", "float16"]))
            layout = dealt(spec, servers, dice)
            for place, (replica, rank) in enumerate(members):
                if replica and not rank and not alike:
                    layout = dealt(spec, servers, dice)
                if layout[rank] is not None:
                    wants[first + place][name] = layout[rank]
    asked = {
        rank: Want(replica=replica, rank=place, facts=wants[rank])
        for rank, (replica, place) in zip(wants, members, strict=True)
    }
    hosts = {rank: dice.choice(["a", "b", ""]) for rank in {*sources, *wants}}
    return sources, asked, dice.choice([16, 48, 256, 1 << 20]), hosts


def replay(plan, sources, wants, bucket_bytes):
    """Run the plan with the numbers of elements as values; what each rank has got, by rank and tensor."""
    values, numbers = {}, count(1)
    for index, spec in enumerate(plan.specs):
        flat = [next(numbers) for _ in range(spec.elements)]
        values[index] = np.array(flat, dtype=np.int64).reshape(spec.shape)
    got = {
        (rank, index): np.zeros(spec.shape, dtype=np.int64)
        for rank in wants
        for index, spec in enumerate(plan.specs)
    }
    for turn, wave in enumerate(plan.waves):
        arrived = []
        for move in wave:
            end = 0
            for slot in move.slots:
                spec, box = plan.specs[slot.tensor], slot.box
                at = box.within(Box.whole(spec.shape))
                assert slot.offset % SLOT_ALIGN == 0
                assert slot.offset >= end
                end = slot.offset + box.volume * ITEMSIZE[spec.dtype]
                if move.passed:
                    data = got[move.src, slot.tensor][at]
                    assert data.all(), f"wave {turn}: passed on before it is there"
                else:
                    held = sources[move.src][spec.name].boxes
                    assert any(outer.intersect(box) == box for outer in held), "sent by a rank that has it"
                    data = values[slot.tensor][at]
                assert not got[move.dst, slot.tensor][at].any(), "each element once"
                arrived.append((move.dst, slot.tensor, at, data.copy()))
            assert end == move.nbytes
            assert len(move.slots) == 1 or move.src == move.dst or move.nbytes <= bucket_bytes
        for dst, tensor, at, data in arrived:
            got[dst, tensor][at] = data
    return values, got


@settings(max_examples=100, deadline=None)
@given(DRAWN)
def test_every_wanted_element_arrives_once(dice):
    check_job(draw_job(dice))


def test_every_wanted_element_arrives_once_in_many_layouts():
    for seed in range(LAYOUTS):
        try:
            check_job(draw_job(Random(seed)))  # noqa: S311 - to be drawn again
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


def check_job(job):
    sources, wants, bucket_bytes, hosts = job
    plan = plan_reshard(sources, wants, bucket_bytes=bucket_bytes, hosts=hosts)
    values, got = replay(plan, sources, wants, bucket_bytes)
    index = {spec.name: place for place, spec in enumerate(plan.specs)}
    needed = {}
    for rank, want in wants.items():
        masks = {}
        for name, holding in want.facts.items():
            place = plan.echoes.get(index[name], index[name])
            mask = masks.setdefault(place, np.zeros(plan.specs[place].shape, dtype=bool))
            for box in holding.boxes:
                mask[box.within(Box.whole(holding.spec.shape))] = True
        for place in range(len(plan.specs)):
            mask = masks.get(place, np.zeros(plan.specs[place].shape, dtype=bool))
            assert (got[rank, place] == np.where(mask, values[place], 0)).all(), (rank, plan.specs[place])
            if place not in plan.echoes:
                for held in (
                    sources.get(rank, {}).get(plan.specs[place].name, Holding(spec=None, boxes=())).boxes
                ):
                    mask = mask.copy()
                    mask[held.within(Box.whole(plan.specs[place].shape))] = False
                needed[place] = needed.get(place, np.zeros(mask.shape, dtype=bool)) | mask
    trainers_send = sum(
        slot.box.volume
        for wave in plan.waves
        for move in wave
        if move.src != move.dst and not move.passed
        for slot in move.slots
    )
    assert trainers_send == sum(int(mask.sum()) for mask in needed.values()), (
        "one model, for any number of replicas"
    )
    check_given(plan, sources, wants)


def check_given(plan, sources, wants):
    """What is digested of the source is every wanted element once, and leaves in the wave that is said."""
    seen = [np.zeros(spec.shape, dtype=int) for spec in plan.specs]
    leaves = {
        (move.src, slot.tensor, slot.box): turn
        for turn, wave in enumerate(plan.waves)
        for move in wave
        if not move.passed
        for slot in move.slots
    }
    for given_ in plan.given:
        seen[given_.tensor][given_.box.within(Box.whole(plan.specs[given_.tensor].shape))] += 1
        assert leaves[given_.src, given_.tensor, given_.box] == given_.wave
        name = plan.specs[given_.tensor].name
        for rank in given_.digesters:
            assert any(box.intersect(given_.box) == given_.box for box in sources[rank][name].boxes)
    for index, times in enumerate(seen):
        names = [plan.specs[i].name for i in (index, *(e for e, c in plan.echoes.items() if c == index))]
        mask = np.zeros(times.shape, dtype=int)
        for want in wants.values():
            for name in names if index not in plan.echoes else ():
                for box in want.facts[name].boxes if name in want.facts else ():
                    mask[box.within(Box.whole(times.shape))] = 1
        assert (times == mask).all()


@settings(max_examples=50, deadline=None)
@given(DRAWN)
def test_plans_are_alike_and_depend_on_buckets(dice):
    sources, wants, bucket_bytes, hosts = draw_job(dice)
    one = plan_reshard(sources, wants, bucket_bytes=bucket_bytes, hosts=hosts)
    assert one == plan_reshard(dict(sources), dict(wants), bucket_bytes=bucket_bytes, hosts=dict(hosts))
    moved = plan_reshard(sources, wants, bucket_bytes=2 * bucket_bytes, hosts=hosts)
    assert moved.fingerprint != one.fingerprint


@settings(max_examples=100, deadline=None)
@given(DRAWN)
def test_buckets_are_bounded_on_each_rank(dice):
    """Whatever needs a bucket, on the ranks that need one: together no more than a bucket in a wave."""
    sources, wants, bucket_bytes, hosts = draw_job(dice)
    sources = {r: {n: replace(h, in_place=False) for n, h in f.items()} for r, f in sources.items()}
    wants = {
        r: replace(w, facts={n: replace(h, in_place=False) for n, h in w.facts.items()})
        for r, w in wants.items()
    }
    plan = plan_reshard(sources, wants, bucket_bytes=bucket_bytes, hosts=hosts)
    for wave in plan.waves:
        rooms = {}
        for move in wave:
            for rank in {move.src, move.dst} if move.src != move.dst else ():
                rooms[rank] = rooms.get(rank, 0) + move.nbytes
        assert max(rooms.values(), default=0) <= bucket_bytes


def holding(shape, boxes, *, dtype="bfloat16", name="w", in_place=True):
    return {
        name: Holding(spec=Spec(name=name, dtype=dtype, shape=shape), boxes=tuple(boxes), in_place=in_place)
    }


def layers(names, box):
    return {name: held for name in names for held in holding(SHAPE, [box], name=name).values()}


SHAPE = (4096, 4096)


def rows(parts):
    return [Box((i * SHAPE[0] // parts, 0), (SHAPE[0] // parts, SHAPE[1])) for i in range(parts)]


def columns(parts):
    return [Box((0, i * SHAPE[1] // parts), (SHAPE[0], SHAPE[1] // parts)) for i in range(parts)]


def planned(sources, wants, **options):
    asked = {
        len(sources) + place: Want(replica=replica, rank=rank, facts=facts)
        for place, (replica, rank, facts) in enumerate(wants)
    }
    return plan_reshard(dict(enumerate(sources)), asked, **({"bucket_bytes": 64 << 20} | options))


NBYTES = 2 * SHAPE[0] * SHAPE[1]


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
def test_trainers_send_one_model_and_share_it_out(replicas):
    """FSDP over 4 to tensor-parallel 4: all links carry the same."""
    names = [f"w{i}" for i in range(8)]
    sources = [layers(names, box) for box in rows(4)]
    wants = [(r, k, layers(names, box)) for r in range(replicas) for k, box in enumerate(columns(4))]
    sent, received = planned(sources, wants).traffic()
    nbytes = NBYTES * len(names)
    assert [sent[rank] for rank in range(4)] == [nbytes // 4] * 4
    assert [received[4 + place] for place in range(4 * replicas)] == [nbytes // 4] * 4 * replicas
    passed = [sent[4 + place] for place in range(4 * replicas)]
    assert sum(passed) == (replicas - 1) * nbytes
    if replicas > 1:
        assert max(passed) <= 1.25 * min(passed)


def test_replicated_sources_send_alike_and_near_ones_first():
    sources = [holding(SHAPE, [Box.whole(SHAPE)]) for _ in range(4)]
    wants = [(0, rank, holding(SHAPE, [box])) for rank, box in enumerate(rows(4))]
    sent, _ = planned(sources, wants).traffic()
    assert dict(sent) == dict.fromkeys(range(4), NBYTES // 4)
    hosts = {0: "a", 1: "b", 2: "a", 3: "b"} | {4 + rank: "b" for rank in range(4)}
    sent, _ = planned(sources, wants, hosts=hosts).traffic()
    assert dict(sent) == {1: NBYTES // 2, 3: NBYTES // 2}


def test_what_stays_is_a_copy():
    sources = [holding(SHAPE, [box]) for box in rows(2)]
    asked = {r: Want(replica=0, rank=r, facts=holding(SHAPE, [box])) for r, box in enumerate(columns(2))}
    plan = plan_reshard(dict(enumerate(sources)), asked, bucket_bytes=64 << 20)
    sent, received = plan.traffic()
    assert dict(sent) == dict(received) == {0: NBYTES // 4, 1: NBYTES // 4}
    copied = sum(m.nbytes for wave in plan.waves for m in wave if m.src == m.dst)
    assert copied == NBYTES // 2


@pytest.mark.parametrize("kind", ["pipeline to tensor", "rows to pipeline"])
def test_all_links_are_busy_from_the_first_wave_to_the_last(kind):
    """Layers that lie on one rank each: no rank waits until another has sent, or got, all of its own."""
    names = [f"layer{i:02}" for i in range(16)]
    stages = [layers(names[4 * rank : 4 * rank + 4], Box.whole(SHAPE)) for rank in range(4)]
    slices = [layers(names, box) for box in rows(4)]
    sources, servers = (stages, slices) if kind == "pipeline to tensor" else (slices, stages)
    plan = planned(sources, [(0, rank, facts) for rank, facts in enumerate(servers)], bucket_bytes=8 << 20)
    assert len(plan.waves) > 4
    for wave in plan.waves:
        assert {move.src for move in wave} == {0, 1, 2, 3}
        assert {move.dst for move in wave} == {4, 5, 6, 7}


def test_large_boxes_in_place_and_small_ones_together():
    small = {k: v for i in range(9) for k, v in holding((33,), [Box.whole((33,))], name=f"s{i}").items()}
    facts = small | holding(SHAPE, [Box.whole(SHAPE)])
    (wave, *more) = planned([facts], [(0, 0, facts)]).waves
    moves = [move for one in (wave, *more) for move in one]
    assert [len(move.slots) for move in moves if len(move.slots) > 1] == [9]
    assert sum(move.nbytes for move in moves) <= 1.01 * (NBYTES + 9 * 66)


def test_a_plan_that_leaves_out_or_repeats_is_refused():
    sources = [holding(SHAPE, [box]) for box in rows(2)]
    want = Want(replica=0, rank=0, facts=holding(SHAPE, [Box.whole(SHAPE)]))
    plan = plan_reshard(dict(enumerate(sources)), {2: want}, bucket_bytes=8 << 20)
    for waves in (plan.waves[1:], (*plan.waves, plan.waves[0])):
        with pytest.raises(CoverageError, match=r"w: expected 16777216 wanted elements, .* to replica 0"):
            _prove(plan.specs, {}, {2: want}, waves)
    stray = tuple(tuple(replace(move, dst=7) for move in wave) for wave in plan.waves)
    with pytest.raises(CoverageError, match="w: moved to group rank 7"):
        _prove(plan.specs, {}, {}, stray)


def test_what_cannot_be_matched_is_named():
    half = [holding(SHAPE, rows(2)[:1])]
    with pytest.raises(CoverageError, match="w: expected boxes of 16777216 elements in all, got 8388608"):
        planned(half, [(0, 0, holding(SHAPE, [Box.whole(SHAPE)]))])
    whole = [holding(SHAPE, [Box.whole(SHAPE)])]
    with pytest.raises(SpecError, match="w: bfloat16 of the trainer can't be cast to int32"):
        planned(whole, [(0, 0, holding(SHAPE, [Box.whole(SHAPE)], dtype="int32"))])


@settings(max_examples=300, deadline=None)
@given(DRAWN)
def test_meets_is_all_pairs(dice):
    shape = tuple(dice.randint(0, 6) for _ in range(dice.randint(0, 4)))
    sides = [cut(Box.whole(shape), dice, 4) for _ in range(2)]
    if dice.random() < 0.5:
        sides[0] += cut(Box.whole(shape), dice, 2)
    expected = [
        (i, j, inner)
        for i, one in enumerate(sides[0])
        for j, other in enumerate(sides[1])
        if (inner := one.intersect(other)) is not None
    ]
    assert meets(*sides) == expected
    left = [Box.whole(shape)]
    for box in sides[1]:
        left = [rest for one in left for rest in less(one, box)]
    assert not sum(box.volume for box in left)
