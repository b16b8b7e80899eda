"""The plan of the peer route: which server rank copies which boxes out of which rank's memory. Pure data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from weightbus.planning.box import Box
from weightbus.planning.exports import Exports, Reach
from weightbus.planning.facts import Facts, ties_of
from weightbus.planning.holders import digesters, holders_of
from weightbus.planning.plan import Want, check_wants, merge_sources, wire_specs
from weightbus.planning.spec import ITEMSIZE, Spec, fingerprint


@dataclass(frozen=True, slots=True)
class Piece:
    """A box that one group rank holds whole, in one part: ``tensor`` indexes the plan's specs."""

    src: int
    tensor: int
    box: Box


@dataclass(frozen=True, slots=True)
class Proof:
    """A box that ``src`` holds, among others. ranks: of each box of it that is wanted, the ``digesters``."""

    src: int
    tensor: int
    box: Box
    ranks: Mapping[Box, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerPlan:
    """specs: the wire's, in canonical order.

    proofs: every element of every tensor once.
    copies: for each server's group rank, every element that it wants once, with the rank to copy it from.
    """

    specs: tuple[Spec, ...]
    proofs: tuple[Proof, ...]
    copies: Mapping[int, tuple[Piece, ...]]
    fingerprint: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that travel."""
        return sum(spec.nbytes for spec in self.specs)


def plan_peer(sources: Mapping[int, Facts], wants: Mapping[int, Want]) -> PeerPlan:
    """sources: for each group rank that sends, what it holds. wants: by the group rank of each server.

    A rank copies what it holds itself from itself; of ranks that hold the same, each takes its share.
    Raises SpecError or CoverageError, naming tensor and ranks, where the two cannot be matched.
    """
    manifest = merge_sources(sources)
    check_wants(manifest, list(wants.values()), ties_of(sources.values()))
    specs = wire_specs(manifest, list(wants.values()))
    proofs: list[Proof] = []
    copies: dict[int, list[Piece]] = {rank: [] for rank in wants}
    read = dict.fromkeys(sources, 0)
    for index, spec in enumerate(specs):
        for box, holders in holders_of(spec.name, sources).items():
            srcs: dict[Box, set[int]] = {}
            for place, (rank, want) in enumerate(wants.items()):
                src = rank if rank in holders else holders[place % len(holders)]
                wanted = want.facts[spec.name].boxes if spec.name in want.facts else ()
                for inner in _within(wanted, box):
                    copies[rank].append(Piece(src, index, inner))
                    srcs.setdefault(inner, set()).add(src)
            ranks = {}
            for inner, found in srcs.items():
                ranks[inner] = digesters(holders, found, read)
                for rank in ranks[inner]:
                    read[rank] += inner.volume * ITEMSIZE[spec.dtype]
            proofs.append(Proof(holders[0], index, box, ranks))
    frozen = {rank: tuple(pieces) for rank, pieces in copies.items()}
    name = fingerprint(["peer", *specs, *proofs, *frozen.items()])
    return PeerPlan(specs=specs, proofs=tuple(proofs), copies=frozen, fingerprint=name)


def _within(wanted: Sequence[Box], held: Box) -> list[Box]:
    """The elements of ``held`` that are wanted, each once, though wanted boxes may overlap."""
    found = [inner for box in dict.fromkeys(wanted) if (inner := box.intersect(held)) is not None]
    return list(dict.fromkeys(found))


# What is cast as it is copied, by the reader's kernel or, into shared memory, by the owner.
CASTS = frozenset({("float32", "bfloat16"), ("float32", "float16")})


def casts_of(sources: Mapping[int, Facts], wants: Sequence[Want]) -> dict[tuple[str, str], str]:
    """The pairs of dtypes that have to be cast on the way, each with a text that names a tensor."""
    dtypes = {name: holding.spec.dtype for facts in sources.values() for name, holding in facts.items()}
    found: dict[tuple[str, str], str] = {}
    for want in wants:
        for name, holding in want.facts.items():
            pair = dtypes.get(name, ""), holding.spec.dtype
            if name in dtypes and not holding.skipped and pair[0] != pair[1]:
                found.setdefault(pair, f"{name} is {pair[0]} on the trainer and {pair[1]} on {want}")
    return found


def why_no_cast(casts: Mapping[tuple[str, str], str], reaches: Iterable[Reach]) -> str:
    """Why what has to be cast can't be copied between these; empty if it can, or if nothing has to."""
    for pair, text in casts.items():
        if pair not in CASTS:
            return f"{text}, and peer copies cast float32 to bfloat16 or float16 only"
    return next((reach.no_cast for reach in reaches if reach.no_cast), "") if casts else ""


def why_too_much(
    plan: PeerPlan, sources: Mapping[int, Facts], exports: Mapping[int, Exports], reaches: Mapping[int, Reach]
) -> str:
    """Why a broadcast, which sends what is cast already, brings fewer bytes to a rank than copies of what has
    to be cast, which are as wide as the source; empty if it does not."""
    for rank, pieces in plan.copies.items():
        far = sum(
            piece.box.volume * ITEMSIZE[sources[piece.src][plan.specs[piece.tensor].name].spec.dtype]
            for piece in pieces
            if piece.src != rank and exports[piece.src].device != reaches[rank].device
        )
        if far > plan.nbytes:
            return (
                f"uncast, {far / 1e9:.2f} GB would come to a rank from other devices, by broadcast "
                f"{plan.nbytes / 1e9:.2f} GB"
            )
    return ""
