"""The hub's judgement of digests: which tensors are wrong, on which server ranks, where and in what way.

All of it follows from comparing sums (docs/digest.md). What a wrong tensor is said to be (``Damage``) is
what its sums were found equal to, never a guess from values: the hub sees none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weightbus.control import messages as m
from weightbus.hub.compare import Pair, name_held, sums_text, total, whose
from weightbus.planning.box import Box
from weightbus.planning.narrow import Search


@dataclass(slots=True, kw_only=True)
class Finding:
    """A tensor that is wrong on one server rank, and what is known of it.

    suspect: job, group and tensor. witnesses: peers that hold the right bytes; source: they are the
    trainer ranks.
    """

    peer: str
    suspect: tuple[int, int, str]
    expected: Pair | None
    got: Pair | None
    kind: m.Damage = ""
    notes: list[str] = field(default_factory=list)
    where: str = ""
    box: Box | None = None
    shape: tuple[int, ...] = ()
    search: Search | None = None
    witnesses: tuple[str, ...] = ()
    source: bool = False

    def settle(self, kind: m.Damage, note: str) -> None:
        if not self.kind:
            self.kind = kind
            self.notes.append(note)


class Inquiry:
    """All findings of a round, from the first sums of single tensors to where they differ."""

    def __init__(self, members: Mapping[str, m.Member], dones: Mapping[str, m.Done]) -> None:
        self._members, self._dones = members, dones
        self._held: list[m.Failure] = []
        self._findings: list[Finding] = []
        self._matching: dict[tuple[int, int, str], list[str]] = {}
        self._suspects: list[tuple[int, int, str]] = []
        self._asked: dict[str, list[tuple[Finding, bool]]] = {}

    def named(self, answers: Mapping[str, m.Sums]) -> None:
        """Take the sums of single tensors, where folds differ."""
        self._held = name_held(self._members, answers)
        expected: dict[tuple[int, int], dict[str, Pair]] = {}
        for answer in answers.values():
            for sums in answer.sent:
                sent = expected.setdefault((sums.job, sums.group), {})
                for name, pair in sums.sums.items():
                    sent[name] = total((sent.get(name, (0, 0)), pair))
        held: dict[tuple[int, int, str], dict[str, Pair | None]] = {}
        for peer, answer in answers.items():
            for sums in answer.live:
                for name in sorted(expected.get((sums.job, sums.group), {}).keys() | sums.sums.keys()):
                    suspect = sums.job, sums.group, name
                    held.setdefault(suspect, {})[peer] = sums.sums.get(name)
        for (job, group, name), peers in held.items():
            right = expected.get((job, group), {}).get(name)
            self._matching[job, group, name] = [peer for peer, got in peers.items() if got == right]
            for peer, got in peers.items():
                if got != right:
                    suspect = job, group, name
                    self._findings.append(Finding(peer=peer, suspect=suspect, expected=right, got=got))
        order = {peer: rank for rank, peer in enumerate(self._members)}
        self._findings.sort(key=lambda finding: (order[finding.peer], finding.suspect))
        wrong = {(finding.peer, finding.suspect) for finding in self._findings}
        names: dict[tuple[int, int, Pair], list[str]] = {}
        for (job, group), sums_of in expected.items():
            for name, pair in sums_of.items():
                names.setdefault((job, group, pair), []).append(name)
        for finding in self._findings:
            job, group, name = finding.suspect
            if not (finding.expected and finding.got):
                continue
            if owner := whose(self._members, answers, (group, name), finding.expected, finding.got):
                finding.notes.append(f"{owner} has the same bytes")
                continue
            if finding.got == (0, 0):
                finding.settle("zeros", "its bytes are zeros, of which the digest is zero")
            elif others := names.get((job, group, finding.got)):
                # Rather one that is wrong too: the two have changed places.
                other = min(others, key=lambda n: ((finding.peer, (job, group, n)) not in wrong, n))
                finding.settle("swapped", f"its digest is the one expected of {other}")
            self._compare_replicas(finding, held[finding.suspect])

    def _compare_replicas(self, finding: Finding, peers: Mapping[str, Pair | None]) -> None:
        """Other server ranks that want the same boxes: one that is right, one that is wrong alike."""
        alike = [peer for peer, got in peers.items() if got == finding.got and peer != finding.peer]
        if matching := self._matching[finding.suspect]:
            finding.notes.append(f"{self._members[matching[0]].server} has the right bytes")
        if alike:
            finding.notes.append(f"{self._members[alike[0]].server} has the same wrong ones")

    # -- what each wrong tensor is -----------------------------------------------------------------

    def suspects(self) -> list[m.Suspect]:
        """Tensors of which members shall say what they know."""
        found = (finding.suspect for finding in self._findings if finding.expected and finding.got)
        self._suspects = list(dict.fromkeys(found))[: m.MAX_SUSPECTS]
        return [m.Suspect(job=job, group=group, tensor=tensor) for job, group, tensor in self._suspects]

    def hear(self, answers: Mapping[str, m.Clues]) -> None:
        """Take what members know of the suspects."""
        trainers = [peer for peer, member in self._members.items() if member.trainer is not None]
        findings: dict[tuple[int, int, str], list[Finding]] = {}
        for finding in self._findings:
            findings.setdefault(finding.suspect, []).append(finding)
        for index, suspect in enumerate(self._suspects):
            clues = {p: a.clues[index] for p, a in answers.items() if index < len(a.clues)}
            sent = [clue.sent for p in trainers if (clue := clues.get(p)) and clue.sent]
            kept = sent if len(sent) == len(trainers) else []
            for finding in findings[suspect]:
                if (own := clues.get(finding.peer)) and own.live:
                    self._identify(finding, own.live, kept)
                    self._prepare(finding, own.live, kept, trainers)

    def _identify(self, finding: Finding, own: m.LiveClue, kept: Sequence[m.SentClue]) -> None:
        """Is it a former version, or another rank's shard? kept: of all trainer ranks, or none."""
        same_former = {clue.former for clue in kept} == {own.former} and own.former is not None
        if same_former and total(clue.former_sums for clue in kept) == own.former_sums:
            note = f"under the seed of version {own.former} its digest is that version's"
            finding.settle("stale", note)
        for group, sums in sorted(own.elsewhere.items()):
            if any(sums) and sums == total(clue.elsewhere.get(group, (0, 0)) for clue in kept):
                owner = self._owner(finding.suspect[0], group)
                finding.settle("other shard", f"taken for the shard of {owner}, its digest is that shard's")

    def _owner(self, job: int, group: int) -> str:
        for peer, done in self._dones.items():
            if any((fold.job, fold.group) == (job, group) for fold in done.live):
                return str(self._members[peer].server)
        return "another rank"

    def _prepare(
        self, finding: Finding, own: m.LiveClue, kept: Sequence[m.SentClue], trainers: Sequence[str]
    ) -> None:
        """Choose whom to compare with, if there is more to be found out."""
        if own.box is None:
            finding.where = "not narrowed, as it can't be digested where it lives"
            return
        finding.shape, finding.box = tuple(own.shape), _box(own.box)
        if own.pieces > m.MAX_BOXES:
            finding.where = f"not narrowed, as it lies in {own.pieces} pieces"
        elif finding.kind:
            finding.where = f"all of its shard, {_place(finding.box, finding.shape)}"
        if finding.where:
            return
        now = [clue.now for clue in kept if clue.now is not None]
        if len(now) == len(trainers) and total(now) == finding.expected:
            finding.witnesses, finding.source = tuple(trainers), True
        elif matching := self._matching[finding.suspect]:
            finding.witnesses = (matching[0],)
        else:
            why = next((clue.why for clue in kept if clue.why), "the source has moved on")
            finding.where = f"not narrowed: {why}, and no replica has the right bytes"
            return
        finding.search = Search.within(finding.box)

    # -- where it differs --------------------------------------------------------------------------

    def questions(self) -> dict[str, list[m.Question]]:
        """For each peer that is asked, the sums of which boxes; nothing at the end."""
        self._asked = {}
        asked: dict[str, list[m.Question]] = {}
        searching = [(finding, finding.search) for finding in self._findings if finding.search]
        for finding, _ in searching[m.MAX_NARROWED :]:
            finding.where = f"not narrowed, as {m.MAX_NARROWED} others were"
            finding.search = None
        for finding, search in searching[: m.MAX_NARROWED]:
            boxes = search.boxes()
            if not boxes:
                _conclude(finding, search)
                continue
            spans = [_span(box) for box in boxes]
            job, group, tensor = finding.suspect
            sides = [(peer, True, finding.source) for peer in finding.witnesses]
            for peer, right, sent in [*sides, (finding.peer, False, False)]:
                question = m.Question(job=job, group=group, tensor=tensor, sent=sent, boxes=spans)
                asked.setdefault(peer, []).append(question)
                self._asked.setdefault(peer, []).append((finding, right))
        return asked

    def compare(self, answers: Mapping[str, m.Probed]) -> None:
        """Take the answers of all that were asked."""
        sides: dict[int, tuple[list[list[Pair]], list[list[Pair]]]] = {}
        findings = {}
        for peer, asked in self._asked.items():
            answer = answers.get(peer)
            for index, (finding, right) in enumerate(asked):
                findings[id(finding)] = finding
                if answer is None or answer.error or index >= len(answer.sums):
                    why = answer.error if answer else "no answer"
                    finding.where = f"not narrowed further: {self._members[peer]}: {why}"
                    finding.search = None
                else:
                    sides.setdefault(id(finding), ([], []))[not right].append(answer.sums[index])
        for key, (right_sums, live) in sides.items():
            finding = findings[key]
            if finding.search:
                added = [total(column) for column in zip(*right_sums, strict=False)]
                if len(added) == len(live[0]):
                    finding.search.compared(added, live[0])
                else:
                    finding.where, finding.search = "not narrowed further: answers of unequal length", None

    # -- the end -----------------------------------------------------------------------------------

    def failures(self) -> list[m.Failure]:
        """All that is wrong, in the order of group ranks; trainer ranks that differ come first."""
        found = []
        for finding in self._findings:
            if finding.search:
                _conclude(finding, finding.search)
            reason = f"expected digest {sums_text(finding.expected)}, got {sums_text(finding.got)}"
            box = finding.box
            found.append(
                m.Failure(
                    rank=str(self._members[finding.peer]),
                    tensor=finding.suspect[2],
                    reason="; ".join([reason, *finding.notes]),
                    kind=finding.kind,
                    where=finding.where or "not looked into",
                    box=_span(box) if box else None,
                )
            )
        for peer in self._members:
            for wrong in self._dones[peer].wrong if peer in self._dones else ():
                found.append(
                    m.Failure(
                        rank=str(self._members[peer]),
                        tensor=wrong.name,
                        reason=wrong.reason,
                        kind=wrong.kind,
                        where=f"wrong within {_box(wrong.box)}",
                        box=wrong.box,
                    )
                )
        return self._held + found + self.replicas()

    def replicas(self) -> list[m.Failure]:
        """Parameters that no wire tensor's digest tells of, where they differ between replicas."""
        sizes: dict[int, int] = {}
        for member in self._members.values():
            if member.server:
                sizes[member.server.replica] = sizes.get(member.server.replica, 0) + 1
        held: dict[tuple[int, int, int, str], dict[str, Pair]] = {}
        for peer, member in self._members.items():
            if (server := member.server) is None or peer not in self._dones:
                continue
            for sums in self._dones[peer].hidden:
                for name, pair in sums.sums.items():
                    place = sums.job, sizes[server.replica], server.rank, name
                    held.setdefault(place, {})[peer] = pair
        found = []
        for (_, _, _, name), peers in held.items():
            for peer, pair in peers.items():
                other = next((p for p, sums in peers.items() if sums != pair), None)
                if other is not None:
                    there = f"on {self._members[other].server} {sums_text(peers[other])}"
                    reason = (
                        f"digest {sums_text(pair)}, {there}; which is right is not known, as loading code that "
                        f"can't be traced writes it"
                    )
                    found.append(
                        m.Failure(
                            rank=str(self._members[peer]), tensor=name, reason=reason, kind="replicas differ"
                        )
                    )
        return found


