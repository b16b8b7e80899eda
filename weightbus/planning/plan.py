"""Plans: which rank sends which boxes, in which transfers. Pure data, computed alike on every rank.

The broadcast route: every element of the source is broadcast once, by one rank that holds it, to all
ranks of the group; each server rank takes from it what it wants. Transfers that are started together
are a wave: the larger a wave, the fewer the pauses of the link between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weightbus.errors import CoverageError, SpecError
from weightbus.planning.box import Box, check_exact_cover
from weightbus.planning.facts import Facts, Holding, ties_of
from weightbus.planning.holders import holders_of
from weightbus.planning.spec import ITEMSIZE, Spec, castable, fingerprint

# Start of a slot in its bucket: enough for the widest dtype and for 16-byte vector copies.
SLOT_ALIGN = 16

# A box of at least this size travels alone, so that either end may use its storage in place.
# Boxes that are smaller than this, or than this share of a bucket, cost less to copy through one than a
# transfer of their own costs: on NVLink that is so up to 4 MiB, a 64th of CUDA's default.
SOLO_BYTES = 1 << 20
SOLO_OF_BUCKET = 64

# Boxes that go through buckets are cut to this share of one, so that buckets of boxes of all sizes are full.
PIECES_PER_BUCKET = 4

# A wave may be so many times as long as a bucket, where the rest of it uses no bucket on any rank.
BUCKETS_PER_WAVE = 16

# The first waves are shorter, as the link stands still until the first one is packed and launched; and so are
# the last ones, as what they bring has still to be installed and digested: each is half of what is left.
FIRST_WAVES = (1 / 16, 1 / 4)
LEAST_WAVE = 1 / 4


@dataclass(frozen=True, slots=True)
class Slot:
    """One box's place in a transfer: ``tensor`` indexes the plan's specs, ``offset`` is in bytes."""

    tensor: int
    box: Box
    offset: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """One contiguous broadcast of ``nbytes`` by group rank ``src``."""

    src: int
    nbytes: int
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """specs: the wire's (destination's dtypes), in order of their names' UTF-8 bytes. waves: in the order
    of their start; in each, what goes through buckets is at most ``bucket_bytes``, gaps included. echoes: specs
    of tied names whose bytes travel as another spec's, by index."""

    specs: tuple[Spec, ...]
    waves: tuple[tuple[Transfer, ...], ...]
    fingerprint: str
    echoes: Mapping[int, int] = field(default_factory=dict)

    @property
    def transfers(self) -> list[Transfer]:
        return [transfer for wave in self.waves for transfer in wave]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that travel, without padding."""
        return sum(spec.nbytes for index, spec in enumerate(self.specs) if index not in self.echoes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """What one server rank wants, and who it is."""

    replica: int
    rank: int
    facts: Facts

    def __str__(self) -> str:
        return f"replica {self.replica} server rank {self.rank}"


class _Waves:
    """Waves being filled: the current one has a transfer for each large box, and for each sending rank
    one bucket of small ones, which is closed with the wave."""

    def __init__(self, bucket_bytes: int, total_bytes: int) -> None:
        self.bucket_bytes = bucket_bytes
        self._left_bytes = total_bytes
        self.closed: list[tuple[Transfer, ...]] = []
        self._start()

    def _start(self) -> None:
        self._solo: list[Transfer] = []
        self._slots: dict[int, list[Slot]] = {}
        self._fill: dict[int, int] = {}
        self._ends: dict[int, int] = {}  # without the last slot's padding: a receiver may use its own storage
        self._nbytes = self._staged_bytes = 0

    def add(self, src: int, tensor: int, box: Box, nbytes: int, *, direct: bool, solo: bool) -> None:
        """direct: no rank needs a bucket for it."""
        room = -(-nbytes // SLOT_ALIGN) * SLOT_ALIGN
        staged = 0 if direct else room
        if self._nbytes + room > self._limit(BUCKETS_PER_WAVE) or self._staged_bytes + staged > self._limit(1):
            self.close()
        self._nbytes += room
        self._staged_bytes += staged
        if solo:
            self._solo.append(Transfer(src, nbytes, (Slot(tensor, box, 0),)))
        else:
            offset = self._fill.get(src, 0)
            self._slots.setdefault(src, []).append(Slot(tensor, box, offset))
            self._fill[src] = offset + room
            self._ends[src] = offset + nbytes

    def _limit(self, buckets: int) -> float:
        """Of the current wave, with a whole one of so many buckets."""
        whole, turn = buckets * self.bucket_bytes, len(self.closed)
        first = FIRST_WAVES[turn] if turn < len(FIRST_WAVES) else 1.0
        return min(first * whole, max(LEAST_WAVE * whole, self._left_bytes / 2))

    def close(self) -> None:
        self._left_bytes -= self._nbytes
        small = [Transfer(src, self._ends[src], tuple(slots)) for src, slots in self._slots.items()]
        if self._solo or small:
            self.closed.append((*self._solo, *small))
        self._start()


def plan_broadcast(
    sources: Mapping[int, Facts], wants: Sequence[Want], *, bucket_bytes: int, in_place: bool = True
) -> Plan:
    """Plan of the broadcast route.

    sources: for each group rank that sends, what it holds. wants: each server rank's.
    bucket_bytes: in each wave, what goes through buckets on any rank is no longer.
    in_place: whether senders can use their storage, as far as they say so.
    Raises SpecError or CoverageError, naming tensor and ranks, where the two cannot be matched.
    """
    manifest = merge_sources(sources)
    ties = ties_of(sources.values())
    check_wants(manifest, wants, ties)
    specs = wire_specs(manifest, wants)
    echoes = echoes_of(specs, ties)
    lengths = dict.fromkeys(sources, 0)
    piece_bytes = bucket_bytes // PIECES_PER_BUCKET
    least_solo = min(max(SOLO_BYTES, bucket_bytes // SOLO_OF_BUCKET), piece_bytes)
    waves = _Waves(bucket_bytes, sum(spec.nbytes for spec in specs))
    # With several senders, each of them needs a bucket for what the others send.
    alone = in_place and len(sources) == 1
    distinct = list({id(want.facts): want.facts for want in wants}.values())
    for index, spec in enumerate(specs):
        if index in echoes:
            continue
        itemsize = ITEMSIZE[spec.dtype]
        for box, holders in holders_of(spec.name, sources).items():
            src = min(holders, key=lambda rank: (lengths[rank], rank))
            lengths[src] += box.volume * itemsize
            pieces = box.split(max(1, bucket_bytes // itemsize))
            direct = alone and index not in echoes.values()
            direct = direct and _direct(spec, sources[src][spec.name], pieces, distinct)
            if not direct:
                pieces = box.split(max(1, piece_bytes // itemsize))
            for piece in pieces:
                nbytes = piece.volume * itemsize
                solo = nbytes >= least_solo
                waves.add(src, index, piece, nbytes, direct=direct and solo, solo=solo)
    waves.close()
    name = fingerprint([bucket_bytes, *specs, *echoes.items(), *waves.closed])
    return Plan(specs=specs, waves=tuple(waves.closed), echoes=echoes, fingerprint=name)


def echoes_of(specs: Sequence[Spec], ties: Mapping[str, str]) -> dict[int, int]:
    """Of several names of one tensor that are wanted in one dtype, the first carries the others' bytes."""
    carriers: dict[tuple[str, str], int] = {}
    echoes = {}
    for index, spec in enumerate(specs):
        if spec.name in ties:
            carrier = carriers.setdefault((ties[spec.name], spec.dtype), index)
            if carrier != index:
                echoes[index] = carrier
    return echoes


