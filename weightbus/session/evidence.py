"""What one rank can tell of tensors that are wrong: of what it sent, of what it holds live.

Trainer ranks have the sums that they kept, and their source as long as it has not moved on; server ranks
have live storage. Nothing here is called unless digests differ, so it may allocate: at most one piece of a
tensor at a time, where the source has to be cast again.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from weightbus.control import messages as m
from weightbus.digest import Digester
from weightbus.digest.ledger import ALL, Chosen, Ledger, Record, Sums
from weightbus.errors import UpdateError
from weightbus.hub.compare import Pair, total
from weightbus.inventory.account import Spoilt
from weightbus.planning.box import Box
from weightbus.planning.narrow import bounding
from weightbus.planning.spec import Spec
from weightbus.routes.compiled import Planned
from weightbus.tensors.bucket import torch_dtype
from weightbus.tensors.install import Target
from weightbus.tensors.layout import Part

# A trainer rank's parts by wire name.
Held = Mapping[str, Sequence[Part]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What this rank can fold for one job: of what it sent, of what it holds live.

    holders: of an update, the sets of trainer ranks that hold the same.
    """

    sent: Record | None
    live: Record | None
    chosen: Chosen = ALL
    live_only: bool = False
    holders: Sequence[Sequence[int]] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor where it lies. spec: the wire's; ``tensor`` may still have the source's dtype."""

    spec: Spec
    box: Box
    tensor: Tensor


def tensor_sums(
    evidence: Sequence[Evidence], groups: Iterable[tuple[int, int]]
) -> tuple[list[m.TensorSums], list[m.TensorSums]]:
    """Sums of the single tensors of these jobs and groups: of what was sent, of what is live."""
    sent: list[m.TensorSums] = []
    live: list[m.TensorSums] = []
    for job, group in groups:
        one = evidence[job]
        for record, found in ((one.sent, sent), (one.live, live)):
            if record and (record is one.sent or record.group == group):
                sums = record.ledger.by_tensor(record.sums, group, one.chosen, live_only=one.live_only)
                found.append(m.TensorSums(job=job, group=group, sums=sums))
    return sent, live


def digest_shared(planned: Planned, seed: bytes) -> Ledger:
    """What other trainer ranks hold too, as it lies on this one now."""
    ledger = Ledger(planned.shared, planned.wants, planned.sent.owners)
    ledger.digest_live(seed)
    return ledger


def held_folds(ledger: Ledger, sums: Sums, seed: bytes, sets: Sequence[Sequence[int]]) -> list[m.HeldFold]:
    """Of all that this trainer rank holds and others hold too. sets: which ranks do."""
    found = []
    for holders, group in ledger.shared:
        folded, nbytes = ledger.fold(sums, seed, group, holders=holders)
        ranks = len(sets[holders])
        found.append(m.HeldFold(holders=holders, ranks=ranks, group=group, sums=folded, nbytes=nbytes))
    return found


def held_sums(ledger: Ledger, groups: Container[int], sets: Container[tuple[int, int]]) -> list[m.HeldSums]:
    """Sums of single tensors of it, for these groups, and for these sets and groups."""
    return [
        m.HeldSums(holders=holders, group=group, sums=ledger.by_tensor(ledger.sums, group, holders=holders))
        for holders, group in ledger.shared
        if group in groups or (holders, group) in sets
    ]


def spoiled(target: Target) -> list[m.Wrong]:
    """Parameters of which loading code's constants are not what they should be."""
    return [m.Wrong(name=name, reason=why, box=_span(box)) for name, box, why in target.spoiled_fills()]


def amiss(spoilt: Iterable[Spoilt]) -> list[m.Wrong]:
    """Constants and derived tensors that hold something else."""
    return [m.Wrong(name=s.name, reason=s.reason, box=_span(s.box), kind=s.kind) for s in spoilt]


def hidden_sums(job: int, target: Target, seed: bytes) -> m.TensorSums:
    """Sums of a server rank's own parameters of which no wire tensor's digest tells all."""
    sums: dict[str, Pair] = {}
    parts = target.hidden()
    for part, row in zip(parts, Digester(parts).sums(seed).tolist(), strict=True):
        sums[part.spec.name] = total((sums.get(part.spec.name, (0, 0)), _pair(row)))
    return m.TensorSums(job=job, group=0, sums=sums)


def clue(evidence: Sequence[Evidence], suspect: m.Suspect, source: Held) -> m.Clue:
    """What this rank knows of a suspect. source: where a trainer rank's tensors lie now."""
    one, name, group = evidence[suspect.job], suspect.tensor, suspect.group
    live = one.live if one.live and one.live.group == group else None
    return m.Clue(
        sent=_sent_clue(one.sent, name, group, source) if one.sent else None,
        live=_live_clue(live, name) if live else None,
    )


