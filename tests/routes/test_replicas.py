"""Sources that several trainer ranks hold: whoever differs is found, by as few digests as that takes.

An update without processes: real plans, ledgers and the hub's comparison, on layouts, routes and flipped bits
that are drawn. Server ranks copy from where the plan says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightbus.control import messages as m
from weightbus.digest.ledger import Entry, Ledger
from weightbus.hub.compare import compare_folds, compare_held, name_held
from weightbus.hub.diagnosis import Inquiry
from weightbus.memory.shard import Part
from weightbus.planning.box import Box
from weightbus.planning.facts import Holding
from weightbus.planning.holders import digesters, holders_of, replicated
from weightbus.planning.peer_plan import plan_peer
from weightbus.planning.plan import Want, plan_broadcast
from weightbus.planning.reshard_plan import plan_reshard
from weightbus.planning.spec import Spec
from weightbus.routes.compiled import Survey, _copied, _given, _Held, _sent
from weightbus.session.evidence import held_folds, held_sums
from weightbus.tensors.bucket import Staging, compile_waves, torch_dtype
from weightbus.tensors.moves import compile_moves

SEED = bytes(range(32))
SHAPES = {"v": (11,), "w": (7, 5)}


def bands(shape, axis, cuts):
    """A tensor cut along an axis."""
    edges = [0, *sorted({cut % shape[axis] for cut in cuts} - {0}), shape[axis]]
    return [
        Box(
            tuple(low if i == axis else 0 for i in range(len(shape))),
            tuple(high - low if i == axis else n for i, n in enumerate(shape)),
        )
        for low, high in pairwise(edges)
    ]


def holding(name, boxes, dtype="float32"):
    return Holding(spec=Spec(name=name, dtype=dtype, shape=SHAPES[name]), boxes=tuple(boxes))


@dataclass
class World:
    """held, wanted: for each group rank, its boxes by name; a trainer rank may be a server rank too.

    wire: the servers' dtype.
    """

    route: str
    held: dict[int, dict[str, list[Box]]]
    wanted: dict[int, dict[str, list[Box]]]
    replica: dict[int, int]
    wire: str = "float32"
    tensors: dict[tuple[int, str, Box], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.sources = {
            rank: {name: holding(name, boxes) for name, boxes in held.items() if boxes}
            for rank, held in self.held.items()
        }
        self.wants = {
            rank: Want(
                replica=self.replica[rank],
                rank=rank,
                facts={name: holding(name, boxes, self.wire) for name, boxes in wanted.items() if boxes},
            )
            for rank, wanted in self.wanted.items()
        }
        distinct = list({repr(want.facts): want.facts for want in self.wants.values()}.values())
        self.groups = dict(enumerate(distinct))
        self.group = {rank: distinct.index(want.facts) for rank, want in self.wants.items()}
        self.members = {
            f"m{rank}": m.Member(
                peer=f"m{rank}",
                trainer=rank if rank in self.held else None,
                server=m.ServerId(replica=self.replica[rank], rank=rank) if rank in self.wants else None,
            )
            for rank in sorted({*self.held, *self.wants})
        }
        torch.manual_seed(0)
        whole = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        for rank, held in self.held.items():
            for name, boxes in held.items():
                for box in boxes:
                    inner = box.within(Box.whole(SHAPES[name]))
                    self.tensors[rank, name, box] = whole[name][inner].clone()
        self.staging = Staging(torch.device("cpu"), 2)
        if self.route == "peer":
            self.plan = plan_peer(self.sources, self.wants)
        elif self.route == "reshard":
            self.plan = plan_reshard(self.sources, self.wants, bucket_bytes=64)
        else:
            self.plan = plan_broadcast(self.sources, list(self.wants.values()), bucket_bytes=64)
        self.digests = {rank: self._digests(rank) for rank in self.held}

    def parts(self, rank):
        found = {name: [] for name in SHAPES}
        for (owner, name, box), tensor in self.tensors.items():
            if owner == rank:
                spec = Spec(name=name, dtype="float32", shape=SHAPES[name])
                found[name].append(Part(spec=spec, box=box, tensor=tensor))
        return {name: tuple(parts) for name, parts in found.items() if parts}

    def _digests(self, rank):
        """A trainer rank's ledger, what it holds with others, and its buckets' copies."""
        own = self.parts(rank)
        survey = Survey(
            rank=rank,
            sources=self.sources,
            exports={},
            wants=self.wants,
            reaches={},
            groups=self.groups,
            group=0,
        )
        held = _Held(own, survey, replicated(self.sources))
        if self.route == "peer":
            _copied(self.plan, held)
            return Ledger(held.entries, self.groups, {}), held.shared, []
        staging = Staging(torch.device("cpu"), len(self.plan.waves))  # so that all buckets can be filled first
        if self.route == "reshard":
            compiled = compile_moves(self.sent_by(rank), rank, source=own, target=None, staging=staging)
            _given(self.plan, compiled, held)
        else:
            compiled = compile_waves(self.plan, rank, source=own, target=None, staging=staging)
            _sent(self.plan, compiled, held)
        return Ledger(held.entries, self.groups, {}), held.shared, compiled.waves

    def sent_by(self, rank):
        """The plan, of what leaves a trainer rank's source."""
        waves = tuple(
            tuple(move for move in wave if move.src == rank and not move.passed) for wave in self.plan.waves
        )
        return replace(self.plan, waves=waves)

    def pieces(self, rank):
        """From which rank a server rank takes which boxes of which tensors."""
        if self.route == "peer":
            found = [
                (piece.src, self.plan.specs[piece.tensor].name, piece.box) for piece in self.plan.copies[rank]
            ]
        elif self.route == "reshard":
            # Wherever it came by, it left the source of the rank that gave it, or of this rank itself.
            giver = {(given.tensor, given.box): given.src for given in self.plan.given}
            found = [
                (
                    rank if move.src == rank else giver[slot.tensor, slot.box],
                    self.plan.specs[slot.tensor].name,
                    slot.box,
                )
                for wave in self.plan.waves
                for move in wave
                if move.dst == rank
                for slot in move.slots
            ]
        else:
            found = [
                (transfer.src, self.plan.specs[slot.tensor].name, slot.box)
                for transfer in self.plan.transfers
                for slot in transfer.slots
            ]
        return found

    def live(self, rank):
        """What a server rank holds after the update, as entries of its ledger."""
        entries = []
        for name, want in self.wants[rank].facts.items():
            for box in want.boxes:
                tensor = torch.zeros(box.sizes, dtype=torch_dtype(self.wire))
                for src, of, piece in self.pieces(rank):
                    if of != name or (inner := piece.intersect(box)) is None:
                        continue
                    held, part = next(
                        (held, tensor)
                        for (owner, n, held), tensor in self.tensors.items()
                        if (owner, n) == (src, name) and held.intersect(inner) == inner
                    )
                    tensor[inner.within(box)] = part[inner.within(held)].to(tensor.dtype)
                part = Part(spec=want.spec, box=box, tensor=tensor)
                entries.append(Entry(part=part, stage=0, groups=(self.group[rank],)))
        return entries

    def judge(self, between=lambda: None):
        """What the hub compares in one update. between: called after digests and before bytes move."""
        ledgers = {}
        for rank, (ledger, _, waves) in self.digests.items():
            for wave in waves:
                wave.pack.run()
            ledger.digest_live(SEED)
            ledgers[rank] = ledger
        between()
        sets = replicated(self.sources).sets
        live = {rank: Ledger(self.live(rank), self.groups, {}) for rank in self.wants}
        self.dones = {}
        for peer, rank in ((peer, int(peer[1:])) for peer in self.members):
            done = m.Done(peer=peer)
            if ledger := ledgers.get(rank):
                done.sent = [self._fold(ledger, group) for group in ledger.groups]
                done.held = held_folds(ledger, ledger.sums, SEED, sets)
            if ledger := live.get(rank):
                ledger.digest_live(SEED)
                done.live = [self._fold(ledger, self.group[rank])]
            self.dones[peer] = done
        wrong, complaints = compare_folds(self.members, self.dones, 1)
        differ, more = compare_held(self.members, {peer: done.held for peer, done in self.dones.items()})
        assert not complaints
        assert not more
        answers = {}
        for peer, rank in ((peer, int(peer[1:])) for peer in self.members):
            sums = m.Sums(peer=peer)
            for found, ledger in ((sums.sent, ledgers.get(rank)), (sums.live, live.get(rank))):
                for _, group in wrong if ledger else ():
                    if ledger is not live.get(rank) or group == self.group[rank]:
                        tensors = ledger.by_tensor(ledger.sums, group)
                        found.append(m.TensorSums(job=0, group=group, sums=tensors))
            if rank in self.held:
                ledger = Ledger(self.digests[rank][1], self.groups, {})
                ledger.digest_live(SEED)
                sums.held = held_sums(ledger, {group for _, group in wrong}, differ)
            answers[peer] = sums
        return wrong, differ, answers

    def _fold(self, ledger, group):
        sums, nbytes = ledger.fold(ledger.sums, SEED, group)
        return m.Fold(job=0, group=group, sums=sums, nbytes=nbytes, due=ledger.due(group))

    def named(self, judged):
        """What a person is told: lines that name the tensor and a rank."""
        wrong, differ, answers = judged
        inquiry = Inquiry(self.members, self.dones)
        inquiry.named(answers)
        return inquiry.failures() if wrong or differ else []

    def read_bytes(self):
        """What each trainer rank digests in an update."""
        return {rank: sum(ledger._nbytes) for rank, (ledger, _, _) in self.digests.items()}

    def flip(self, rank, name, box, element, bit=0):
        self.tensors[rank, name, box].view(-1).view(torch.uint8)[4 * element + bit // 8] ^= 1 << bit % 8


@st.composite
def worlds(draw, route=("peer", "broadcast", "reshard"), wire=("float32",)):
    trainers = draw(st.integers(1, 4))
    held = {rank: {name: [] for name in SHAPES} for rank in range(trainers)}
    for name, shape in SHAPES.items():
        axis = draw(st.integers(0, len(shape) - 1))
        for box in bands(shape, axis, draw(st.lists(st.integers(1, 10), max_size=2))):
            for rank in draw(st.sets(st.integers(0, trainers - 1), min_size=1)):
                held[rank][name].append(box)
    first = draw(st.integers(0, trainers))  # below the last trainer rank, processes are both
    wanted, replica = {}, {}
    for one in range(draw(st.integers(1, 3))):
        ranks = draw(st.integers(1, 2))
        for _ in range(ranks):
            rank = first + len(wanted)
            wanted[rank], replica[rank] = {}, one
        for name, shape in SHAPES.items():
            cuts = [shape[0] // 2 + draw(st.integers(0, 1))] if ranks == 2 and draw(st.booleans()) else []
            boxes = bands(shape, 0, cuts)
            for i in range(ranks):
                wanted[first + len(wanted) - ranks + i][name] = [boxes[i % len(boxes)]]
    chosen = draw(st.sampled_from(wire))
    return World(
        route=draw(st.sampled_from(route if chosen == "float32" else ("broadcast", "reshard"))),
        held={rank: {n: b for n, b in names.items() if b} for rank, names in held.items()},
        wanted=wanted,
        replica=replica,
        wire=chosen,
    )


def draw_flip(data, world):
    """A holder, a box that it holds, and an element of it; and who holds that box."""
    rank, name, box = data.draw(st.sampled_from(sorted(world.tensors, key=repr)))
    element = data.draw(st.integers(0, box.volume - 1))
    return rank, name, box, element, holders_of(name, world.sources)[box]


@settings(max_examples=150, deadline=None)
@given(worlds(wire=("float32", "bfloat16")), st.data())
def test_one_bit_on_any_holder_is_found_and_names_both_ranks(world, data):
    assert world.named(world.judge()) == []
    rank, name, box, element, holders = draw_flip(data, world)
    bit = data.draw(st.integers(0, 31))
    world.flip(rank, name, box, element, bit)
    told = world.named(world.judge())
    if len(holders) == 1:
        assert told == [], "it is the version"
        return
    held = [failure for failure in told if failure.kind == "replicas differ"]
    assert {failure.tensor for failure in told} == {name}
    (failure,) = held
    if len(holders) > 2:
        assert failure.rank == str(world.members[f"m{rank}"]), "the one against the others"
    else:
        assert {r for r in holders if f"trainer rank {r}" in failure.rank + failure.reason} == set(holders)
    if world.route == "reshard" and world.wire != "float32":
        return  # ranks that are both ends each cast their own, which is not compared with what servers hold
    for failure in told[len(held) :]:
        assert "has the same bytes" in failure.reason, "a server rank's are a trainer rank's"
    world.flip(rank, name, box, element, bit)
    assert world.named(world.judge()) == []


@settings(max_examples=100, deadline=None)
@given(worlds(), st.data())
def test_what_is_sent_after_it_has_drifted_is_found(world, data):
    """After digests and before bytes move: on servers, whoever it came from."""
    rank, name, box, element, _ = draw_flip(data, world)
    taken = [
        server
        for server in world.wants
        for src, of, piece in world.pieces(server)
        if (src, of) == (rank, name)
        and piece.intersect(one(box, element))
        and wants(world, server, name, box, element)
    ]
    judged = world.judge(between=lambda: world.flip(rank, name, box, element))
    assert bool(judged[0]) == bool(taken)
    assert not judged[1]


def one(box, element):
    """The box of one element of it."""
    place = []
    for n in reversed(box.sizes):
        element, at = divmod(element, n)
        place.append(at)
    offsets = tuple(o + at for o, at in zip(box.offsets, reversed(place), strict=True))
    return Box(offsets, (1,) * len(offsets))


def wants(world, server, name, box, element):
    facts = world.wants[server].facts
    return name in facts and any(wanted.intersect(one(box, element)) for wanted in facts[name].boxes)


@settings(max_examples=100, deadline=None)
@given(worlds())
def test_no_more_is_digested_than_proves_it(world):
    """Nobody digests a byte that is alone to be digested by another; all of it is answered for once."""
    due = [sum(held.nbytes for held in facts.values()) for facts in world.groups.values()]
    answered = [
        sum(ledger.fold(ledger.sums, SEED, g)[1] for ledger, _, _ in world.digests.values())
        for g in world.groups
    ]
    assert answered == due
    if all(len(ranks) <= 2 for name in SHAPES for ranks in holders_of(name, world.sources).values()):
        assert sum(world.read_bytes().values()) <= sum(due), "as if each byte had one holder"


@pytest.mark.parametrize("route", ["peer", "broadcast", "reshard"])
def test_two_holders_each_digest_what_the_other_sends(route):
    halves = {name: bands(shape, 0, [shape[0] // 2]) for name, shape in SHAPES.items()}
    whole = {name: [Box.whole(shape)] for name, shape in SHAPES.items()}
    world = World(
        route=route,
        held={0: whole, 1: whole},
        wanted={2 + i: {name: [boxes[i]] for name, boxes in halves.items()} for i in range(2)},
        replica={2: 0, 3: 0},
    )
    sent = {0: 0, 1: 0}
    if route != "broadcast":
        for server in world.wants:
            for src, _, box in world.pieces(server):
                sent[src] += 4 * box.volume
    else:
        for src, _, box in world.pieces(2):
            sent[src] += 4 * box.volume
    assert world.read_bytes() == {0: sent[1], 1: sent[0]}
    assert sum(sent.values()) == 4 * sum(map(math.prod, SHAPES.values()))


def test_what_all_holders_send_is_digested_by_each_in_turn():
    whole = {name: [Box.whole(shape)] for name, shape in SHAPES.items()}
    world = World(route="peer", held={0: whole, 1: whole}, wanted={2: whole, 3: whole}, replica={2: 0, 3: 1})
    assert {src for server in world.wants for src, _, _ in world.pieces(server)} == {0, 1}
    assert sorted(world.read_bytes().values()) == [4 * math.prod(shape) for shape in SHAPES.values()]


def test_who_digests():
    read = {0: 5, 1: 3, 2: 3}
    assert digesters([1], {1}, read) == (1,)
    assert digesters([0, 1], {0}, read) == (1,)
    assert digesters([0, 1], {0, 1}, read) == (1,), "the one that has read less"
    assert digesters([0, 1, 2], {1, 2}, read) == (0,)
    assert digesters([0, 1, 2], {0, 1, 2}, read) == (1,)
    assert digesters([0, 1, 2], {1}, read) == (1, 0, 2), "all, as two of them send nothing"


def test_ranks_that_are_equal_are_not_named():
    """Of what server ranks have got wrong on their way, trainer ranks are not accused."""
    whole = {name: [Box.whole(shape)] for name, shape in SHAPES.items()}
    world = World(route="peer", held={0: whole, 1: whole}, wanted={2: whole}, replica={2: 0})
    live = world.live

    def damaged(rank):
        entries = live(rank)
        entries[0].part.tensor.view(-1)[3] += 1
        return entries

    world.live = damaged
    judged = world.judge()
    assert judged[0] == [(0, 0)]
    assert name_held(world.members, judged[2]) == []
    (failure,) = world.named(judged)
    assert (failure.tensor, failure.rank) == ("v", "replica 0 server rank 2")
    assert "has the same bytes" not in failure.reason