def _direct(wire: Spec, held: Holding, pieces: Sequence[Box], wants: Sequence[Facts]) -> bool:
    """Whether every rank can use its own storage as the buffer of each piece."""
    if not held.in_place or held.spec.dtype != wire.dtype:
        return False
    for facts in wants:
        wanted = facts.get(wire.name)
        if wanted is None or not wanted.in_place:
            return False
        for piece in pieces:
            boxes = [box for box in wanted.boxes if box.intersect(piece)]
            if len(boxes) != 1 or not piece.runs_in(boxes[0]):
                return False
    return True


def merge_sources(sources: Mapping[int, Facts]) -> dict[str, Spec]:
    """The manifest in canonical order: what all trainer ranks hold together, each element once."""
    manifest: dict[str, Spec] = {}
    owner: dict[str, int] = {}
    for rank, facts in sources.items():
        for name, holding in facts.items():
            if manifest.setdefault(name, holding.spec) != holding.spec:
                raise SpecError(
                    f"{name}: expected {manifest[name]} as on group rank {owner[name]}, "
                    f"got {holding.spec} on group rank {rank}"
                )
            owner.setdefault(name, rank)
    for name, spec in manifest.items():
        check_exact_cover(name, spec.shape, holders_of(name, sources), "boxes of all trainer ranks")
    return {name: manifest[name] for name in sorted(manifest, key=str.encode)}


