"""The hub's decisions, apart from sockets: who takes part, what comes next, one outcome for all.

``Coordinator`` is fed messages and the time, and leaves its answers in ``outbox``. An update or a
check is one round, and a round is this table: in each phase every expected peer answers once, and
when all have, the step on the right starts the next phase.

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

A refusal, a death or a deadline ends the round in any phase. Before RUN no byte has moved; after DETAIL the
verdict stands, and such an end only leaves it less telling. A check and a label, which says as what version
the live weights count, go from ENTER straight to RUN.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

import msgspec

from weightbus import messages as m
from weightbus.asks import Past
from weightbus.judge import Inquiry, compare_folds, compare_held, name_held
from weightbus.rebuild import Rebuilt, last_epoch, last_version, past_of
from weightbus.requests import Requests
from weightbus.roster import LISTED, Peer, Roster
from weightbus.spec import fingerprint
from weightbus.tasks import Tasks

log = logging.getLogger("weightbus.hub")

# Once one member has failed, the others may still say within this time what they know of it.
GRACE_S = 1.0

# Looking into wrong tensors ends after this time, with what has been found out.
INQUIRY_S = 20.0

# Of one round so many are noted, whoever says them how often.
MAX_FAILURES = 1000

# A label may lie so far above the last committed version: one that leaves no room would end all updates.
MAX_LEAP = 1 << 40

# How many rounds that have ended are remembered.
PAST_ROUNDS = 16


class Phase(Enum):
    ENTER = auto()
    SOURCES = auto()
    WANTS = auto()
    READY = auto()
    COMPARE = auto()
    RUN = auto()
    DETAIL = auto()
    CLUES = auto()
    NARROW = auto()


# Bytes may have been written; the verdict is known.
MOVED = (Phase.RUN, Phase.DETAIL, Phase.CLUES, Phase.NARROW)
NAMED = (Phase.CLUES, Phase.NARROW)

ANSWERS: dict[Phase, tuple[type[m.Message], ...]] = {
    Phase.ENTER: (m.Enter,),
    Phase.SOURCES: (m.Facts, m.Refuse),
    Phase.WANTS: (m.Facts, m.Refuse),
    Phase.READY: (m.Ready, m.Refuse),
    Phase.COMPARE: (m.Sums,),
    Phase.RUN: (m.Done,),
    Phase.DETAIL: (m.Sums,),
    Phase.CLUES: (m.Clues,),
    Phase.NARROW: (m.Probed,),
}


@dataclass(slots=True, kw_only=True)
class Round:
    """One update or check in progress."""

    update: int
    started: float
    deadline: float
    enter: m.Enter
    header: m.Header
    phase: Phase = Phase.ENTER
    expected: set[str] = field(default_factory=set)
    answers: dict[str, m.Message] = field(default_factory=dict)
    failures: list[m.Failure] = field(default_factory=list)
    offer: m.Offer | None = None
    members: dict[str, m.Member] = field(default_factory=dict)
    dones: dict[str, m.Done] = field(default_factory=dict)
    inquiry: Inquiry | None = None
    seed: bytes | None = None
    # Trainer ranks that have called for it, and members that follow it no more.
    calls: set[str] = field(default_factory=set)
    given_up: set[str] = field(default_factory=set)
    # When each phase began, and when each member answered it, for the timeline.
    phases: dict[str, float] = field(default_factory=dict)
    answered: dict[tuple[str, Phase], float] = field(default_factory=dict)


class Coordinator:
    """State of the hub: the roster, the epoch, and at most one round."""

    def __init__(self, *, dead_after_s: float, job: str = "") -> None:
        self.job = job
        self.roster = Roster(dead_after_s=dead_after_s)
        self.outbox: list[tuple[str, m.Message]] = []
        self.epoch = 0
        self.round: Round | None = None
        # Another hub's rounds, of which messages may still be under way, had other numbers.
        self._updates = secrets.randbits(40)
        self._group: tuple[str, ...] = ()
        self._members: frozenset[str] = frozenset()
        self._group_token = ""
        self._introduced = False
        self._broken = False
        self._planned: set[str] = set()
        self.committed = -1
        self._versions_of = 0  # incarnation
        self.paused_until = 0.0
        self.requests = Requests()
        self.tasks = Tasks(self.roster, self.outbox, self._number, self.header)
        self._past: deque[tuple[Round, m.Outcome, float]] = deque(maxlen=PAST_ROUNDS)
        self._rebuilt = Rebuilt()
        self._now = 0.0
        self._early: dict[str, tuple[float, m.Enter]] = {}
        self._steps: dict[Phase, Callable[[Round, float], None]] = {
            Phase.ENTER: self._offer,
            Phase.SOURCES: self._relay_sources,
            Phase.WANTS: self._relay_wants,
            Phase.READY: self._go,
            Phase.COMPARE: self._refuse_held,
            Phase.RUN: self._judge,
            Phase.DETAIL: self._name_tensors,
            Phase.CLUES: self._hear,
            Phase.NARROW: self._narrow,
        }

    # -- what comes in -----------------------------------------------------------------------------

    def joined(self, peer: Peer, now: float) -> None:
        """A peer has come, perhaps from an earlier hub: what it knows of before is taken over."""
        if peer.held is not None and not self.roster.is_early(peer):
            self._believe(last_version(self.roster, peer))
        self.outbox += self._rebuilt.joined(peer, self.roster, self.job)
        self.advance(now)

    def enter(self, message: m.Enter, now: float) -> None:
        """A trainer rank calls ``update`` or ``check``: the first one opens the round."""
        peer = self.roster.peers[message.peer]
        if self.roster.is_early(peer):
            deadline, _ = self._early.get(peer.id, (now + self.roster.dead_after_s, message))
            self._early[peer.id] = deadline, message
            return
        if self.round is None:
            deadline = now + message.join_s
            number = self._number()
            self.round = Round(
                update=number, started=now, deadline=deadline, enter=message, header=self.header(number)
            )
        round = self.round
        if round.phase is not Phase.ENTER:
            self._refuse_enter(message, f"update {round.update} is still going on")
            return
        if message.refusal:
            self._note(round, str(peer), message.refusal, now)
        elif difference := _differs(round.enter, message):
            self._note(round, str(peer), f"{difference} as on the first rank that called", now)
        if message.kind == "update" and message.version <= self.floor:
            reason = f"version {message.version}: expected one above {self.floor}, the last committed"
            self._note(round, str(peer), reason, now)
        round.answers[message.peer] = message
        self.advance(now)

    @property
    def floor(self) -> int:
        """The last version of the start of the trainer that counts; another one's bind it to nothing."""
        return self.committed if self._versions_of == self.roster.incarnation else -1

    def _believe(self, version: int) -> None:
        if version > self.floor:
            self.committed, self._versions_of = version, self.roster.incarnation

    def is_current(self, message: m.Message) -> bool:
        """Whether it is of the round or the task that is going on."""
        headers = [going.header for going in self.tasks.running]
        if self.round is not None:
            headers.append(self.round.header)
        return message.header in headers

    def is_in_group(self, peer: str) -> bool:
        """Whether it is a member of this epoch."""
        return peer in self._members

    def expects(self, peer: str) -> bool:
        """Whether the round or a task waits for an answer of this peer's."""
        round = self.round
        in_round = round is not None and peer in round.expected and peer not in round.answers
        return in_round or any(going.member(peer) for going in self.tasks.running)

    def unfit_version(self, version: int) -> str:
        """Why the live weights can't be labelled so; empty if they can."""
        limit = max(self.floor, 0) + MAX_LEAP
        return f"version: expected at most {limit}, got {version}" if version > limit else ""

    def answer(
        self, message: m.Facts | m.Ready | m.Refuse | m.Done | m.Sums | m.Clues | m.Probed, now: float
    ) -> bool:
        """A member's answer; False if it is of no use any more (late, repeated, out of turn)."""
        if self.tasks.answer(message, now):
            self.advance(now)
            return True
        round = self.round
        if isinstance(message, m.Refuse) and self._gives_up(message, now):
            return True
        if round is None or message.header != round.header or message.peer not in round.expected:
            return False
        if message.peer in round.answers or not isinstance(message, ANSWERS[round.phase]):
            return False
        round.answers[message.peer] = message
        round.answered[message.peer, round.phase] = now
        reason = message.reason if isinstance(message, m.Refuse) else getattr(message, "error", "")
        if reason and not isinstance(message, m.Probed):
            self._note(round, str(round.members[message.peer]), reason, now)
        self.advance(now)
        return True

    def _gives_up(self, refuse: m.Refuse, now: float) -> bool:
        """A rank follows the round no more, in whichever phase, or before it has heard the offer."""
        if not refuse.update and (early := self._early.pop(refuse.peer, None)):
            self._refuse_enter(early[1], refuse.reason)
            return True
        round = self.round
        if round is None:
            return False
        called = not refuse.update and refuse.peer in (round.answers if round.offer is None else round.calls)
        if not called and (refuse.header != round.header or refuse.peer not in round.members):
            return False
        if refuse.peer in round.given_up:
            return False
        round.given_up.add(refuse.peer)
        member = round.members.get(refuse.peer) or self.roster.peers[refuse.peer].member()
        self._note(round, str(member), refuse.reason, now)
        if round.phase is not Phase.ENTER and refuse.peer in round.expected:
            round.answers[refuse.peer] = refuse
        self.advance(now)
        return True

    def lost(self, peer: Peer, reason: str, now: float) -> None:
        """A peer left or died; it is no longer in the roster."""
        self.roster.review()
        self._rebuilt.left(peer)
        self.tasks.lost(peer, reason, now)
        round = self.round
        if round is not None and peer.id in (round.members or round.answers):
            round.answers.pop(peer.id, None)
            round.expected.discard(peer.id)
            self._note(round, str(peer), reason, now)
        if peer.trainer:
            self.requests.forget_polls()
        if peer.trainer and not self.roster.has_trainers:
            self._send(self.roster.peers, m.Farewell(), self.header())
        self.advance(now)

    def advance(self, now: float) -> None:
        """Take the next step if all have answered, or end the round if its time is over."""
        self._now = now
        self._admit_early(now)
        self._advance_tasks(now)
        round = self.round
        if round is None:
            return
        try:
            self._advance(round, now)
        except Exception as error:
            # An answer that makes no sense, or a fault of the hub's own, ends the round, and nothing else.
            log.exception("round %d can't go on", round.update)
            if self.round is round:
                reason = f"{type(error).__name__} in phase {round.phase.name}: {error}"[:1000]
                round.failures.append(m.Failure(rank="hub", tensor=None, reason=reason))
                self._end(round, "failed", now)

    def _advance_tasks(self, now: float) -> None:
        try:
            self.tasks.advance(now, free=self._is_free(now))
        except Exception as error:
            log.exception("a task can't go on")
            self.tasks.break_off(f"{type(error).__name__} in the hub: {error}"[:1000], now)

    def _is_free(self, now: float) -> bool:
        """Whether a task may start: no update is going on, or waits for nothing but tasks."""
        round = self.round
        if round is None:
            return True
        return round.phase is Phase.ENTER and (self._is_paused(round, now) or not self._can_start(round))

    def _can_start(self, round: Round) -> bool:
        return self.roster.can_start(round.answers, round.enter.min_replicas)

    def _is_paused(self, round: Round, now: float) -> bool:
        return now < self.paused_until and round.enter.kind == "update"

    def _advance(self, round: Round, now: float) -> None:
        if round.phase is Phase.ENTER and now < round.deadline and not self._can_start(round):
            return
        if round.phase is not Phase.ENTER and len(round.answers) < len(round.expected) and now < round.deadline:
            return
        missing = self.missing(now)
        if not missing:
            if round.failures:
                self._fail(round, now)
            else:
                self._steps[round.phase](round, now)
        elif now >= round.deadline:
            if not round.failures and round.phase not in NAMED:
                waited = now - round.started
                for line in missing:
                    rank, _, reason = line.partition(": ")
                    reason = f"{reason}; waited {waited:.1f} s"
                    round.failures.append(m.Failure(rank=rank, tensor=None, reason=reason))
            self._fail(round, now)

    def _admit_early(self, now: float) -> None:
        """Calls of ranks whose start has taken over; those of others are refused once it is clear that an older
        start goes on: a rank of it that has died has been dropped by then."""
        if not self._early:
            return
        early, self._early = self._early, {}
        for deadline, enter in early.values():
            peer = self.roster.peers.get(enter.peer)
            if peer is None:
                continue
            if not self.roster.is_early(peer):
                self.enter(enter, now)
            elif now < deadline:
                self._early[enter.peer] = deadline, enter
            else:
                some = sorted(self.roster.trainers().items())[:LISTED]
                others = ", ".join(str(other) for _, other in some)
                self._refuse_enter(
                    enter,
                    f"it is of another start of the job than {others}, which goes on; expected those processes"
                    " to end first, or another job= for this one",
                )

    def missing(self, now: float) -> list[str]:
        """What the round waits for, a line each: *rank: what it has not done*."""
        round = self.round
        if round is None:
            return []
        if round.phase is not Phase.ENTER:
            waiting = [peer for peer in round.members if peer in round.expected - round.answers.keys()]
            return [f"{round.members[peer]}: no answer in phase {round.phase.name}" for peer in waiting]
        missing = self.roster.missing(round.answers, round.enter.min_replicas)
        if self._is_paused(round, now):
            missing.append(f"updates: paused by a request, for {self.paused_until - now:.0f} s more")
        if self.tasks.running:
            missing.append("all ranks: a load, save or probe is still going on")
        return missing

    def past(self, count: int) -> list[Past]:
        """The last rounds that have ended, the newest last."""
        return [past_of(*ended) for ended in list(self._past)[-count:]] if count else []

    # -- steps -------------------------------------------------------------------------------------

    def _offer(self, round: Round, now: float) -> None:
        enter = round.enter
        peers = self.roster.group(round.answers)
        group = tuple(peer.id for peer in peers)
        if group != self._group or self._broken:
            kept = self._rebuilt.group(peers) if not self._group else None
            self.epoch, self._group_token, self._planned = kept or (
                max(self.epoch, last_epoch(peers)) + 1,
                secrets.token_hex(8),
                set(),
            )
            self._group, self._broken, self._introduced = group, False, False
            self._members = frozenset(group)
        round.header = self.header(round.update)
        round.calls = set(round.answers)
        facts = [answer.facts for p in group if isinstance(answer := round.answers.get(p), m.Enter)]
        plan = fingerprint([self._group_token, self.epoch, enter.modules, enter.settings, *facts])
        round.offer = m.Offer(
            group=self._group_token,
            kind=enter.kind,
            version=enter.version,
            modules=enter.modules,
            verify=enter.verify,
            plan=plan,
            planned=plan in self._planned,
            settings=enter.settings,
            members=self.roster.members(peers),
            ready_s=enter.ready_s,
            transfer_s=enter.transfer_s,
            jobs=enter.jobs,
        )
        round.members = {member.peer: member for member in round.offer.members}
        # A member that was told of the others in this epoch, or has a plan with them, knows them.
        known = self._introduced
        members = [] if known else m.public(round.offer.members)
        self._send(group, msgspec.structs.replace(round.offer, members=members))
        self._introduced = True
        if enter.kind != "update":
            self._next(round, Phase.RUN, group, now + enter.ready_s + enter.transfer_s)
        elif round.offer.planned:
            self._next(round, Phase.READY, group, now + enter.ready_s)
        else:
            self._survey(round, now)

    def _survey(self, round: Round, now: float) -> None:
        trainers = [peer for peer, member in round.members.items() if member.trainer is not None]
        self._next(round, Phase.SOURCES, trainers, now + round.enter.ready_s)

    def _relay_sources(self, round: Round, now: float) -> None:
        self._send(round.members, self._gathered(round, "sources"))
        servers = [peer for peer, member in round.members.items() if member.server is not None]
        self._next(round, Phase.WANTS, servers, now + round.enter.ready_s)

    def _relay_wants(self, round: Round, now: float) -> None:
        self._send(round.members, self._gathered(round, "wants"))
        self._next(round, Phase.READY, round.members, now + round.enter.ready_s)

    def _gathered(self, round: Round, of: m.FactsOf) -> m.Gathered:
        """Replicas want the same, so each distinct blob travels once."""
        blobs: dict[bytes, int] = {}
        holder, memory = {}, {}
        for rank, peer in enumerate(round.members):
            answer = round.answers.get(peer)
            if isinstance(answer, m.Facts):
                holder[rank] = blobs.setdefault(answer.blob, len(blobs))
                memory[rank] = answer.memory
        return m.Gathered(of=of, blobs=list(blobs), holder=holder, memory=memory)

    def _go(self, round: Round, now: float) -> None:
        assert round.offer is not None
        plans: dict[str, str] = {}
        stale = False
        for peer, answer in round.answers.items():
            assert isinstance(answer, m.Ready)
            stale |= answer.stale
            plans.setdefault(answer.plan, str(round.members[peer]))
        if stale:
            self._planned.discard(round.offer.plan)
            round.offer = msgspec.structs.replace(round.offer, planned=False)
            self._send(round.members, msgspec.structs.replace(round.offer, members=[]))
            self._survey(round, now)
        elif len(plans) > 1:
            reason = "plans differ: " + ", ".join(f"{plan} on {who}" for plan, who in plans.items())
            self._note(round, "all ranks", reason, now)
            self._fail(round, now)
        elif (differ := self._compare_held(round, now)) is not None:
            if differ:
                self._send(round.members, m.Detail(groups=[], held=differ))
                self._next(round, Phase.COMPARE, round.members, now + round.enter.ready_s)
            else:
                self._fail(round, now)
        else:
            self._planned.add(round.offer.plan)
            round.seed = secrets.token_bytes(32)
            self._rebuilt.drawn(round.seed)
            self._send(round.members, m.Go(seed=round.seed))
            self._next(round, Phase.RUN, round.members, now + round.enter.transfer_s)

    def _compare_held(self, round: Round, now: float) -> list[tuple[int, int]] | None:
        """What several trainer ranks hold of a new plan: None if it is equal, else where it is not, or nothing
        where that is not known and the round has a failure."""
        held = {peer: answer.held for peer, answer in round.answers.items() if isinstance(answer, m.Ready)}
        differ, complaints = compare_held(round.members, held)
        for member, text in complaints:
            self._note(round, str(member), text, now)
        return differ if differ or complaints else None

    def _refuse_held(self, round: Round, now: float) -> None:
        round.failures += name_held(
            round.members, {p: a for p, a in round.answers.items() if isinstance(a, m.Sums)}
        )
        if not round.failures:
            self._note(
                round, "trainer ranks", "what they hold differed, and then did not: it changes meanwhile", now
            )
        self._fail(round, now)

    def _judge(self, round: Round, now: float) -> None:
        dones = round.dones = {p: a for p, a in round.answers.items() if isinstance(a, m.Done)}
        if not round.enter.verify:
            self._end(round, "unverified", now)
            return
        wrong, complaints = compare_folds(round.members, dones, max(1, len(round.enter.jobs)))
        differ, more = compare_held(round.members, {peer: done.held for peer, done in dones.items()})
        for member, text in complaints + more:
            self._note(round, str(member), text, now)
        if complaints or more:
            self._fail(round, now)
            return
        round.inquiry = Inquiry(round.members, dones)
        if wrong or differ:
            self._send(round.members, m.Detail(groups=wrong, held=differ))
            self._next(round, Phase.DETAIL, round.members, now + round.enter.transfer_s)
        elif round.inquiry.failures():
            self._mismatch(round, now)
        else:
            partial = any(done.partial for done in dones.values())
            self._end(round, "partial" if partial else "verified", now)

    def _name_tensors(self, round: Round, now: float) -> None:
        assert round.inquiry
        answers = {p: a for p, a in round.answers.items() if isinstance(a, m.Sums)}
        round.inquiry.named(answers)
        round.failures += name_held(round.members, answers)
        suspects = round.inquiry.suspects()
        if not suspects:
            self._mismatch(round, now)
            return
        self._send(round.members, m.Suspects(suspects=suspects))
        self._next(round, Phase.CLUES, round.members, now + min(INQUIRY_S, round.enter.transfer_s))

    def _hear(self, round: Round, now: float) -> None:
        assert round.inquiry
        round.inquiry.hear({p: a for p, a in round.answers.items() if isinstance(a, m.Clues)})
        self._ask(round, now)

    def _narrow(self, round: Round, now: float) -> None:
        assert round.inquiry
        round.inquiry.compare({p: a for p, a in round.answers.items() if isinstance(a, m.Probed)})
        self._ask(round, now)

    def _ask(self, round: Round, now: float) -> None:
        """The next round of boxes; all of them together end at the deadline of the first."""
        assert round.inquiry
        asked = round.inquiry.questions()
        if not asked:
            self._mismatch(round, now)
            return
        for peer, questions in asked.items():
            self._send([peer], m.Probe(questions=questions))
        self._next(round, Phase.NARROW, asked, round.deadline)

    def _mismatch(self, round: Round, now: float) -> None:
        """The end of a round in which tensors are wrong; each of them is named."""
        assert round.inquiry
        if not (found := round.inquiry.failures()) and not round.failures:
            reason = "folded sums differed, sums of the single tensors do not: weights changed meanwhile"
            found = [m.Failure(rank="unknown rank", tensor=None, reason=reason)]
        round.failures = found + round.failures
        self._end(round, "mismatch", now)

    # -- ends --------------------------------------------------------------------------------------

    def _fail(self, round: Round, now: float) -> None:
        if round.phase in NAMED:
            self._mismatch(round, now)
        else:
            self._end(round, "failed", now)

    def _end(self, round: Round, verdict: m.Word, now: float) -> None:
        ok = verdict not in ("failed", "mismatch")
        update = round.enter.kind == "update"
        moved = update and round.phase in MOVED
        # The ranks abort their group after such an update: it takes a new epoch to make another.
        self._broken |= moved and not ok
        if ok and round.enter.kind != "check":
            self.committed, self._versions_of = round.enter.version, self.roster.incarnation
        servers = [member.server for member in round.members.values() if member.server]
        outcome = m.Outcome(
            ok=ok,
            moved=moved,
            verdict=verdict,
            failures=round.failures[:1000],
            partial=m.cut({n: why for done in round.dones.values() for n, why in sorted(done.partial.items())}),
            exempt={name: why for done in round.dones.values() for name, why in sorted(done.exempt.items())},
            seconds=now - round.started,
            digest_s=max((laps.get("verify", 0.0) for laps in self._server_stages(round)), default=0.0),
            trainers=sum(member.trainer is not None for member in round.members.values()),
            replicas=sorted({server.replica for server in servers}),
            servers=len(servers),
            tasks=self.requests.after_update() if ok and update else [],
        )
        if update:
            complete = round.enter.modules is None
            self.tasks.saw(outcome.replicas, ok, outcome.moved, round.enter.version, complete=complete)
        recipients = [p for p in (round.members or round.answers) if p in self.roster.peers]
        self._rebuilt.ended(round.seed, outcome)
        if ok and round.enter.kind != "check":
            for id, member in round.members.items():
                peer = self.roster.peers[id]
                peer.version = round.enter.version
                if member.server and update and round.enter.modules is None:
                    peer.state = "ready"  # as its next beat will say
        round.answers = {}
        self._past.append((round, outcome, time.time() - outcome.seconds))
        self.requests.settle(round.enter, outcome)
        self.round = None
        self._send(recipients, outcome, round.header)

    def _server_stages(self, round: Round) -> list[dict[str, float]]:
        members = round.members
        return [done.stages for peer, done in round.dones.items() if members[peer].server]

    def _refuse_enter(self, message: m.Enter, reason: str) -> None:
        failure = m.Failure(rank=str(self.roster.peers[message.peer]), tensor=None, reason=reason)
        outcome = m.Outcome(ok=False, moved=False, verdict="failed", failures=[failure])
        self.requests.settle(message, outcome)
        self._send([message.peer], outcome, self.header())

    def _note(self, round: Round, rank: str, reason: str, now: float) -> None:
        if len(round.failures) < MAX_FAILURES:
            round.failures.append(m.Failure(rank=rank, tensor=None, reason=reason))
        round.deadline = min(round.deadline, now + GRACE_S)

    def _number(self) -> int:
        self._updates += 1
        return self._updates

    def _next(self, round: Round, phase: Phase, expected: Iterable[str], deadline: float) -> None:
        round.phase, round.expected, round.deadline = phase, set(expected), deadline
        round.answers = {}
        round.phases[phase.name] = self._now - round.started

    @property
    def incarnation(self) -> int:
        return self.roster.incarnation

    def header(self, update: int = 0) -> m.Header:
        return m.Header(self.job, self.incarnation, self.epoch, update)

    def _send(self, peers: Iterable[str], message: m.Message, header: m.Header | None = None) -> None:
        """header: by default that of the round."""
        message.stamp(header or (self.round.header if self.round else self.header()))
        self.outbox += [(peer, message) for peer in peers]


def _differs(first: m.Enter, other: m.Enter) -> str:
    for name in ("kind", "version", "modules", "verify", "settings", "jobs", "min_replicas"):
        one, two = getattr(first, name), getattr(other, name)
        if one != two:
            return f"expected {name} {one!r}, got {two!r}"
    return ""
