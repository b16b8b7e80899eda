"""What follows each phase of a round, once all who were asked have answered.

    phase     expected from      answer      when all have answered
    ENTER     trainer ranks      Enter       offer: fix members and epoch; go on as planned or survey
    SOURCES   trainer ranks      Facts       relay all sources to every member
    WANTS     server ranks       Facts       relay all wants to every member
    READY     members            Ready       go, if all computed the same plan and trainer ranks hold the same
    COMPARE   members            Sums        name the tensors that they hold differently, and refuse
    RUN       members            Done        judge: compare folded sums
    DETAIL    members            Sums        name the tensors whose sums differ, and look into them
    CLUES     members            Clues       see what they are; ask for sums of boxes
    NARROW    those asked        Probed      ask for sums of smaller boxes, or end

A step sends nothing: it says what to send and whom to wait for, or how the round ends. The first one, the
offer, is the coordinator's.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from weightbus.control import messages as m
from weightbus.hub.catch_up import CatchUp
from weightbus.hub.compare import compare_folds, compare_held, name_held, right_places
from weightbus.hub.diagnosis import Inquiry
from weightbus.hub.recovery import Rebuilt
from weightbus.hub.round import Phase, Round

# Looking into wrong tensors ends after this time, with what has been found out.
INQUIRY_S = 20.0

# A rank whose transfer has stalled says so, and whom it can't reach, within so long after ``m.REACH_S``.
SAY_S = 0.4

Answer = TypeVar("Answer", bound=m.Message)
Sent = list[tuple[Collection[str], m.Message]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Next:
    """The round goes on: send ``messages``, each to its peers; then ``expected`` answer by ``deadline``."""

    phase: Phase
    expected: Collection[str]
    deadline: float
    messages: Sent


@dataclass(frozen=True, slots=True)
class End:
    """The round ends. failed: by the failures that it has noted."""

    verdict: m.Word


class Steps:
    """The table of steps. plans: that all members of this epoch have; another epoch has others."""

    def __init__(self, catch_up: CatchUp, rebuilt: Rebuilt) -> None:
        self._catch_up, self._rebuilt = catch_up, rebuilt
        self.plans: set[str] = set()
        self.after: dict[Phase, Callable[[Round, float], Next | End]] = {
            Phase.SOURCES: self.relay_sources,
            Phase.WANTS: self.relay_wants,
            Phase.READY: self.go,
            Phase.COMPARE: self.refuse_held,
            Phase.RUN: self.judge,
            Phase.DETAIL: self.name_tensors,
            Phase.CLUES: self.hear,
            Phase.NARROW: self.narrow,
        }

    def survey(self, round: Round, messages: Sent, now: float) -> Next:
        """Send ``messages``, and ask what trainer ranks hold."""
        trainers = [peer for peer, member in round.members.items() if member.trainer is not None]
        deadline = now + round.enter.ready_s
        return Next(phase=Phase.SOURCES, expected=trainers, deadline=deadline, messages=messages)

    def relay_sources(self, round: Round, now: float) -> Next:
        servers = [peer for peer, member in round.members.items() if member.server is not None]
        gathered = _gathered(round, "sources")
        return _to_all(round, gathered, Phase.WANTS, now + round.enter.ready_s, servers)

    def relay_wants(self, round: Round, now: float) -> Next | End:
        gathered = _gathered(round, "wants")
        facts = _answers(round, m.Facts)
        if round.pairing is not None:
            round.wants = {id: answer.wants_id for id, answer in facts.items()}
            for id in self._catch_up.unknown(round.wants):
                reason = "holds other boxes than any that were proved in this version: it takes the next one"
                round.note(str(round.members[id]), reason, now)
            if round.failures:
                return End("failed")
        elif round.offer is not None:
            ids = list(round.members)
            groups = {group: facts[ids[rank]].wants_id for rank, group in gathered.holder.items()}
            self._catch_up.surveyed(round.offer.plan, groups)
        return _to_all(round, gathered, Phase.READY, now + round.enter.ready_s)

    def go(self, round: Round, now: float) -> Next | End:
        assert round.offer is not None  # noqa: S101 - READY comes after it
        plans: dict[str, str] = {}
        stale = False
        for peer, answer in round.answers.items():
            assert isinstance(answer, m.Ready)  # noqa: S101 - a refusal has ended the round
            stale |= answer.stale
            plans.setdefault(answer.plan, str(round.members[peer]))
        if stale:
            self.plans.discard(round.offer.plan)
            round.offer = msgspec.structs.replace(round.offer, planned=False)
            offer = msgspec.structs.replace(round.offer, members=[])
            return self.survey(round, [(round.members, offer)], now)
        if len(plans) > 1:
            reason = "plans differ: " + ", ".join(f"{plan} on {who}" for plan, who in plans.items())
            round.note("all ranks", reason, now)
            return End("failed")
        held = {peer: ready.held for peer, ready in _answers(round, m.Ready).items()}
        differ, complaints = compare_held(round.members, held)
        for member, text in complaints:
            round.note(str(member), text, now)
        if differ:
            detail = m.Detail(groups=[], held=differ)
            return _to_all(round, detail, Phase.COMPARE, now + round.enter.ready_s)
        if complaints:
            return End("failed")
        messages: Sent
        if round.pairing is not None:
            (committed,) = round.enter.jobs
            groups = {id: self._catch_up.group(wants) for id, wants in round.wants.items()}
            messages = [([id], m.Go(seed=committed.seed, group=groups.get(id, 0))) for id in round.members]
        else:
            self.plans.add(round.offer.plan)
            round.seed = secrets.token_bytes(32)
            self._rebuilt.drawn(round.seed)
            messages = [(round.members, m.Go(seed=round.seed))]
        round.run_by = now + round.enter.transfer_s
        deadline = round.run_by + m.REACH_S + SAY_S
        return Next(phase=Phase.RUN, expected=round.members, deadline=deadline, messages=messages)

    def refuse_held(self, round: Round, now: float) -> End:
        round.failures += name_held(round.members, _answers(round, m.Sums))
        if not round.failures:
            round.note("trainer ranks", "what they hold differed, and then did not: it changes meanwhile", now)
        return End("failed")

    def judge(self, round: Round, now: float) -> Next | End:
        dones = round.dones = _answers(round, m.Done)
        if not round.enter.verify:
            return End("unverified")
        wrong, complaints = compare_folds(round.members, dones, max(1, len(round.enter.jobs)))
        if round.pairing is not None:
            for id, why in self._catch_up.wrong(round.wants, dones).items():
                complaints.append((round.members[id], why))
        differ, more = compare_held(round.members, {peer: done.held for peer, done in dones.items()})
        for member, text in complaints + more:
            round.note(str(member), text, now)
        if complaints or more:
            return End("failed")
        round.inquiry = Inquiry(round.members, dones)
        if not (wrong or differ or round.inquiry.failures()):
            return End("partial" if any(done.partial for done in dones.values()) else "verified")
        if not (differ or round.inquiry.replicas()):
            round.right = right_places(round.members, dones)
        if wrong or differ:
            detail = m.Detail(groups=wrong, held=differ)
            return _to_all(round, detail, Phase.DETAIL, now + round.enter.transfer_s)
        return End("mismatch")

    def name_tensors(self, round: Round, now: float) -> Next | End:
        round.inquiry.named(_answers(round, m.Sums))
        suspects = round.inquiry.suspects()
        if not suspects:
            return End("mismatch")
        deadline = now + min(INQUIRY_S, round.enter.transfer_s)
        return _to_all(round, m.Suspects(suspects=suspects), Phase.CLUES, deadline)

    def hear(self, round: Round, now: float) -> Next | End:
        round.inquiry.hear(_answers(round, m.Clues))
        return self._ask(round)

    def narrow(self, round: Round, now: float) -> Next | End:
        round.inquiry.compare(_answers(round, m.Probed))
        return self._ask(round)

    def _ask(self, round: Round) -> Next | End:
        """The next boxes; all that are asked for, one after the other, end at the deadline of the first."""
        asked = round.inquiry.questions()
        if not asked:
            return End("mismatch")
        messages: Sent = [([peer], m.Probe(questions=questions)) for peer, questions in asked.items()]
        return Next(phase=Phase.NARROW, expected=asked, deadline=round.deadline, messages=messages)


def _to_all(
    round: Round, message: m.Message, phase: Phase, deadline: float, expected: Collection[str] | None = None
) -> Next:
    """expected: all members by default."""
    expected = round.members if expected is None else expected
    return Next(phase=phase, expected=expected, deadline=deadline, messages=[(round.members, message)])


def _answers(round: Round, kind: type[Answer]) -> dict[str, Answer]:
    return {peer: answer for peer, answer in round.answers.items() if isinstance(answer, kind)}


def _gathered(round: Round, of: m.FactsOf) -> m.Gathered:
    """Replicas want the same, so each distinct blob travels once."""
    blobs: dict[bytes, int] = {}
    holder, memory = {}, {}
    for rank, peer in enumerate(round.members):
        answer = round.answers.get(peer)
        if isinstance(answer, m.Facts):
            holder[rank] = blobs.setdefault(answer.blob, len(blobs))
            memory[rank] = answer.memory
    return m.Gathered(of=of, blobs=list(blobs), holder=holder, memory=memory)