def check_wants(manifest: Mapping[str, Spec], wants: Sequence[Want], ties: Mapping[str, str]) -> None:
    """Each replica takes every tensor of the manifest, whole, on one rank or another, or says why it does not.

    ties: as of ``ties_of``. Of tied names one is enough.
    """
    for replica, members in _replicas(wants).items():
        for want in members:
            if unknown := want.facts.keys() - manifest.keys():
                raise SpecError(f"{min(unknown)}: wanted by {want}, but no trainer rank holds it")
        taken = _taken(members)
        tied = {ties[name] for name in taken if name in ties}
        nobodys = [
            name
            for name in manifest
            if name not in taken and ties.get(name) not in tied and not any(name in w.facts for w in members)
        ]
        if nobodys:
            many = f"; so are {len(nobodys) - 1} others of the trainer's {len(manifest)} tensors, such as "
            raise SpecError(
                f"{nobodys[0]}: unknown name: expected one of replica {replica}'s {len(members)} "
                f"server ranks to take it, got none (leave it out with Publisher(exclude=[...]), or with a "
                f"name_map to None){many + ', '.join(nobodys[1:4]) if len(nobodys) > 1 else ''}"
            )
        for name, held in taken.items():
            spec = manifest[name]
            _check_holding_shapes(spec, held, replica)
            if any(holding.why_arrived for holding in held):
                continue  # an opaque hook takes the tensor whole, beside others that may take parts of it
            boxes = {box for holding in held for box in holding.boxes}
            check_exact_cover(name, spec.shape, boxes, f"boxes of replica {replica}'s server ranks")


def skipped_by(wants: Sequence[Want], ties: Mapping[str, str]) -> dict[str, str]:
    """Names of which some replica takes nothing, nor any name that is tied to them; with replica and reason."""
    skipped: dict[str, str] = {}
    for replica, members in _replicas(wants).items():
        taken = _taken(members)
        tied = {ties[name] for name in taken if name in ties}
        for want in members:
            for name, holding in want.facts.items():
                if holding.skipped and name not in taken and ties.get(name) not in tied:
                    skipped.setdefault(name, f"replica {replica}: {holding.skipped}")
    return skipped


def _replicas(wants: Sequence[Want]) -> dict[int, list[Want]]:
    replicas: dict[int, list[Want]] = {}
    for want in wants:
        replicas.setdefault(want.replica, []).append(want)
    return replicas


def _taken(members: Sequence[Want]) -> dict[str, list[Holding]]:
    """What these server ranks take, by wire name."""
    taken: dict[str, list[Holding]] = {}
    for want in members:
        for name, holding in want.facts.items():
            if not holding.skipped:
                taken.setdefault(name, []).append(holding)
    return taken


def _check_holding_shapes(spec: Spec, held: Sequence[Holding], replica: int) -> None:
    for holding in held:
        if holding.spec.shape != spec.shape:
            raise SpecError(
                f"{spec.name}: expected shape {list(spec.shape)}, got {list(holding.spec.shape)}; "
                f"replica {replica}"
            )
        if not holding.boxes and spec.elements and len(held) == 1:
            raise CoverageError(f"{spec.name}: no box of it on any server rank of replica {replica}")


def wire_specs(manifest: Mapping[str, Spec], wants: Sequence[Want]) -> tuple[Spec, ...]:
    """What is taken of the manifest, with the destinations' dtypes, which must agree and be castable to."""
    first: dict[str, Want] = {}
    for want in wants:
        for name, holding in want.facts.items():
            if holding.skipped:
                continue
            dtype = first.setdefault(name, want).facts[name].spec.dtype
            if holding.spec.dtype != dtype:
                raise SpecError(
                    f"{name}: expected one dtype on all server ranks, got {dtype} on {first[name]} "
                    f"and {holding.spec.dtype} on {want}"
                )
    specs = []
    for name, spec in manifest.items():
        if name not in first:
            continue
        dtype = first[name].facts[name].spec.dtype
        if not castable(spec.dtype, dtype):
            raise SpecError(f"{name}: {spec.dtype} of the trainer can't be cast to {dtype} of {first[name]}")
        specs.append(Spec(name=name, dtype=dtype, shape=spec.shape))
    return tuple(specs)
