"""What one rank can tell of tensors that are wrong: of what it sent, of what it holds live.

Trainer ranks have the sums that they kept, and their source as long as it has not moved on; server ranks
have live storage. Nothing here is called unless digests differ, so it may allocate: at most one piece of a
tensor at a time, where the source has to be cast again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from weightbus import messages as m
from weightbus.box import Box
from weightbus.bucket import torch_dtype
from weightbus.digest import Digester
from weightbus.errors import UpdateError
from weightbus.judge import Lanes, total
from weightbus.layout import Layout, Part
from weightbus.ledger import Record
from weightbus.spec import Spec

# Other groups whose boxes a server rank compares its bytes with.
MAX_GROUPS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What this rank can fold for one job: of what it sent, of what it holds live."""

    sent: Record | None
    live: Record | None
    modules: Sequence[str] | None = None
    live_only: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor where it lies. spec: the wire's; ``tensor`` may still have the source's dtype."""

    spec: Spec
    box: Box
    tensor: Tensor


def tensor_sums(evidence: Sequence[Evidence], groups: Iterable[tuple[int, int]]) -> tuple[
    list[m.TensorSums], list[m.TensorSums]
]:
    """Sums of the single tensors of these jobs and groups: of what was sent, of what is live."""
    sent: list[m.TensorSums] = []
    live: list[m.TensorSums] = []
    for job, group in groups:
        one = evidence[job]
        for record, found in ((one.sent, sent), (one.live, live)):
            if record and (record is one.sent or record.group == group):
                sums = record.ledger.by_tensor(record.sums, group, one.modules, live_only=one.live_only)
                found.append(m.TensorSums(job=job, group=group, sums=sums))
    return sent, live


def clue(evidence: Sequence[Evidence], suspect: m.Suspect, source: Layout | None) -> m.Clue:
    """What this rank knows of a suspect. source: where a trainer rank's tensors lie now."""
    one, name, group = evidence[suspect.job], suspect.tensor, suspect.group
    if one.live and one.live.group == group and one.live.target:
        found = _live_clue(one.live, name)
    else:
        found = m.Clue()
    if one.sent is None:
        return found
    kept = _sent_clue(one.sent, name, group, source)
    if not found.boxes:
        return kept
    # Both ends in one process: the trainer's half and the server's half would be one clue.
    return m.Clue(boxes=found.boxes, shape=found.shape, why="this rank is a trainer rank and a server rank")


def _live_clue(record: Record, name: str) -> m.Clue:
    pieces = live_pieces(record, name)
    if not pieces:
        return m.Clue()
    own = [piece.box for piece in pieces]
    former = record.former
    elsewhere = {}
    for group, facts in sorted(record.groups.items())[:MAX_GROUPS]:
        boxes = facts[name].boxes if name in facts and not facts[name].why_arrived else ()
        if group != record.group and [box.sizes for box in boxes] == [box.sizes for box in own]:
            moved = [Piece(p.spec, box, p.tensor) for p, box in zip(pieces, boxes, strict=True)]
            elsewhere[group] = _digest(moved, record.seed)
    return m.Clue(
        former=former.version if former else None,
        former_sums=_digest(pieces, former.seed) if former else (0, 0),
        elsewhere=elsewhere,
        boxes=[_span(box) for box in own],
        shape=list(pieces[0].spec.shape),
    )


def _sent_clue(record: Record, name: str, group: int, source: Layout | None) -> m.Clue:
    former = record.former
    rows = record.ledger.rows(name, group)
    now, why = None, ""
    try:
        now = _digest(sent_pieces(record, name, group, source), record.seed)
        if now != total(_lanes(record.sums[row]) for row, _ in rows):
            now, why = None, "the source has moved on"
    except Exception as error:
        why = f"the source can't be digested: {type(error).__name__}: {error}"
    return m.Clue(
        former=former.version if former else None,
        former_sums=total(_lanes(former.sums[row]) for row, _ in rows) if former else (0, 0),
        elsewhere={
            other: total(_lanes(record.sums[row]) for row, _ in record.ledger.rows(name, other))
            for other in record.ledger.groups[:MAX_GROUPS]
        },
        now=now,
        why=why,
    )


def live_pieces(record: Record, name: str) -> list[Piece]:
    """What a server rank holds live of a wire tensor."""
    if record.target is None or name not in record.target.specs:
        return []
    spec = record.target.specs[name]
    return [Piece(spec, box, view) for box, view in record.target.live(name) if box.volume]


def sent_pieces(record: Record, name: str, group: int, source: Layout | None) -> list[Piece]:
    """What a trainer rank sent of a tensor to a group, as its source holds it now.

    Raises UpdateError where the source's boxes are not those of then.
    """
    found = []
    for _, entry in record.ledger.rows(name, group):
        held = source.parts.get(name, ()) if source else ()
        part = next((part for part in held if part.box.intersect(entry.part.box) == entry.part.box), None)
        if part is None:
            raise UpdateError(f"{name}: no box of the source holds {entry.part.box} any more")
        box = entry.part.box
        found.append(Piece(entry.part.spec, box, part.tensor[box.within(part.box)]))
    return found


def answer(evidence: Sequence[Evidence], question: m.Question, source: Layout | None) -> list[Lanes]:
    """Sums of each of a question's boxes, as far as it lies in what this rank sent or holds."""
    one = evidence[question.job]
    record = one.sent if question.sent else one.live
    if record is None:
        raise UpdateError(f"{question.tensor}: this rank has no record of version's job {question.job}")
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
    return [total(_lanes(next(rows)) for _ in pieces) for pieces in cut]


def _within(pieces: Sequence[Piece], box: Box) -> list[Piece]:
    return [
        Piece(piece.spec, inner, piece.tensor[inner.within(piece.box)])
        for piece in pieces
        if (inner := piece.box.intersect(box)) is not None
    ]


def _digest(pieces: Sequence[Piece], seed: bytes) -> Lanes:
    sums = []
    for piece in pieces:
        tensor = piece.tensor.to(torch_dtype(piece.spec.dtype))
        part = Part(spec=piece.spec, box=piece.box, tensor=tensor)
        sums += Digester([part]).sums(seed).tolist()
    return total(map(_lanes, sums))


def _lanes(row: Sequence[int]) -> Lanes:
    return int(row[0]), int(row[1])


def _span(box: Box) -> m.Span:
    return m.Span(offsets=list(box.offsets), sizes=list(box.sizes))