def _live_clue(record: Record, name: str) -> m.LiveClue:
    pieces, former = live_pieces(record, name), record.former
    own = [piece.box for piece in pieces]
    elsewhere = {}
    for group, facts in sorted(record.wants.items())[: m.MAX_GROUPS] if own else ():
        boxes = facts[name].boxes if name in facts and not facts[name].why_arrived else ()
        if group != record.group and [box.sizes for box in boxes] == [box.sizes for box in own]:
            moved = [Piece(p.spec, box, p.tensor) for p, box in zip(pieces, boxes, strict=True)]
            elsewhere[group] = _digest(moved, record.seed)
    return m.LiveClue(
        former=former.version if former else None,
        former_sums=_digest(pieces, former.seed) if former else (0, 0),
        elsewhere=elsewhere,
        pieces=len(own),
        box=_span(bounding(own)) if own else None,
        shape=list(pieces[0].spec.shape) if pieces else [],
    )


def _sent_clue(record: Record, name: str, group: int, source: Held) -> m.SentClue:
    former = record.former
    now, why = None, ""
    try:
        now = _digest(sent_pieces(record, name, group, source), record.seed)
        if now != _kept(record, record.sums, name, group):
            now, why = None, "the source has moved on"
    except UpdateError:
        why = "the source has moved on"
    except Exception as error:
        why = f"the source can't be digested ({type(error).__name__}: {error})"
    return m.SentClue(
        former=former.version if former else None,
        former_sums=_kept(record, former.sums, name, group) if former else (0, 0),
        elsewhere={
            other: _kept(record, record.sums, name, other) for other in sorted(record.wants)[: m.MAX_GROUPS]
        },
        now=now,
        why=why,
    )


def _kept(record: Record, sums: Sums, name: str, group: int) -> Pair:
    rows = record.ledger.rows(name)
    return total(_pair(sums[row]) for row, entry in rows if group in entry.groups)


def live_pieces(record: Record, name: str) -> list[Piece]:
    """What a server rank holds live of a wire tensor."""
    if record.target is None or name not in record.target.specs:
        return []
    spec = record.target.specs[name]
    return [Piece(spec, box, view) for box, view in record.target.live(name) if box.volume]


def sent_pieces(record: Record, name: str, group: int, source: Held) -> list[Piece]:
    """What a trainer rank sent of a tensor to a group, as its source holds it now.

    Raises UpdateError where the source's boxes are not those of then.
    """
    found = []
    for _, entry in record.ledger.rows(name):
        if group not in entry.groups:
            continue
        held = source.get(name, ())
        part = next((part for part in held if part.box.intersect(entry.part.box) == entry.part.box), None)
        if part is None:
            raise UpdateError(f"{name}: no box of the source holds {entry.part.box} any more")
        box = entry.part.box
        found.append(Piece(entry.part.spec, box, part.tensor[box.within(part.box)]))
    return found


def answer(evidence: Sequence[Evidence], question: m.Question, source: Held) -> list[Pair]:
    """Sums of each of a question's boxes, as far as it lies in what this rank sent or holds."""
    one = evidence[question.job]
    record = one.sent if question.sent else one.live
    if record is None:
        raise UpdateError(f"{question.tensor}: expected a record of job {question.job}, got none")
    if question.sent:
        pieces = sent_pieces(record, question.tensor, question.group, source)
    else:
        pieces = live_pieces(record, question.tensor)
    boxes = [Box(tuple(span.offsets), tuple(span.sizes)) for span in question.boxes]
    dtype = torch_dtype(pieces[0].spec.dtype) if pieces else None
    if any(piece.tensor.dtype != dtype for piece in pieces):
        # One at a time: casting all of them at once would take as much memory again.
        return [_digest(_within(pieces, box), record.seed) for box in boxes]
    cut = [_within(pieces, box) for box in boxes]
    parts = [Part(spec=p.spec, box=p.box, tensor=p.tensor) for pieces in cut for p in pieces]
    rows = iter(Digester(parts).sums(record.seed).tolist())
    return [total(_pair(next(rows)) for _ in pieces) for pieces in cut]


def _within(pieces: Sequence[Piece], box: Box) -> list[Piece]:
    return [
        Piece(piece.spec, inner, piece.tensor[inner.within(piece.box)])
        for piece in pieces
        if (inner := piece.box.intersect(box)) is not None
    ]


def _digest(pieces: Sequence[Piece], seed: bytes) -> Pair:
    sums = []
    for piece in pieces:
        part = Part(spec=piece.spec, box=piece.box, tensor=piece.tensor)
        if not part.narrowed:
            part = replace(part, tensor=piece.tensor.to(torch_dtype(piece.spec.dtype)))
        sums += Digester([part]).sums(seed).tolist()
    return total(map(_pair, sums))


def _pair(row: Sequence[int] | npt.NDArray[np.uint64]) -> Pair:
    return int(row[0]), int(row[1])


def _span(box: Box) -> m.Span:
    return m.Span(offsets=list(box.offsets), sizes=list(box.sizes))
