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
from weightbus.planning.box import Box, less, meets, overlap
from weightbus.planning.facts import Facts, Holding, ties_of
from weightbus.planning.holders import digesters, holders_of
from weightbus.planning.plan import (
    PIECES_PER_BUCKET,
    SOLO_BYTES,
    SOLO_OF_BUCKET,
    Want,
    check_wants,
    echoes_of,
    merge_sources,
    wire_specs,
)
from weightbus.planning.reshard_waves import Move, Piece, fill_waves
from weightbus.planning.spec import ITEMSIZE, Spec, fingerprint

# A box that several ranks want is cut so that each can pass on its share, but not into pieces below this.
LEAST_SHARE_BYTES = 64 << 10


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
class _Cell:
    """A box that lies in one box of the source, and in one of each rank that wants any of it."""

    box: Box
    holders: tuple[int, ...]
    wanted_by: tuple[int, ...] = ()


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
    name = fingerprint(["reshard", bucket_bytes, *specs, *echoes.items(), *waves, *given])
    return ReshardPlan(specs=specs, waves=waves, given=tuple(given), echoes=echoes, fingerprint=name)


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
        self._cells: dict[object, list[_Cell]] = {}

    def pieces(self, index: int) -> Iterator[Piece]:
        """Of one tensor, and of those that are tied to it."""
        spec = self.specs[index]
        itemsize = ITEMSIZE[spec.dtype]
        for cell in self._cells_of(index):
            own = tuple(rank for rank in cell.wanted_by if rank in cell.holders)
            far = [rank for rank in cell.wanted_by if rank not in cell.holders]
            pieces, staged = self._cut(index, cell, own, far)
            for box in pieces:
                nbytes = box.volume * itemsize
                first = min(far, key=lambda rank: (self._passed[rank], rank), default=None)
                src = own[0] if first is None else self._source(cell.holders, first)
                if first is not None:
                    self._sent[src] += nbytes
                    self._passed[first] += nbytes * (len(far) - 1)
                self.holders[index, box] = cell.holders
                solo = nbytes >= self.least_solo and any(rank not in staged for rank in (*far, src))
                if far and not solo:
                    staged = frozenset((*staged, *far, src))
                others = tuple(rank for rank in far if rank != first)
                yield Piece(index, box, nbytes, src, own, first, others, staged, solo)

    def _source(self, holders: Sequence[int], dst: int) -> int:
        host = self.hosts.get(dst)
        near = [rank for rank in holders if host and self.hosts.get(rank) == host]
        return min(near or holders, key=lambda rank: (self._sent[rank], rank))

    def _cut(
        self, index: int, cell: _Cell, own: Sequence[int], far: Sequence[int]
    ) -> tuple[list[Box], frozenset[int]]:
        """The pieces of a cell, and the ranks that need a bucket for them."""
        itemsize = ITEMSIZE[self.specs[index].dtype]
        most, share = self.bucket_bytes, cell.box.volume * itemsize
        if len(far) > 1:
            share = max(-(-share // len(far)), min(LEAST_SHARE_BYTES, self.piece_bytes))
        pieces = cell.box.split(max(1, min(most, share) // itemsize))
        staged = self._staged(index, cell, pieces, own, far)
        if staged:
            pieces = cell.box.split(max(1, min(self.piece_bytes, share) // itemsize))
        return pieces, staged

    def _staged(
        self, index: int, cell: _Cell, pieces: Sequence[Box], own: Sequence[int], far: Sequence[int]
    ) -> frozenset[int]:
        name, dtype = self.names[index][0], self.specs[index].dtype
        found = set[int]()
        for rank in cell.holders:
            held = self.sources[rank][name]
            cast = held.spec.dtype != dtype
            if (rank in own and cast) or (far and (cast or not self.in_place or not _runs(held, pieces))):
                found.add(rank)
        for rank in far:
            wanted = self.wants[rank].facts.get(name)
            if len(self.names[index]) > 1 or wanted is None or not _runs(wanted, pieces):
                found.add(rank)
        return frozenset(found)

    def _cells_of(self, index: int) -> list[_Cell]:
        """Worked out once for all tensors that are held and wanted alike."""
        held = holders_of(self.names[index][0], self.sources)
        wanted: dict[Box, list[int]] = {}
        for rank, want in self.wants.items():
            for name in self.names[index]:
                for box in want.facts[name].boxes if name in want.facts else ():
                    ranks = wanted.setdefault(box, [])
                    if box.volume and rank not in ranks:
                        ranks.append(rank)
        key = tuple((box, *ranks) for box, ranks in held.items()), tuple((b, *r) for b, r in wanted.items())
        if key not in self._cells:
            self._cells[key] = _cells(held, {box: ranks for box, ranks in wanted.items() if ranks})
        return self._cells[key]


def _runs(holding: Holding, pieces: Sequence[Box]) -> bool:
    """Whether each piece can be sent from, or received in, the storage of the holding."""
    if not holding.in_place:
        return False
    for piece in pieces:
        boxes = [box for box in holding.boxes if box.intersect(piece)]
        if len(boxes) != 1 or not piece.runs_in(boxes[0]):
            return False
    return True


def _cells(held: Mapping[Box, Sequence[int]], wanted: Mapping[Box, Sequence[int]]) -> list[_Cell]:
    """What is held, cut along the borders of all that is wanted; only what somebody wants."""
    cells = [_Cell(box, tuple(sorted(set(ranks)))) for box, ranks in held.items()]
    for layer in _layers(list(wanted)):
        shared: dict[int, list[tuple[Box, tuple[int, ...]]]] = {}
        for place, other, inner in meets([cell.box for cell in cells], layer):
            shared.setdefault(place, []).append((inner, tuple(wanted[layer[other]])))
        cut: list[_Cell] = []
        for place, cell in enumerate(cells):
            left = [cell.box]
            for inner, ranks in shared.get(place, ()):
                cut.append(_Cell(inner, cell.holders, tuple(sorted({*cell.wanted_by, *ranks}))))
                left = [rest for one in left for rest in less(one, inner)]
            cut += [_Cell(rest, cell.holders, cell.wanted_by) for rest in left]
        cells = cut
    return [cell for cell in cells if cell.wanted_by]


def _layers(boxes: Sequence[Box]) -> list[list[Box]]:
    """Boxes in lists of such as share no element: one list, if all replicas are cut alike."""
    if not overlap(boxes):
        return [list(boxes)]
    layers: list[list[Box]] = []
    for box in boxes:
        layer = next((layer for layer in layers if not overlap([box], layer)), None)
        if layer is None:
            layers.append(layer := [])
        layer.append(box)
    return layers


def _prove(
    specs: Sequence[Spec],
    echoes: Mapping[int, int],
    wants: Mapping[int, Want],
    waves: Sequence[Sequence[Move]],
) -> None:
    """Raise CoverageError unless each rank gets each element that it wants once, and no other."""
    got: dict[tuple[int, int], list[Box]] = {}
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
            found = got.pop((rank, index), [])
            union = list(boxes) if not overlap(list(boxes)) else _disjoint(list(boxes))
            volume = sum(box.volume for box in union)
            inside = sum(inner.volume for _, _, inner in meets(found, union))
            if overlap(found) or not volume == inside == sum(box.volume for box in found):
                raise CoverageError(
                    f"{specs[index].name}: expected moves of {volume} wanted elements to {want}, "
                    f"got {sum(box.volume for box in found)}, {inside} of them wanted"
                )
    if got:
        rank, index = next(iter(got))
        raise CoverageError(f"{specs[index].name}: moved to group rank {rank}, which does not want it")


def _disjoint(boxes: Sequence[Box]) -> list[Box]:
    found: list[Box] = []
    for box in boxes:
        left = [box]
        for other in found:
            left = [rest for one in left for rest in less(one, other)]
        found += left
    return found
