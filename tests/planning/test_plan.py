"""Plans by brute force: replayed on arrays, every element arrives exactly once, where it was wanted."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightbus.errors import CoverageError, SpecError
from weightbus.planning.box import Box
from weightbus.planning.facts import Holding, decode_facts, encode_facts, facts_id
from weightbus.planning.plan import SLOT_ALIGN, Want, plan_broadcast
from weightbus.planning.spec import ITEMSIZE, Spec


def cut(box: Box, draw, depth: int = 3) -> list[Box]:
    """A random partition of a box."""
    axes = [axis for axis, size in enumerate(box.sizes) if size > 1]
    if not axes or not depth or draw(st.booleans()):
        return [box]
    axis = draw(st.sampled_from(axes))
    at = draw(st.integers(1, box.sizes[axis] - 1))
    low = Box(box.offsets, (*box.sizes[:axis], at, *box.sizes[axis + 1 :]))
    offsets = (*box.offsets[:axis], box.offsets[axis] + at, *box.offsets[axis + 1 :])
    high = Box(offsets, (*box.sizes[:axis], box.sizes[axis] - at, *box.sizes[axis + 1 :]))
    return cut(low, draw, depth - 1) + cut(high, draw, depth - 1)


def deal(spec: Spec, ranks: int, draw) -> list[dict[str, Holding]]:
    """The boxes of a random partition, dealt to ranks, some of them to several."""
    held: list[list[Box]] = [[] for _ in range(ranks)]
    for box in cut(Box.whole(spec.shape), draw):
        if box.volume:
            for rank in draw(st.sets(st.integers(0, ranks - 1), min_size=1)):
                held[rank].append(box)
    return [{spec.name: Holding(spec=spec, boxes=tuple(boxes))} for boxes in held]


@st.composite
def jobs(draw):
    trainers, replicas, servers = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    sources = {rank: {} for rank in range(trainers)}
    wants = {(replica, rank): {} for replica in range(replicas) for rank in range(servers)}
    for i in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        src = Spec(name=f"t{i}", dtype=draw(st.sampled_from(["float32", "bfloat16"])), shape=shape)
        dst = Spec(name=src.name, dtype=draw(st.sampled_from(["float32", "float16"])), shape=shape)
        for rank, facts in enumerate(deal(src, trainers, draw)):
            sources[rank] |= facts
        for replica in range(replicas):
            for rank, facts in enumerate(deal(dst, servers, draw)):
                wants[replica, rank] |= facts
    bucket_bytes = draw(st.sampled_from([16, 48, 256, 1 << 20]))
    return sources, wants, bucket_bytes


@settings(max_examples=300, deadline=None)
@given(jobs())
def test_every_element_travels_exactly_once(job):
    sources, wants, bucket_bytes = job
    plan = plan_broadcast(
        sources,
        [Want(replica=replica, rank=rank, facts=facts) for (replica, rank), facts in wants.items()],
        bucket_bytes=bucket_bytes,
    )
    sent = [np.zeros(spec.shape, dtype=int) for spec in plan.specs]
    for transfer in plan.transfers:
        assert 0 < transfer.nbytes <= max(bucket_bytes, SLOT_ALIGN)
        end = 0
        for slot in transfer.slots:
            spec = plan.specs[slot.tensor]
            assert slot.offset % SLOT_ALIGN == 0
            assert slot.offset >= end
            end = slot.offset + slot.box.volume * ITEMSIZE[spec.dtype]
            held = sources[transfer.src][spec.name].boxes
            assert any(box.intersect(slot.box) == slot.box for box in held), "sent by a rank that has it"
            sent[slot.tensor][slot.box.within(Box.whole(spec.shape))] += 1
        assert end == transfer.nbytes  # as long as what lies in place on another rank
    for spec, times in zip(plan.specs, sent, strict=True):
        assert (times == 1).all(), spec
    assert [spec.name for spec in plan.specs] == sorted(sources[0])
    assert {spec.dtype for spec in plan.specs} <= {"float32", "float16"}


@settings(max_examples=50, deadline=None)
@given(jobs())
def test_plans_are_alike_and_facts_survive_the_wire(job):
    sources, wants, bucket_bytes = job
    told = {rank: decode_facts(encode_facts(facts), "a test") for rank, facts in sources.items()}
    assert told == sources
    assert facts_id(encode_facts(told[0])) == facts_id(encode_facts(sources[0]))
    asked = [Want(replica=r, rank=k, facts=facts) for (r, k), facts in wants.items()]
    one = plan_broadcast(sources, asked, bucket_bytes=bucket_bytes)
    other = plan_broadcast(told, asked, bucket_bytes=bucket_bytes)
    assert one == other
    moved = plan_broadcast(told, asked, bucket_bytes=2 * bucket_bytes)
    assert moved.fingerprint != one.fingerprint


def holding(name="w", dtype="float32", shape=(4, 6), boxes=None):
    spec = Spec(name=name, dtype=dtype, shape=shape)
    return {name: Holding(spec=spec, boxes=tuple(boxes or [Box.whole(shape)]))}


ROWS = [Box((0, 0), (2, 6)), Box((2, 0), (2, 6))]


@pytest.mark.parametrize(
    ("sources", "wants", "error", "reason"),
    [
        (
            [holding(boxes=ROWS[:1])],
            [holding()],
            CoverageError,
            "w: expected boxes of 24 elements in all, got 12",
        ),
        (
            [holding(boxes=[ROWS[0], Box((1, 0), (2, 6))])],
            [holding()],
            CoverageError,
            "w: boxes [0:2, 0:6] and [1:3, 0:6] both hold [1:2, 0:6]",
        ),
        ([holding(), holding(dtype="float16")], [holding()], SpecError, "got w float16[4, 6] on group rank 1"),
        (
            [holding()],
            [holding(), holding(dtype="float16")],
            SpecError,
            "expected one dtype on all server ranks",
        ),
        ([holding()], [holding(dtype="int32")], SpecError, "w: float32 of the trainer can't be cast to int32"),
        ([holding()], [holding(shape=(6, 4))], SpecError, "w: expected shape [4, 6], got [6, 4]; replica 0"),
        ([holding()], [holding(boxes=ROWS[:1])], CoverageError, "boxes of replica 0's server ranks"),
        ([holding()], [holding() | holding("x")], SpecError, "x: wanted by replica 0 server rank 0"),
        ([holding() | holding("x")], [holding()], SpecError, "x: unknown name"),
    ],
    ids=["gap", "overlap", "sources", "dtypes", "cast", "shape", "half", "extra", "unknown"],
)
def test_what_cannot_be_planned_is_named(sources, wants, error, reason):
    asked = [Want(replica=0, rank=rank, facts=facts) for rank, facts in enumerate(wants)]
    with pytest.raises(error) as caught:
        plan_broadcast(dict(enumerate(sources)), asked, bucket_bytes=1 << 20)
    assert reason in str(caught.value)


def test_replicated_boxes_are_shared_out():
    """Two trainer ranks with the whole model each send half of it."""
    names = [f"t{i}" for i in range(8)]
    facts = {name: held for name in names for held in holding(name, shape=(64,)).values()}
    plan = plan_broadcast({0: facts, 1: facts}, [Want(replica=0, rank=0, facts=facts)], bucket_bytes=1 << 20)
    assert {transfer.src: transfer.nbytes for transfer in plan.transfers} == {0: 1024, 1: 1024}


MIB = 1 << 20


def waves_of(wants, *, dtype="bfloat16", in_place=True, sources=1, count=40, bucket_bytes=16 * MIB):
    """Wave lengths of tensors of 8 MiB, each sent whole by one of the trainer ranks."""
    shape = (2048, 2048)
    specs = {f"t{i}": Spec(name=f"t{i}", dtype=dtype, shape=shape) for i in range(count)}
    held = [
        {
            name: Holding(
                spec=spec, boxes=(Box.whole(shape),) if i % sources == rank else (), in_place=in_place
            )
            for i, (name, spec) in enumerate(specs.items())
        }
        for rank in range(sources)
    ]
    asked = [
        Want(
            replica=0,
            rank=rank,
            facts={
                name: Holding(
                    spec=Spec(name=name, dtype="bfloat16", shape=shape), boxes=(box,), in_place=in_place
                )
                for name in specs
            },
        )
        for rank, box in enumerate(wants)
    ]
    plan = plan_broadcast(dict(enumerate(held)), asked, bucket_bytes=bucket_bytes)
    assert sum(t.nbytes for t in plan.transfers) == count * 8 * MIB
    return [sum(t.nbytes for t in wave) for wave in plan.waves]


WHOLE = (Box.whole((2048, 2048)),)
ROW_HALVES = [Box((0, 0), (1024, 2048)), Box((1024, 0), (1024, 2048))]
COLUMN_HALVES = [Box((0, 0), (2048, 1024)), Box((0, 1024), (2048, 1024))]


def test_waves_are_long_where_no_rank_needs_a_bucket():
    waves = waves_of(WHOLE)
    assert max(waves) > 64 * MIB
    assert waves[0] <= 16 * MIB  # the link starts soon
    assert waves[-1] <= max(waves) / 2  # and what comes last is soon installed


@pytest.mark.parametrize(
    "job",
    [
        {"wants": COLUMN_HALVES},
        {"wants": ROW_HALVES},
        {"wants": WHOLE, "dtype": "float32"},
        {"wants": WHOLE, "in_place": False},
        {"wants": WHOLE, "sources": 2},
    ],
    ids=["columns", "rows of others", "casts", "strided", "two senders"],
)
def test_waves_are_no_longer_than_a_bucket_elsewhere(job):
    waves = waves_of(**job)
    assert max(waves) <= 16 * MIB
    assert min(waves[2:-1]) >= 1 * MIB


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([["w", "int3", [4], [], True, ""]], "w: unknown dtype 'int3' in the facts of a test"),
        ([["w", "int8", [4], [[[0], [5]]], True, ""]], r"w: box \[0:5\] lies outside \[4\]; facts of a test"),
        (
            [["w", "int8", [4], [[[0], []]], True, ""]],
            r"w: expected an offset for each size, got \(0,\) and \(\)",
        ),
        ([["w", "int8", [4], [], True, ""]] * 2, "w: named twice in the facts of a test"),
        ([["w"]], "facts of a test: .* at `"),
        ([[b"\xff", "int8", [4], [], True, ""]], "facts of a test: "),
    ],
)
def test_facts_that_make_no_sense_are_refused(rows, expected):
    with pytest.raises(SpecError, match=expected):
        decode_facts(msgspec.msgpack.encode(rows), "a test")


def test_text_that_is_no_utf8_is_refused():
    blob = encode_facts(holding("name"))
    for bad in (blob.replace(b"name", b"\xff" * 4), blob[:-1]):
        with pytest.raises(SpecError, match="facts of a test: "):
            decode_facts(bad, "a test")