def _conclude(finding: Finding, search: Search) -> None:
    """Say what a search has come to."""
    finding.search = None
    if search.lost:
        finding.where = "not narrowed: no part of it differs any more, so it has changed meanwhile"
        return
    finding.box = search.box
    place = _place(search.box, finding.shape)
    if search.grid is None:
        finding.where = f"within {place}, after {search.rounds} rounds"
        return
    parts, wrong = search.grid
    unit = "elements" if parts == search.box.volume else "parts"
    many = "nothing else differs" if parts == 1 else f"{wrong} of its {parts} {unit} differ, nothing else does"
    if search.zeros:
        finding.kind, many = "zeros", f"its digest there is zero; {many}"
    else:
        finding.kind = "element" if parts == 1 else "block" if wrong == parts else "scattered"
    finding.where = f"{place}: {many}"


def _place(box: Box, shape: Sequence[int]) -> str:
    """A box in words: rows and columns of a matrix."""
    if not box.sizes:
        return "its only element"
    names = {1: ["element"], 2: ["row", "column"]}.get(len(box.sizes))
    if names is None:
        return f"{box} of {list(shape)}"
    spans = zip(names, box.offsets, box.ends, strict=True)
    words = [f"{n} {low}" if end - low == 1 else f"{n}s {low}:{end}" for n, low, end in spans]
    return f"{', '.join(words)} of {list(shape)}"


def _box(span: m.Span) -> Box:
    return Box(tuple(span.offsets), tuple(span.sizes))


def _span(box: Box) -> m.Span:
    return m.Span(offsets=list(box.offsets), sizes=list(box.sizes))
