"""The hub's decisions, apart from sockets: who takes part, what comes next, one outcome for all.

``Coordinator`` is fed messages and the time, and leaves its answers in ``outbox``. An update or a
check is one round. In each of its phases every expected peer answers once; when all have, the step that
``steps`` has for the phase says what comes next.

A refusal, a death or a deadline ends the round in any phase. Before RUN no byte has moved; after DETAIL the
verdict stands, and such an end only leaves it less telling. A check and a label, which says as what version
the live weights count, go from ENTER straight to RUN.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Iterable

import msgspec

from weightbus.control import messages as m
from weightbus.control.client_messages import Past
from weightbus.control.patience import Patience
from weightbus.errors import ProtocolError
from weightbus.hub.catch_up import BEATS_S, LOOK_S, QUIET_S, CatchUp
from weightbus.hub.isolation import Isolation
from weightbus.hub.members import LISTED, Peer
from weightbus.hub.outcome import has_moved, outcome_of
from weightbus.hub.recovery import MAX_HELD_VERSION, Rebuilt, last_epoch, last_version, past_of
from weightbus.hub.requests import Requests
from weightbus.hub.roster import Roster
from weightbus.hub.round import ANSWERS, MEETING, MOVED, NAMED, Phase, Repeat, Round
from weightbus.hub.silence import absent, name_links, name_silent, unanswered
from weightbus.hub.steps import End, Next, Sent, Steps
from weightbus.hub.tasks import Tasks
from weightbus.hub.waits import Waits
from weightbus.planning.spec import fingerprint

log = logging.getLogger("weightbus.hub")

# A label may lie so far above the last committed version: one that leaves no room would end all updates.
MAX_LEAP = 1 << 40

# Trainer ranks that call an update once more do so within this time, however late it is.
REPEAT_S = 5.0

# Each time an update is put off, ranks of a replica wait twice as long for each other; so often at most.
MAX_DOUBLINGS = 16

# How many rounds that have ended are remembered.
PAST_ROUNDS = 16


class Coordinator:
    """State of the hub: the roster, the epoch, and at most one round."""

    def __init__(self, *, dead_after_s: float, job: str = "") -> None:
        self.job = job
        self.roster = Roster(dead_after_s=dead_after_s)
        self.isolation = Isolation(self.roster)
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
        self.committed = -1
        self._versions_of = 0  # incarnation
        self.paused_until = 0.0
        # While the hub's key changes: rounds are held, and tasks too once members have to connect again.
        self.held_until = 0.0
        self.reconnecting = False
        self.requests = Requests()
        self.tasks = Tasks(self.roster, self.outbox, self._number, self.header)
        self.waits = Waits(self.roster, self.outbox, self.header)
        self.catch_up = CatchUp(self.roster, self.isolation, self.tasks.touched)
        self._quiet_from = self._look_again = 0.0  # since when nobody came and no round went on
        self._repeat: Repeat | None = None
        self._past: deque[tuple[Round, m.Outcome, float]] = deque(maxlen=PAST_ROUNDS)
        self._rebuilt = Rebuilt()
        self._now = 0.0
        self._early: dict[str, tuple[float, m.Enter]] = {}
        self._steps = Steps(self.catch_up, self._rebuilt)

    # -- what comes in -----------------------------------------------------------------------------

    def joined(self, peer: Peer, now: float) -> None:
        """A peer has come, perhaps from an earlier hub: what it knows of before is taken over."""
        if peer.held is not None and not self.roster.is_early(peer):
            self._believe(last_version(self.roster, peer))
        self._rebuilt.came(peer, now)
        if (
            self.round is not None and peer.id in self.round.members
        ):  # that may be the hub's fault, or the link's
            self._left_round(self.round, peer.id, "it had lost the hub, and has joined it again", now)
        self.outbox += self._rebuilt.joined(peer, self.roster, self.job)
        self._quiet_from = now
        if peer.trainer is not None and peer.held is None:
            version = self._last_known()
            self._send([peer.id], m.Known(version=version if version >= 0 else None), self.header())
        self.advance(now)

    def _number_version(self, message: m.Enter, first: m.Enter | None) -> None:
        """Give an update whose caller gives none its number; ``first``: of the rank that called first."""
        if first and first.follows:
            message.version = first.version
            return
        before = self._last_known() if message.after is None else message.after
        if self.floor >= 0:
            before = self.floor
        message.version = min(max(before + 1, 1), m.MAX_COUNT)
        if before >= m.MAX_COUNT:
            text = f"version: expected a last one below {m.MAX_COUNT}, to go on from, got {before}"
            message.refusal = message.refusal or f"{text}; start the trainer anew with resume= below that"

    def _last_known(self) -> int:
        """The last version of any start of the trainer; as servers say, where no commit is known here."""
        said = [peer.version for peer in self.roster.peers.values() if peer.server and peer.version is not None]
        known = [version for version in said if version < MAX_HELD_VERSION] if self.committed < 0 else []
        return max(known, default=self.committed)

    def enter(self, message: m.Enter, now: float) -> None:
        """A trainer rank calls ``update`` or ``check``: the first one opens the round."""
        if message.kind == "catch_up":
            raise ProtocolError("enter: expected an update, a check or a label, got a catch-up")
        peer = self.roster.peers[message.peer]
        if self.roster.is_early(peer):
            deadline, _ = self._early.get(peer.id, (now + self.roster.dead_after_s, message))
            self._early[peer.id] = deadline, message
            return
        if self.round is not None and self.round.pairing is not None:
            self._break_off(self.round, f"{message.kind} {message.version} has begun", now)
        if message.follows:
            first = self.round.enter if self.round else None
            self._number_version(message, first)
        if self.round is None:
            deadline = now + message.join_s
            number = self._number()
            self.round = Round(
                update=number,
                started=now,
                deadline=deadline,
                join_by=deadline,
                patience=Patience(now),
                enter=message,
                header=self.header(number),
            )
            self._take_up(self.round, now)
        round = self.round
        if round.phase is not Phase.ENTER:
            self._refuse_enter(message, f"update {round.update} is still going on")
            return
        if message.refusal:
            round.note(str(peer), message.refusal, now)
        elif difference := _differs(round.enter, message):
            round.note(str(peer), f"{difference} as on the first rank that called", now)
        if message.kind == "update" and message.version <= self.floor:
            reason = f"version {message.version}: expected one above {self.floor}, the last committed"
            round.note(str(peer), reason, now)
        round.answers[message.peer] = message
        self.advance(now)

    def _take_up(self, round: Round, now: float) -> None:
        """A round has begun; one that repeats another goes on with what that one has left of its time."""
        repeat = self._repeat
        if repeat is None or (round.enter.kind, round.enter.version) != ("update", repeat.version):
            self._repeat = None
        elif repeat.cancelled is not None:
            round.note(repeat.cancelled.rank, repeat.cancelled.reason, now)
        else:
            round.join_by = round.deadline = max(repeat.join_by, now + REPEAT_S)
            round.meet_by = repeat.meet_by

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
        self,
        message: m.Facts | m.Ready | m.Refuse | m.Done | m.Sums | m.Clues | m.Probed | m.Later | m.Await,
        now: float,
    ) -> bool:
        """A member's answer; False if it is of no use any more (late, repeated, out of turn)."""
        if isinstance(message, m.Await):
            self.waits.ask(message, now)
            self.advance(now)
            return True
        if self.tasks.answer(message, now):
            self.advance(now)
            return True
        round = self.round
        if isinstance(message, m.Refuse) and self._gives_up(message, now):
            return True
        if isinstance(message, m.Later):
            return self._hurries(message, now)
        if round is None or message.header != round.header or message.peer not in round.expected:
            return False
        if message.peer in round.answers or not isinstance(message, ANSWERS[round.phase]):
            return False
        round.answers[message.peer] = message
        round.answered[message.peer, round.phase] = now
        reason = message.reason if isinstance(message, m.Refuse) else getattr(message, "error", "")
        if reason and not isinstance(message, m.Probed):
            if isinstance(message, m.Done) and message.symptom:
                round.blame.symptom(message.peer, message.apart, list(round.members), now)
            else:
                round.blame.own([message.peer], reason)
            other = isinstance(message, m.Done) and message.other_version
            round.note(str(round.members[message.peer]), reason, now, other_version=other)
        self.advance(now)
        return True

    def _hurries(self, later: m.Later, now: float) -> bool:
        """The poll of a server rank is over."""
        round = self.round
        if round is None or later.header != round.header or later.peer not in round.members:
            return False
        if (server := round.members[later.peer].server) is not None:
            round.hurried.setdefault(server.replica, now)
        self.advance(now)
        return True

    def cancel(self, peer: Peer, reason: str, now: float) -> bool:
        """A trainer rank ends a round of which no byte has moved, and what servers wait for; whether there was
        anything to end."""
        if self.roster.is_early(peer):
            return False
        rank, reason = str(peer), f"cancelled: {reason}" if reason else "cancelled"
        ended, round = False, self.round
        failure = m.Failure(rank=rank, tensor=None, reason=reason)
        stays = round is None or round.pairing is not None
        if round is not None and not stays and (round.enter.kind != "update" or round.phase not in MOVED):
            round.blame.peers.clear()
            round.failures.insert(0, failure)
            self._end(round, "failed", now)
            ended = True
        elif round is None and self._repeat is not None:
            self._repeat.cancelled = failure
            ended = True
        ended |= self.waits.stop(rank, reason)
        self.advance(now)
        return ended

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
        round.blame.own([refuse.peer], refuse.reason)
        self._left_round(round, refuse.peer, refuse.reason, now)
        self.advance(now)
        return True

    def _left_round(self, round: Round, peer: str, reason: str, now: float) -> None:
        """A member follows the round no more: nobody waits for it."""
        round.given_up.add(peer)
        member = round.members.get(peer) or self.roster.peers[peer].member()
        round.note(str(member), reason, now)
        if round.phase is not Phase.ENTER and peer in round.expected:
            round.answers[peer] = m.Refuse(peer=peer, reason=reason)

    def lost(self, peer: Peer, reason: str, now: float) -> None:
        """A peer left or died; it is no longer in the roster."""
        needed = peer.trainer is not None and not self.roster.is_early(peer)
        if needed:
            self.waits.stop(str(peer), reason)
        self.waits.lost(peer, reason)
        self.catch_up.left(peer)
        self.roster.review()
        self._rebuilt.left(peer)
        self.tasks.lost(peer, reason, now)
        round = self.round
        if peer.server:
            self.isolation.forgive([peer.server.replica])
        if round is not None and (
            peer.id in (round.members or round.answers) or (needed and not round.members)
        ):
            # What others have said before may follow from its death: it is named before them.
            round.answers.pop(peer.id, None)
            round.expected.discard(peer.id)
            place = round.blame.deaths
            round.blame.died(peer.id, reason)
            round.note(str(peer), reason, now, place=place)
            if round.phase is Phase.ENTER and not round.answers:
                self._end(round, "failed", now)  # nobody waits for it; who calls next begins another
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
        self._advance_round(now)
        if self.round is None:
            self._begin_catch_up(now)
        else:
            self._tell_missing(self.round, now)
        if self.waits.any:
            self.waits.advance(now, self._busy(), lambda: self.missing(now))

    def _begin_catch_up(self, now: float) -> None:
        """Between updates, once it has been quiet for a while; an update that begins ends it."""
        if now < max(self._quiet_from + QUIET_S, self._look_again):
            return
        self._look_again = now + LOOK_S
        if self.is_moving or now < max(self.paused_until, self.held_until) or self.reconnecting:
            return
        lacking = self.catch_up.lacking(self._quiet_from + BEATS_S, now)
        pairing = self.catch_up.pair(lacking)
        self.requests.wanted = pairing is None and bool(lacking)
        if pairing is None:
            return
        enter, number = pairing.enter, self._number()
        self.round = Round(
            update=number,
            started=now,
            deadline=now + enter.ready_s,
            join_by=now,
            patience=Patience(now),
            enter=enter,
            header=self.header(number),
            pairing=pairing,
        )
        log.info("replica %d catches up with version %d", pairing.joiner, enter.version)
        self._follow(self.round, self._offer(self.round, now), now)

    def _break_off(self, round: Round, why: str, now: float) -> None:
        round.failures.insert(0, m.Failure(rank="hub", tensor=None, reason=f"{why}: it has right of way"))
        self._end(round, "failed", now, broken_off=True)

    def _tell_missing(self, round: Round, now: float) -> None:
        """What a round waits for, to the logs of those who wait, more and more rarely."""
        if not round.patience.is_over(now):
            return
        lines = [f"{who}: {what}"[:1000] for who, what in self.missing(now)[: m.MAX_MISSING]]
        what = f"{round.enter.kind} {round.enter.version}"
        log.info("%s waits for %s", what, "; ".join(lines))
        told = m.Missing(what=what, waited_s=now - round.started, lines=lines)
        self._send(round.members or round.answers, told)

    def _busy(self) -> set[int]:
        """Replicas whose ranks follow a round or a task."""
        members = [member for going in self.tasks.running for member in going.members]
        members += self.round.members.values() if self.round else ()
        return {member.server.replica for member in members if member.server}

    def _advance_round(self, now: float) -> None:
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
        if self.reconnecting:
            return False
        if round is None:
            return True
        return round.phase is Phase.ENTER and (self._is_paused(round, now) or not self._can_start(round))

    @property
    def is_moving(self) -> bool:
        """Whether members follow a round or a task just now."""
        return bool(self.tasks.running or self.tasks.waiting) or (
            self.round is not None and self.round.phase is not Phase.ENTER
        )

    def _can_start(self, round: Round) -> bool:
        return self.roster.can_start(round.answers, round.enter.min_replicas)

    def _is_held(self, round: Round, now: float) -> bool:
        return now < self.held_until or not self._can_start(round) or self._rebuilt.awaits(self.roster, now)

    def _is_paused(self, round: Round, now: float) -> bool:
        return now < self.paused_until and round.enter.kind == "update"

    def _advance(self, round: Round, now: float) -> None:
        round.deadline += round.blame.tick(now)  # what ranks have said meanwhile is still to be heard
        if round.phase is Phase.ENTER and now < round.deadline and self._is_held(round, now):
            return
        meets = round.hurried and round.phase in MEETING and not round.failures
        if meets and (away := absent(round, self.roster)):
            self._put_off(round, away, now)
            return
        waits = len(round.answers) < len(round.expected)
        if waits and round.phase is Phase.RUN and round.blame.is_due(now):
            silent = round.expected - round.answers.keys()
            round.blame.watch([self.roster.peers[peer] for peer in silent], now)
            if round.blame.open and round.blame.all_still(silent, now):
                round.deadline = now  # the others have given up waiting for them
        if not waits or now >= round.deadline:
            name_links(round)
        if round.phase is not Phase.ENTER and (waits or round.blame.open) and now < round.deadline:
            return
        missing = self.missing(now)
        if not missing:
            if round.failures:
                self._fail(round, now)
            else:
                step = self._offer if round.phase is Phase.ENTER else self._steps.after[round.phase]
                self._follow(round, step(round, now), now)
        elif now >= round.deadline:
            if (not round.failures or round.blame.open) and round.phase not in NAMED:
                name_silent(round, missing, now)
            self._fail(round, now)

    def _put_off(self, round: Round, away: list[str], now: float) -> None:
        """End it for now: trainer ranks call again at once, and the ranks of a replica hear the next offer in
        another moment. Once this has gone on for ``ready_s``, those who were not there are to blame."""
        why = f"no answer in phase {round.phase.name}: it does not poll while others of its replica wait for it"
        late = now >= round.meet_by
        if late:
            round.blame.own(away, why)
        for id in away:
            round.failures.append(m.Failure(rank=str(round.members[id]), tensor=None, reason=why))
        self._end(round, "failed", now, put_off=not late)

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

    def missing(self, now: float) -> list[tuple[str, str]]:
        """What the round waits for: a rank, and what it has not done."""
        round = self.round
        if round is None:
            return []
        if round.phase is not Phase.ENTER:
            return unanswered(round)
        missing = self.roster.missing(round.answers, round.enter.min_replicas)
        if self._is_paused(round, now):
            missing.append(("updates", f"paused by a request, for {self.paused_until - now:.0f} s more"))
        if self.tasks.running:
            missing.append(("all ranks", "a load, save or probe is still going on"))
        return missing

    def past(self, count: int) -> list[Past]:
        """The last rounds that have ended, the newest last."""
        return [past_of(*ended) for ended in list(self._past)[-count:]] if count else []

    # -- steps -------------------------------------------------------------------------------------

    def _offer(self, round: Round, now: float) -> Next:
        enter, pairing = round.enter, round.pairing
        least = len(self.roster.complete()) if enter.all_replicas else enter.min_replicas
        round.left_out = self.isolation.left_out(least, now) if enter.kind == "update" else {}
        if pairing is not None:
            peers, members = [self.roster.peers[id] for id in pairing.members], list(pairing.members.values())
        else:
            peers = self.roster.group(round.answers, round.left_out)
            members = self.roster.members(peers, round.left_out)
        group = tuple(peer.id for peer in peers)
        if group != self._group or self._broken:
            kept = self._rebuilt.group(peers) if not self._group else None
            self.epoch, self._group_token, self._steps.plans = kept or (
                max(self.epoch, last_epoch(peers)) + 1,
                secrets.token_hex(8),
                set(),
            )
            self._group, self._broken, self._introduced = group, False, False
            self._members = frozenset(group)
            self.catch_up.forget_plans()
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
            planned=plan in self._steps.plans and pairing is None,
            settings=enter.settings,
            members=members,
            ready_s=enter.ready_s,
            transfer_s=enter.transfer_s,
            jobs=enter.jobs,
            meet_s=m.MEET_S * 2 ** min(self._repeat.put_off if self._repeat else 0, MAX_DOUBLINGS),
        )
        round.meet_by = round.meet_by or now + enter.ready_s
        round.members = {member.peer: member for member in round.offer.members}
        # A member that was told of the others in this epoch, or has a plan with them, knows them.
        known = self._introduced and pairing is None
        told = [] if known else m.public(round.offer.members)
        messages: Sent = [(group, msgspec.structs.replace(round.offer, members=told))]
        self._introduced = pairing is None
        phase, deadline = Phase.READY, now + enter.ready_s
        if enter.kind not in m.MOVES:
            phase, deadline = Phase.RUN, deadline + enter.transfer_s
        elif not round.offer.planned:
            return self._steps.survey(round, messages, now)
        return Next(phase=phase, expected=group, deadline=deadline, messages=messages)

    def _follow(self, round: Round, then: Next | End, now: float) -> None:
        """Do what a step has said."""
        if isinstance(then, Next):
            for peers, message in then.messages:
                self._send(peers, message)
            self._next(round, then.phase, then.expected, then.deadline)
        elif then.verdict == "failed":
            self._fail(round, now)
        elif then.verdict == "mismatch":
            self._mismatch(round, now)
        else:
            self._end(round, then.verdict, now)

    def _mismatch(self, round: Round, now: float) -> None:
        """The end of a round in which tensors are wrong; each of them is named."""
        if not (found := round.inquiry.failures()) and not round.failures:
            reason = "folded sums differed, sums of the single tensors do not: weights changed meanwhile"
            found = [m.Failure(rank="unknown rank", tensor=None, reason=reason)]
        round.failures = found + round.failures
        self._end(round, "mismatch", now)

    # -- ends --------------------------------------------------------------------------------------

    def _fail(self, round: Round, now: float) -> None:
        if round.blame.away_s:
            text = f"it has itself stood still for {round.blame.away_s:.1f} s"
            round.failures.insert(0, m.Failure(rank="hub", tensor=None, reason=text))
            round.blame.peers.clear()
        if round.phase in NAMED:
            self._mismatch(round, now)
        else:
            self._end(round, "failed", now)

    def _end(
        self, round: Round, verdict: m.Word, now: float, *, put_off: bool = False, broken_off: bool = False
    ) -> None:
        ok = verdict not in ("failed", "mismatch")
        update = round.enter.kind == "update"
        # The ranks abort their group after such an update: it takes a new epoch to make another.
        self._broken |= has_moved(round) and not ok
        if ok and round.enter.kind in ("update", "label"):
            self.committed, self._versions_of = round.enter.version, self.roster.incarnation
        servers = [member.server for member in round.members.values() if member.server]
        blamed = round.blame.replicas(round.members)
        if round.enter.kind in m.MOVES and ok:
            self.isolation.forgive({server.replica for server in servers})
        elif update and not round.enter.all_replicas:
            for replica in blamed.keys() & set(self.roster.complete()):
                self.isolation.blame(replica, blamed[replica], now)
        tasks = self.requests.after_update() if ok and update else []
        outcome = outcome_of(round, verdict, now, blamed=blamed, put_off=put_off, tasks=tasks)
        if update:
            self._remember(round, outcome)
        if update or (round.pairing and ok):
            self.waits.settle(round.enter.version, outcome, {server.replica for server in servers}, now)
        self._settle_catch_up(round, outcome, now, broken_off=broken_off)
        if round.enter.kind in m.MOVES:
            complete = round.enter.modules is None
            self.tasks.saw(outcome.replicas, ok, outcome.moved, round.enter.version, complete=complete)
        recipients = [p for p in (round.members or round.answers) if p in self.roster.peers]
        called = {p: answer.version for p, answer in round.answers.items() if isinstance(answer, m.Enter)}
        self._rebuilt.ended(round.seed, outcome)
        if ok and round.enter.kind != "check":
            for id, member in round.members.items():
                peer = self.roster.peers[id]
                peer.version = round.enter.version
                if member.server and round.enter.kind in m.MOVES and round.enter.modules is None:
                    peer.state = "ready"  # as its next beat will say
        round.answers = {}
        self._past.append((round, outcome, time.time() - outcome.seconds))
        if not outcome.again:
            self.requests.settle(round.enter, outcome)
        self.round = None
        if round.members:
            self._send(recipients, outcome, round.header)
        else:  # each knows by the version that it has called with that this ends its call
            for one in recipients:
                version = called.get(one, outcome.version)
                same = version == outcome.version
                mine = outcome if same else msgspec.structs.replace(outcome, version=version)
                self._send([one], mine, round.header)

    def _settle_catch_up(self, round: Round, outcome: m.Outcome, now: float, *, broken_off: bool) -> None:
        self._quiet_from = now
        if round.pairing is not None:
            why = "" if outcome.ok else "; ".join(map(str, outcome.failures))
            self.catch_up.ended(round.pairing, why, now, broken_off=broken_off or outcome.put_off)
        elif outcome.ok and round.enter.kind == "label":
            self.catch_up.labelled(round.enter.version)
        elif outcome.ok and round.enter.kind == "update" and round.offer is not None:
            self.catch_up.committed(
                round.enter, self.roster.incarnation, round.offer, round.seed, round.members, round.dones
            )

    def _remember(self, round: Round, outcome: m.Outcome) -> None:
        """What trainer ranks call once more at once."""
        times = self._repeat.put_off if self._repeat else 0
        self._repeat = None
        if outcome.again:
            self._repeat = Repeat(
                version=round.enter.version,
                join_by=round.join_by,
                meet_by=round.meet_by if outcome.put_off else 0.0,
                put_off=times + outcome.put_off,
            )

    def _refuse_enter(self, message: m.Enter, reason: str) -> None:
        failure = m.Failure(rank=str(self.roster.peers[message.peer]), tensor=None, reason=reason)
        outcome = m.Outcome(
            ok=False, moved=False, verdict="failed", failures=[failure], version=message.version
        )
        self.requests.settle(message, outcome)
        self._send([message.peer], outcome, self.header())

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
    for name in m.ALIKE:
        one, two = getattr(first, name), getattr(other, name)
        if one != two:
            return f"expected {name} {one!r}, got {two!r}"
    return ""
