"""The plan of the reshard route: every byte goes from a rank that has it to the ranks that need it. Pure data.

Of a box that several ranks want, a trainer rank sends each piece once, to one of them, which passes it on to
the others in a later wave. So all trainer ranks together send one model for any number of replicas, and each
server rank receives what it wants once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from weightbus.errors import CoverageError
from weightbus.planning.box import Box, meets, overlap
from weightbus.planning.cells import Cell, cells_of, disjoint
from weightbus.planning.facts import Facts, Holding, ties_of
from weightbus.planning.holders import digesters, holders_of
from weightbus.planning.plan import (
    PIECES_PER_BUCKET,
    SOLO_BYTES,
    SOLO_OF_BUCKET,
    Slot,
    Want,
    check_wants,
    echoes_of,
    merge_sources,
    wire_specs,
)
from weightbus.planning.reshard_waves import Move, Piece, fill_waves
from weightbus.planning.spec import ITEMSIZE, Spec, fingerprint


@dataclass(frozen=True, slots=True)
class Given:
    """A box of the source that somebody wants, with the wave in which it leaves ``src``.

    digesters: the holders of it that digest it (``holders.digesters``).
    """

    src: int
    tensor: int
    box: Box
    wave: int
    digesters: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardPlan:
    """specs, echoes: as of ``Plan``. waves: in the order of their start, the same on all ranks; in each, what
    goes through one rank's bucket is at most ``bucket_bytes``. given: every wanted element of the source once.
    """

    specs: tuple[Spec, ...]
    waves: tuple[tuple[Move, ...], ...]
    given: tuple[Given, ...]
    fingerprint: str
    echoes: Mapping[int, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that travel, each once."""
        return sum(spec.nbytes for index, spec in enumerate(self.specs) if index not in self.echoes)

    def traffic(self) -> tuple[Counter[int], Counter[int]]:
        """Bytes that each group rank sends to others, and receives from them."""
        sent, received = Counter[int](), Counter[int]()
        for wave in self.waves:
            for move in wave:
                if move.src != move.dst:
                    sent[move.src] += move.nbytes
                    received[move.dst] += move.nbytes
        return sent, received

    @property
    def busiest_bytes(self) -> int:
        """Of the rank that sends, or receives, most."""
        sent, received = self.traffic()
        return max([*sent.values(), *received.values()], default=0)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A cell in pieces. own: holders that want it; far: others that do. staged: ranks that need a bucket."""

    boxes: Sequence[Box]
    holders: tuple[int, ...]
    own: tuple[int, ...]
    far: tuple[int, ...]
    staged: frozenset[int]


def plan_reshard(
    sources: Mapping[int, Facts],
    wants: Mapping[int, Want],
    *,
    bucket_bytes: int,
    in_place: bool = True,
    hosts: Mapping[int, str] | None = None,
) -> ReshardPlan:
    """sources: for each group rank that sends, what it holds. wants: by the group rank of each server.

    bucket_bytes: what goes through buckets on a rank in one wave. in_place: whether senders can use their
    storage, as far as they say so. hosts: of group ranks; of ranks that hold the same, those on the receiver's
    host send first, then those that have sent least.
    Raises SpecError or CoverageError, naming tensor and ranks, where the two cannot be matched.
    """
    manifest = merge_sources(sources)
    ties = ties_of(sources.values())
    check_wants(manifest, list(wants.values()), ties)
    specs = wire_specs(manifest, list(wants.values()))
    echoes = echoes_of(specs, ties)
    cutter = _Cutter(sources, wants, specs, echoes, bucket_bytes, in_place, hosts or {})
    pieces = [piece for index in range(len(specs)) if index not in echoes for piece in cutter.pieces(index)]
    order, waves = fill_waves(pieces, bucket_bytes)
    given = []
    read = Counter[int]()
    for piece, wave in order:
        holders = cutter.holders[piece.tensor, piece.box]
        chosen = digesters(holders, {*piece.own, piece.src}, {rank: read[rank] for rank in holders})
        for rank in chosen:
            read[rank] += piece.nbytes
        given.append(Given(piece.src, piece.tensor, piece.box, wave, chosen))
    _prove(specs, echoes, wants, waves)
    rows = [[(m.src, m.dst, m.passed, [_row(slot) for slot in m.slots]) for m in wave] for wave in waves]
    who = [one.digesters for one in given]
    name = fingerprint(["reshard", bucket_bytes, *specs, *echoes.items(), *rows, *who])
    return ReshardPlan(specs=specs, waves=waves, given=tuple(given), echoes=echoes, fingerprint=name)


def _row(slot: Slot) -> tuple[object, ...]:
    return slot.tensor, slot.offset, slot.box.offsets, slot.box.sizes


class _Cutter:
    """Cuts tensors into pieces, and chooses who sends each of them."""

    def __init__(
        self,
        sources: Mapping[int, Facts],
        wants: Mapping[int, Want],
        specs: Sequence[Spec],
        echoes: Mapping[int, int],
        bucket_bytes: int,
        in_place: bool,
        hosts: Mapping[int, str],
    ) -> None:
        self.sources, self.wants, self.specs = sources, wants, specs
        self.bucket_bytes, self.in_place, self.hosts = bucket_bytes, in_place, hosts
        self.piece_bytes = bucket_bytes // PIECES_PER_BUCKET
        self.least_solo = min(max(SOLO_BYTES, bucket_bytes // SOLO_OF_BUCKET), self.piece_bytes)
        self.names = {index: [spec.name] for index, spec in enumerate(specs) if index not in echoes}
        for echo, carrier in echoes.items():
            self.names[carrier].append(specs[echo].name)
        self.holders: dict[tuple[int, Box], tuple[int, ...]] = {}
        self._sent, self._passed = Counter[int](), Counter[int]()
        self._cuts: dict[object, list[_Cut]] = {}

    def pieces(self, index: int) -> Iterator[Piece]:
        """Of one tensor, and of those that are tied to it."""
        itemsize = ITEMSIZE[self.specs[index].dtype]
        for cut in self._cuts_of(index):
            for box in cut.boxes:
                nbytes = box.volume * itemsize
                first = min(cut.far, key=lambda rank: (self._passed[rank], rank), default=None)
                src = cut.own[0] if first is None else self._source(cut.holders, first)
                if first is not None:
                    self._sent[src] += nbytes
                    self._passed[first] += nbytes * (len(cut.far) - 1)
                solo = nbytes >= self.least_solo and any(rank not in cut.staged for rank in (*cut.far, src))
                staged = cut.staged if solo or not cut.far else cut.staged.union(cut.far, (src,))
                others = tuple(rank for rank in cut.far if rank != first)
                self.holders[index, box] = cut.holders
                yield Piece(index, box, nbytes, src, cut.own, first, others, staged, solo)

    def _source(self, holders: Sequence[int], dst: int) -> int:
        host = self.hosts.get(dst)
        near = [rank for rank in holders if host and self.hosts.get(rank) == host]
        return min(near or holders, key=lambda rank: (self._sent[rank], rank))

    def _cuts_of(self, index: int) -> list[_Cut]:
        """Worked out once for all tensors that are held and wanted alike."""
        names, spec = self.names[index], self.specs[index]
        held = [(rank, facts[names[0]]) for rank, facts in self.sources.items() if names[0] in facts]
        wanted = [
            (rank, name == names[0], want.facts[name])
            for rank, want in self.wants.items()
            for name in names
            if name in want.facts
        ]
        key = (
            (spec.dtype, len(names)),
            tuple((rank, one.boxes, one.in_place, one.spec.dtype) for rank, one in held),
            tuple((rank, first, one.boxes, one.in_place) for rank, first, one in wanted),
        )
        if key not in self._cuts:
            boxes: dict[Box, list[int]] = {}
            for rank, _, holding in wanted:
                for box in holding.boxes:
                    if box.volume and rank not in boxes.setdefault(box, []):
                        boxes[box].append(rank)
            cells = cells_of(holders_of(names[0], self.sources), boxes)
            self._cuts[key] = [self._cut(index, cell) for cell in cells]
        return self._cuts[key]

    def _cut(self, index: int, cell: Cell) -> _Cut:
        itemsize = ITEMSIZE[self.specs[index].dtype]
        own = tuple(rank for rank in cell.wanted_by if rank in cell.holders)
        far = tuple(rank for rank in cell.wanted_by if rank not in cell.holders)
        # What is passed on is cut no smaller than it has to be: of many, each rank gets its share anyway.
        share = max(-(-cell.box.volume * itemsize // max(1, len(far))), self.least_solo)
        boxes = cell.box.split(max(1, min(self.bucket_bytes, share) // itemsize))
        staged = self._staged(index, cell, boxes, own, far)
        if staged:
            boxes = cell.box.split(max(1, min(self.piece_bytes, share) // itemsize))
        return _Cut(boxes, cell.holders, own, far, staged)

    def _staged(
        self, index: int, cell: Cell, boxes: Sequence[Box], own: Sequence[int], far: Sequence[int]
    ) -> frozenset[int]:
        """The ranks that need a bucket for these."""
        name, dtype = self.names[index][0], self.specs[index].dtype
        found = set[int]()
        for rank in cell.holders:
            held = self.sources[rank][name]
            cast = held.spec.dtype != dtype
            if (rank in own and cast) or (far and (cast or not self.in_place or not _runs(held, boxes))):
                found.add(rank)
        for rank in far:
            wanted = self.wants[rank].facts.get(name)
            if len(self.names[index]) > 1 or wanted is None or not _runs(wanted, boxes):
                found.add(rank)
        return frozenset(found)


def _runs(holding: Holding, pieces: Sequence[Box]) -> bool:
    """Whether each piece can be sent from, or received in, the storage of the holding."""
    if not holding.in_place:
        return False
    for piece in pieces:
        boxes = [box for box in holding.boxes if box.intersect(piece)]
        if len(boxes) != 1 or not piece.runs_in(boxes[0]):
            return False
    return True


def _prove(
    specs: Sequence[Spec],
    echoes: Mapping[int, int],
    wants: Mapping[int, Want],
    waves: Sequence[Sequence[Move]],
) -> None:
    """Raise CoverageError unless each rank gets each element that it wants once, and no other."""
    got: dict[tuple[int, int], list[Box]] = {}
    proved = set[tuple[tuple[Box, ...], tuple[Box, ...]]]()
    for wave in waves:
        for move in wave:
            for slot in move.slots:
                got.setdefault((move.dst, slot.tensor), []).append(slot.box)
    for rank, want in wants.items():
        wanted: dict[int, dict[Box, None]] = {}
        for index, spec in enumerate(specs):
            if (holding := want.facts.get(spec.name)) is not None:
                boxes = wanted.setdefault(echoes.get(index, index), {})
                boxes.update((box, None) for box in holding.boxes if box.volume)
        for index, boxes in wanted.items():
            found = tuple(sorted(got.pop((rank, index), []), key=lambda box: (box.offsets, box.sizes)))
            key = tuple(boxes), found
            if key not in proved and (wrong := _differ(list(boxes), found)):
                raise CoverageError(f"{specs[index].name}: {wrong}; moves to {want}")
            proved.add(key)
    if got:
        rank, index = next(iter(got))
        raise CoverageError(f"{specs[index].name}: moved to group rank {rank}, which does not want it")


def _differ(wanted: Sequence[Box], found: Sequence[Box]) -> str:
    """In what ``found`` is not what is wanted, each element once; empty if it is."""
    union = disjoint(wanted)
    due, got = (sum(box.volume for box in boxes) for boxes in (union, found))
    inside = sum(inner.volume for _, _, inner in meets(found, union))
    if not overlap(found) and due == inside == got:
        return ""
    return f"expected {due} wanted elements, got {got}, {inside} of them wanted"
