"""Every kind of damage to live weights: named by tensor and rank, located, and told what it is; no more.

One pair of jobs serves a whole list of checks: 2 trainer ranks (FSDP2, float32), and 2 replicas of 2 server
ranks (bfloat16, tensor parallel, half of the tensors fused behind hooks).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine import SHAPES, Engine, drawn, name_map, nested
from models import fill, join_world
from processes import Job, run_jobs
from seeded import seeded
from torch.distributed.fsdp import fully_shard

import weightbus

PLACES = [(replica, rank) for replica in (0, 1) for rank in (0, 1)]


def rank_name(replica, rank):
    return f"replica {replica} server rank {rank}"


def trainer(rank, size, *, address, checks, moved=()):
    """Two versions, then ``checks`` checks; the source moves on before those in ``moved``, else it is back."""
    mesh = join_world(rank, size, "cpu")
    model = nested(drawn(1))
    fully_shard(model, mesh=mesh)
    words, verdicts = [], []
    with weightbus.Publisher(
        model, address=address, min_replicas=2, bucket_bytes=1 << 15, join_timeout_s=60
    ) as publisher:
        for version in (1, 2):
            fill(model, drawn(version))
            words.append(publisher.update(version).word)
        for check in range(checks):
            if moved:
                fill(model, drawn(3 if check in moved else 2))
            verdict = publisher.check()
            verdicts.append((verdict.word, verdict.mismatches, str(verdict), verdict.seconds))
    return words, verdicts


def server(rank, size, *, address, replica, damages, seed=0):
    """For each check, a damage to live weights that is undone after it: what was changed, by wire name."""
    model = Engine(rank, size, join_world(rank, size, "cpu"))
    earlier = {}
    changed = []

    def committed(version):
        if version == 1:
            earlier.update({name: model.at(name)[0].clone() for name in SHAPES})

    with weightbus.Subscriber(
        model, address=address, replica=replica, name_map=name_map, on_commit=committed
    ) as subscriber:
        for _ in range(2):
            while not subscriber.poll(0.5):
                pass
        kept = {name: model.at(name)[0].clone() for name in SHAPES}
        for check in range(damages if isinstance(damages, int) else len(damages)):
            if isinstance(damages, int):
                at_random(model, seeded(f"{seed} {check}"), replica)
            elif (replica, rank) in damages[check][1]:
                damages[check][0](model, earlier)
            found = {}
            for name, before in kept.items():
                live, offsets = model.at(name)
                differs = live.view(torch.int16) != before.view(torch.int16)
                if differs.any():
                    spots = differs.nonzero()
                    low, high = spots.amin(0).tolist(), spots.amax(0).tolist()
                    found[name] = (
                        tuple(o + n for o, n in zip(offsets, low, strict=True)),
                        tuple(b - a + 1 for a, b in zip(low, high, strict=True)),
                    )
            changed.append(found)
            while not subscriber.poll(0.5):
                pass
            for name, before in kept.items():
                model.at(name)[0].copy_(before)
        subscriber.serve()
    return changed


def run(address, damages, moved=(), seed=0):
    checks = damages if isinstance(damages, int) else len(damages)
    arguments = {"address": address, "damages": damages, "seed": seed}
    trainers, *servers = run_jobs(
        Job(run=trainer, size=2, arguments={"address": address, "checks": checks, "moved": moved}),
        *(Job(run=server, size=2, arguments={**arguments, "replica": replica}) for replica in (0, 1)),
        timeout_s=110,
    )
    assert [words for words, _ in trainers] == [["verified", "verified"]] * 2
    for one, other in zip(trainers[0][1], trainers[1][1], strict=True):
        assert one[:2] == other[:2], "all trainer ranks are told the same"
    for check, (word, mismatches, text, _) in enumerate(trainers[0][1]):
        changed = {
            (name, rank_name(*place)): box
            for place in PLACES
            for name, box in servers[place[0]][place[1]][check].items()
        }
        assert {(m.tensor, m.rank) for m in mismatches} == changed.keys(), (check, text)
        assert len(mismatches) == len(changed)
        assert word == ("mismatch" if changed else "verified")
        yield mismatches, changed, text


def at_random(model, rng, replica):
    """The same draws on all ranks; one or two ranks change bytes of one or two tensors. One in ten: nobody."""
    places = rng.sample(PLACES, rng.choice([1, 1, 2])) if rng.random() < 0.9 else []
    for name in rng.sample(list(SHAPES), rng.choice([1, 1, 2])):
        kind, bit, numbers = (
            rng.choice(["flip", "rows", "rectangle", "swap", "nan"]),
            rng.randrange(16),
            rng.random(),
        )
        if (replica, model.rank) in places:
            live, _ = model.at(name)
            one = seeded(f"{numbers} {model.rank}")
            low = [one.randrange(n) for n in live.shape]
            size = [one.randint(1, n - a) for n, a in zip(live.shape, low, strict=True)]
            where = tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))
            if kind == "flip":
                live.view(torch.int16)[tuple(low)] ^= (1 << bit) - (1 << 16) * (bit == 15)
            elif kind == "rows":
                live[where[0]] *= 1.5
            elif kind == "rectangle":
                live[where] = 0.0
            elif kind == "swap":
                live[[low[0], -1]] = live[[-1, low[0]]].clone()
            else:
                live[tuple(low)] = torch.nan


@pytest.mark.slow
def test_random_damages(address):
    """None missed, none false, and the box is the one around all that changed."""
    damaged = 0
    for mismatches, changed, text in run(address, 200, seed=1):
        damaged += len(changed)
        for m in mismatches:
            assert (m.box.offsets, m.box.sizes) == changed[m.tensor, m.rank], text
            assert m.kind in ("element", "block", "scattered", "zeros"), text
    assert damaged > 200


# -- kinds of damage -------------------------------------------------------------------------------

A, B = (0, 1), (1, 1)
Q, UP, GATE, K, DOWN = "layers.0.q", "layers.0.up", "layers.0.gate", "layers.1.k", "layers.0.down"


def element(model, earlier):
    model.at(Q)[0].view(torch.int16)[5, 7] ^= 1 << 3


def block(model, earlier):
    model.at(DOWN)[0][3:20, 10:40] = -1.0


def scattered(model, earlier):
    live = model.at(UP)[0]
    live[2, 60], live[40, 3] = 9.0, 9.0


def zeros(model, earlier):
    model.at(K)[0].zero_()


def zero_block(model, earlier):
    model.at(K)[0][2:4, 1:60].zero_()


def stale(model, earlier):
    for name in (GATE, "layers.1.norm"):
        model.at(name)[0].copy_(earlier[name])


def swapped(model, earlier):
    gate, up = model.at(GATE)[0], model.at(UP)[0]
    kept = gate.clone()
    gate.copy_(up)
    up.copy_(kept)


def other_shard(model, earlier):
    other = 1 - model.rank
    for name, axis in ((Q, 0), ("layers.1.o", 1)):
        model.at(name)[0].copy_(drawn(2)[name].to(torch.bfloat16).chunk(2, axis)[other])


KINDS: list[tuple[Callable, list[tuple[int, int]], dict[str, tuple[str, str]]]] = [
    (element, [A], {Q: ("element", "row 37, column 7 of [64, 64]")}),
    (block, [A], {DOWN: ("block", "rows 3:20, columns 58:88 of [64, 96]")}),
    (
        scattered,
        [A, B],
        {
            UP: (
                "scattered",
                "rows 50:89, columns 3:61 of [96, 64]: 2 of its 195 parts differ, nothing else does",
            )
        },
    ),
    (zeros, [B], {K: ("zeros", "all of its shard, rows 16:32, columns 0:64 of [32, 64]")}),
    (
        zero_block,
        [B],
        {K: ("zeros", "rows 18:20, columns 1:60 of [32, 64]: its digest there is zero; 118 of its 118")},
    ),
    (stale, [A], {GATE: ("stale", "all of its shard"), "layers.1.norm": ("stale", "all of its shard")}),
    (swapped, [B], {GATE: ("swapped", "all of its shard"), UP: ("swapped", "all of its shard")}),
    (other_shard, [A], {Q: ("other shard", "all of"), "layers.1.o": ("other shard", "all of")}),
]
NOTES = {
    "stale": ["under the seed of version 1 its digest is that version's", f"{rank_name(1, 1)} has the right"],
    "swapped": ["its digest is the one expected of layers.0.", f"{rank_name(0, 1)} has the right bytes"],
    "other shard": [f"taken for the shard of {rank_name(0, 0)}, its digest is that shard's"],
    "scattered": ["has the same wrong ones"],
}


def judge(found, kinds):
    """Tensors, ranks, kinds and places are as they should be; how many mismatches in each check."""
    counts = []
    for (mismatches, changed, text), (damage, places, wanted) in zip(found, kinds, strict=True):
        assert {m.tensor for m in mismatches} == wanted.keys(), text
        assert {m.rank for m in mismatches} == {rank_name(*place) for place in places}
        for m in mismatches:
            kind, where = wanted[m.tensor]
            assert m.kind == kind, text
            assert where in m.where, text
            if kind:
                assert (m.box.offsets, m.box.sizes) == changed[m.tensor, m.rank], text
            for note in NOTES.get(damage.__name__, ()):
                assert note in m.reason, text
        counts.append(len(mismatches))
    return counts


def test_each_kind_is_told(address):
    found = run(address, [(damage, places) for damage, places, _ in KINDS])
    assert judge(found, KINDS) == [1, 1, 2, 1, 1, 2, 2, 2]


def test_a_source_that_has_moved_on(address):
    """Kinds by kept sums stay known; a replica that is right shows where; without one, it is said so."""
    lost = {Q: ("", "not narrowed: the source has moved on, and no replica has the right bytes")}
    kinds = [
        (stale, [A], KINDS[5][2]),
        (element, [A], KINDS[0][2]),
        (element, [A, B], lost),
        (element, [A, B], KINDS[0][2]),
    ]
    found = run(address, [(damage, places) for damage, places, _ in kinds], moved=(0, 1, 2))
    assert judge(found, kinds) == [2, 1, 2, 2]
