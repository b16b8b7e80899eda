"""One rank's turn in one update or check: its answer to each of the hub's messages."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weightbus import messages as m
from weightbus.broadcast import Broadcast
from weightbus.errors import ProtocolError, UpdateError, WeightbusError
from weightbus.exports import Choice, Exports, decode_exports, decode_reach
from weightbus.facts import Facts, decode_facts, encode_facts, ties_of
from weightbus.frozen import Frozen
from weightbus.install import Target
from weightbus.lanes import Mark, wait_for
from weightbus.layout import Part, renamed_parts
from weightbus.ledger import Chosen, Ledger, Record, Sums
from weightbus.peer import CompiledPeer, Peer
from weightbus.plan import Want, merge_sources
from weightbus.planned import Planned, Settings, Survey, make_planned
from weightbus.sharing import Look, Sharing
from weightbus.witness import (
    Evidence,
    amiss,
    answer,
    clue,
    held_folds,
    held_sums,
    hidden_sums,
    spoiled,
    tensor_sums,
)

if TYPE_CHECKING:
    from weightbus.ends import Destination, Origin
    from weightbus.link import Link
    from weightbus.loopback import Loopback
    from weightbus.session import Session

log = logging.getLogger("weightbus")

# The hub ends every phase by its own deadline; a rank allows it this much more.
SLACK_S = 30.0

# An update in the background looks this often whether bytes have moved, and leaves the interpreter alone.
BACKGROUND_PAUSE_S = 0.0005

CHANGED_IN_PLACE = "expected shape, strides and dtype as planned, got others at the same address"

# Of a reason that a rank gives; the schema allows more.
MAX_REASON_CHARACTERS = 8 << 10

# How often a rank that is moving bytes looks at what the hub says.
LOOK_S = 0.02


class Ended(WeightbusError):
    """The hub has ended the update while this rank was still working on it."""

    def __init__(self, outcome: m.Outcome) -> None:
        super().__init__("the update has ended")
        self.outcome = outcome


@dataclass(slots=True, kw_only=True)
class Progress:
    """What this rank has done so far; ``report(done, total)`` is called as bytes move."""

    report: Callable[[int, int], None] | None = None
    stages: dict[str, float] = field(default_factory=dict)
    tensors: int = 0
    nbytes: int = 0
    moved: int = 0
    wrote: bool = False
    choice: Choice | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCopy:
    """What a trainer rank sends instead of its live source. filled: reached once it is complete."""

    frozen: Frozen
    filled: Mark


class Turn:
    """State of this rank from the offer to the outcome."""

    def __init__(self, session: Session, progress: Progress, copied: SourceCopy | None) -> None:
        self.session, self.progress, self.copied = session, progress, copied
        self.offer: m.Offer | None = None
        self._looked = False
        self._seen: tuple[Sharing, Look] | None = None  # of the plan that ran last, looked at ahead
        self.limit_s = SLACK_S
        self._sources: m.Gathered | None = None
        self._evidence: list[Evidence] = []
        self._held_sums: tuple[Ledger, Sums] | None = None  # of what other trainer ranks hold too
        self._wrong: list[m.Wrong] = []
        self._sharing: Sharing | None = None
        self.farewell: m.Farewell | None = None
        # The update's seed, once bytes may move; whether this rank has done its part of it.
        self.seed: bytes | None = None
        self.finished = False
        self._starts: dict[str, float] = {}
        self._overlapping: dict[str, float] = {}
        self._offered = self._begun = time.monotonic()

    def close(self) -> None:
        """Give back what was mapped for a plan that was not made."""
        sharing, self._sharing = self._sharing, None
        if sharing is not None:
            sharing.close()

    @property
    def _offer(self) -> m.Offer:
        assert self.offer is not None, "the hub sends the offer first"
        return self.offer

    @property
    def _rank(self) -> int:
        """This process's group rank."""
        return self.session.place

    @property
    def _me(self) -> m.Member:
        return self._offer.members[self._rank]

    @property
    def rank(self) -> str:
        """This rank, for messages."""
        return str(self._me) if self.offer and self.offer.members else "this rank"

    @property
    def moved(self) -> bool:
        """Whether bytes may have been written somewhere."""
        return self.seed is not None

    @property
    def _planned(self) -> Planned | None:
        return self.session.plan(self._offer.plan)

    @property
    def _settings(self) -> Settings:
        return Settings.parse(self._offer.settings)

    def _parts(self, origin: Origin) -> dict[str, tuple[Part, ...]]:
        """What this trainer rank sends, by all names of its tensors."""
        parts = self.copied.frozen.parts if self.copied else origin.layout.parts
        return parts | renamed_parts(parts, origin.layout.aliases)

    def _lap(self, stage: str) -> None:
        now = time.monotonic()
        self._starts.setdefault(stage, max(0.0, self._begun - self._offered))
        self.progress.stages[stage] = self.progress.stages.get(stage, 0.0) + now - self._begun
        self._begun = now

    def _clock(self, stage: str, begun: float) -> None:
        """A piece of a stage that overlaps others, for the timeline only. On CUDA it is the host's time."""
        now = time.monotonic()
        self._starts.setdefault(stage, begun - self._offered)
        self._starts[f"{stage} end"] = now - self._offered
        self._overlapping[stage] = self._overlapping.get(stage, 0.0) + now - begun

    def _refuse(self, error: Exception) -> None:
        peer = self.session.link.peer
        self.session.link.send(m.Refuse(peer=peer, reason=explain(error)))

    def _ready(self, held: Sequence[m.HeldFold] = ()) -> None:
        """Ready with the offer's plan; without one that still holds, facts must be exchanged again."""
        planned = self._planned
        filled = self.copied.filled if self.copied else None
        try:
            if planned is not None:
                sharing = planned.sharing
                look = self._seen[1] if self._seen and self._seen[0] is sharing else sharing.look(filled)
                if not sharing.ready(look, self._offer.ready_s):
                    self.session.forget_plan(self._offer.plan)
                    planned = None
        except Exception as error:
            return self._refuse(error)
        self.session.link.send(
            m.Ready(
                peer=self.session.link.peer,
                plan=planned.plan.fingerprint if planned else "",
                stale=planned is None,
                held=list(held),
            )
        )
        return None

    # -- offer and plan ----------------------------------------------------------------------------

    def offered(self, offer: m.Offer) -> None:
        """A second offer in one turn says that the plan has to be made anew."""
        session = self.session
        offer = session.enter_epoch(offer)
        first, self.offer = self.offer is None, offer
        self.limit_s = offer.ready_s + offer.transfer_s + SLACK_S
        if first:
            self._offered = time.monotonic()
        if offer.kind == "check":
            return self._check(offer)
        if offer.kind == "label":
            return self._label()
        try:
            if first:
                self._look_at_tensors()
            if offer.planned:
                self._look_at_tree()
                return self._ready()
            self.close()
            both = self._me.trainer is not None and self._me.server is not None
            self._sharing = Sharing(session.device, self._settings.route, both=both)
            if self._me.trainer is not None and session.origin:
                blob, _ = session.origin.facts(offer.modules)
                layout, parts = session.origin.layout.select(offer.modules), self._parts(session.origin)
                names = [*layout.specs, *layout.aliases]
                self._send_facts(blob, self._sharing.export({name: parts[name] for name in names}))
        except Exception as error:
            self._refuse(error)
        return None

    def _send_facts(self, blob: bytes, memory: bytes) -> None:
        peer = self.session.link.peer
        self.session.link.send(m.Facts(peer=peer, blob=blob, memory=memory))

    def look_ahead(self) -> None:
        """Trainer ranks, once the hub has been told and while its offer is on the way: look at its tensors."""
        # What is wrong, be it in the source's own code, is said when there is an offer to refuse.
        with contextlib.suppress(Exception):
            self._look_at_source()
            self._looked = True
            if self.session.recent is not None and self.copied is None:
                sharing = self.session.recent.sharing
                self._seen = sharing, sharing.look()

    def _look_at_source(self) -> None:
        session = self.session
        if session.origin is not None and self.copied is None and session.origin.refresh():
            session.forget_plans()

    def _look_at_tensors(self) -> None:
        """Notice those that were replaced or moved; then the engine stops using the weights."""
        session = self.session
        if self._me.trainer is not None and not self._looked:
            self._look_at_source()
        if self._me.server and session.destination:
            if session.destination.refresh():
                session.forget_plans()
            session.destination.before(self._offer.version)

    def _look_at_tree(self) -> None:
        """Server ranks: what the model holds besides its parameters may be more than when the plan was made."""
        planned, destination = self._planned, self.session.destination
        if planned is not None and planned.target is not None and destination is not None:
            destination.audit.again(planned.target, verify=self._offer.verify)

    def gathered(self, gathered: m.Gathered) -> None:
        session = self.session
        try:
            if gathered.of == "wants":
                planned = self._plan(gathered)
                session.keep_plan(self._offer.plan, planned)
                return self._ready(self._compare_held(planned))
            self._sources = gathered
            if (target := self._target(gathered)) is not None and session.destination:
                session.destination.audit.begin(target, verify=self._offer.verify)
                assert self._sharing is not None, "made with the offer"
                memory = self._sharing.reach(self._exports(gathered), self._rank)
                self._send_facts(encode_facts(target.facts()), memory)
        except Exception as error:
            return self._refuse(error)
        return None

    def _exports(self, sources: m.Gathered) -> dict[int, Exports]:
        """Each trainer rank's, by group rank."""
        facts, members = self._decode(sources), self._offer.members
        return {
            rank: decode_exports(blob, facts[rank], str(members[rank])) for rank, blob in sources.memory.items()
        }

    def _decode(self, gathered: m.Gathered) -> dict[int, Facts]:
        """Each group rank's facts; equal ones are decoded once."""
        sender = {blob: self._offer.members[rank] for rank, blob in gathered.holder.items()}
        decoded = [decode_facts(blob, str(sender[i])) for i, blob in enumerate(gathered.blobs)]
        return {rank: decoded[blob] for rank, blob in gathered.holder.items()}

    def _target(self, sources: m.Gathered) -> Target | None:
        if not self._me.server or not self.session.destination:
            return None
        facts = self._decode(sources)
        ties = ties_of(facts.values())
        return self.session.destination.target(merge_sources(facts), self._offer.modules, ties=ties)

    def _plan(self, gathered: m.Gathered) -> Planned:
        """The plan, alike on all ranks, and this rank's compiled part of it."""
        session, members, rank = self.session, self._offer.members, self._rank
        if self._sources is None or self._sharing is None:
            raise ProtocolError("wants: expected the sources first")
        facts = self._decode(gathered)
        survey = Survey(
            rank=rank,
            sources=self._decode(self._sources),
            exports=self._exports(self._sources),
            wants={
                member: Want(replica=server.replica, rank=server.rank, facts=facts[member])
                for member in facts
                if (server := members[member].server) is not None
            },
            reaches=[decode_reach(blob, str(members[r])) for r, blob in gathered.memory.items()],
            groups={blob: facts[member] for member, blob in gathered.holder.items()},
            group=gathered.holder.get(rank, 0),
        )
        sends = self._me.trainer is not None and session.origin is not None
        own = self._parts(session.origin) if sends and session.origin else {}
        target = self._target(self._sources)
        sharing, self._sharing = self._sharing, None  # from here on the plan's to close
        return make_planned(survey, self._settings, sharing, own, target, session.staging)

    def _compare_held(self, planned: Planned) -> list[m.HeldFold]:
        """Of a new plan: what this and other trainer ranks hold, digested before any byte moves.

        So ranks that hold different bytes under one name are refused. What drifts apart later is found by each
        update, while bytes move.
        """
        if not self._offer.verify or not planned.sent.shared:
            return []
        if self.copied:
            wait_for(self.copied.filled, self._look(time.monotonic() + self._offer.ready_s))
        seed = hashlib.sha256(b"weightbus held v1\0" + self._offer.plan.encode()).digest()
        sums = planned.sent.digest_held(seed)
        self._held_sums = planned.sent, sums
        return held_folds(planned.sent, sums, seed, planned.holders)

    # -- transfer and verification -----------------------------------------------------------------

    def go(self, go: m.Go) -> m.Outcome | None:
        """Run the plan and answer; the outcome, if the hub has ended the update meanwhile."""
        self._lap("ready")
        planned = self._planned
        self.seed = go.seed
        error = ""
        try:
            assert planned is not None, "ready was answered with this plan"
            self.session.recent = planned
            self._transfer(planned, go.seed)
        except Ended as ended:
            return ended.outcome
        except Exception as caught:
            error = explain(caught)
        self._done(error)
        return None

    def _transfer(self, planned: Planned, seed: bytes) -> None:
        session, progress, offer = self.session, self.progress, self._offer
        verify = offer.verify
        progress.tensors, progress.nbytes = len(planned.plan.specs), planned.nbytes
        progress.choice, progress.skipped = planned.choice, planned.skipped
        look = self._look(time.monotonic() + offer.transfer_s)

        def moved(nbytes: int) -> None:
            progress.moved += nbytes
            if progress.report:
                progress.report(progress.moved, progress.nbytes)

        route = self._route(planned)
        try:
            route.run(
                seed if verify else None,
                check=look,
                progress=moved,
                meanwhile=self._check_tensors,
                after=self.copied.filled if self.copied else None,
                pause_s=BACKGROUND_PAUSE_S if self.copied else 0.0,
            )
            if planned.target:
                planned.target.fill()
                if session.destination:
                    self._wrong += amiss(session.destination.audit.derive(planned.target, prove=verify))
        finally:
            progress.wrote |= route.wrote
        self._lap("transfer")
        if verify:
            begun = time.monotonic()
            planned.sent.collect()
            planned.live.collect()
            self._clock("digest", begun)
            self._lap("verify")

        def record(ledger: Ledger, target: Target | None, end: Origin | Destination | None) -> Record:
            return Record(
                version=offer.version,
                plan=offer.plan,
                seed=seed,
                ledger=ledger,
                sums=ledger.sums.copy(),
                group=planned.group,
                target=target,
                wants=planned.wants,
                former=end.former(ledger, offer.modules) if end else None,
            )

        self._evidence = [
            Evidence(
                sent=record(planned.sent, None, self.session.origin) if self._me.trainer is not None else None,
                live=record(planned.live, planned.target, self.session.destination)
                if self._me.server
                else None,
                holders=planned.holders,
            )
        ]

    def _route(self, planned: Planned) -> Broadcast | Peer:
        session, hooks = self.session, planned.target.hooks if planned.target else {}
        if isinstance(planned.compiled, CompiledPeer):
            return Peer(planned.compiled, session.lanes, hooks, planned.sent, planned.live)
        group = session.join_group(self._rank, len(self._offer.members), self._offer.transfer_s)
        self._lap("group")
        route = Broadcast(planned.compiled, group, session.lanes, hooks, planned.sent, planned.live)
        route.clock = self._clock
        return route

    def _check_tensors(self) -> None:
        """Raise if a tensor has changed its shape, strides or dtype in place: its bytes went by the old ones.

        Done while bytes move, when it costs no time. Whatever was replaced or moved was noticed before.
        """
        ends = (
            (self.session.origin, self._me.trainer is not None and self.copied is None),
            (self.session.destination, self._me.server is not None),
        )
        for end, takes_part in ends:
            if end is not None and takes_part and (name := end.changed()) is not None:
                raise UpdateError(f"{name}: {CHANGED_IN_PLACE}")

    def _look(self, deadline: float) -> Callable[[], None]:
        """A function to call while waiting: raises once the hub has ended the update, or too late."""
        look = look_at(self.session.link, self._heard_farewell)

        def look_in_time() -> None:
            look()
            if time.monotonic() > deadline:
                raise UpdateError(f"transfer: expected to end within {self._offer.transfer_s:.0f} s")

        return look_in_time

    def _heard_farewell(self, farewell: m.Farewell) -> None:
        self.farewell = farewell

    def _done(self, error: str = "") -> None:
        sent, held, live, wrong, hidden = [], [], [], list(self._wrong), []
        partial: dict[str, str] = {}
        exempt: dict[str, str] = {}
        if not error and (self._offer.verify or self._offer.kind == "check"):
            for job, evidence in enumerate(self._evidence):
                if evidence.sent:
                    if evidence.holders:
                        ledger, sums = evidence.sent.ledger, evidence.sent.sums
                        self._held_sums = ledger, sums
                        held += held_folds(ledger, sums, evidence.sent.seed, evidence.holders)
                    sent += [self._fold(job, evidence.sent, group) for group in evidence.sent.ledger.groups]
                if evidence.live:
                    live.append(self._fold(job, evidence.live, evidence.live.group))
                    if (target := evidence.live.target) is not None and (end := self.session.destination):
                        wrong += spoiled(target)
                        partial |= end.audit.unproved(target)
                        if self._offer.kind == "check":
                            hidden.append(hidden_sums(job, target, evidence.live.seed))
                            exempt |= target.exempt
        self.session.link.send(
            m.Done(
                peer=self.session.link.peer,
                sent=sent,
                held=held,
                live=live,
                partial=m.cut(partial),
                wrong=wrong,
                hidden=hidden,
                exempt=exempt,
                error=error,
                nbytes=self.progress.nbytes,
                starts=self._starts,
                stages=self.progress.stages | self._overlapping,
            )
        )
        self.finished = not error

    def _fold(self, job: int, record: Record, group: int) -> m.Fold:
        evidence = self._evidence[job]
        sums, nbytes = record.ledger.fold(
            record.sums, record.seed, group, evidence.chosen, live_only=evidence.live_only
        )
        due = record.ledger.due(group, evidence.chosen, evidence.live_only)
        return m.Fold(job=job, group=group, sums=sums, nbytes=nbytes, due=due)

    # -- checks ------------------------------------------------------------------------------------

    def _check(self, offer: m.Offer) -> None:
        """Digest again what is live, under the seeds of the versions; trainer ranks fold what they kept."""
        session, error = self.session, ""
        try:
            for job in offer.jobs:
                sent = session.origin.record(job) if self._me.trainer is not None and session.origin else None
                live = session.destination.record(job) if self._me.server and session.destination else None
                if live:
                    live.ledger.digest_live(job.seed)
                    live.sums[:] = live.ledger.sums
                    if live.target is not None and session.destination:
                        self._wrong += amiss(session.destination.audit.check(live.target))
                modules = None if job.modules is None else tuple(job.modules)
                chosen = Chosen(modules=modules, without=tuple(job.without))
                self._evidence.append(Evidence(sent=sent, live=live, chosen=chosen, live_only=True))
        except Exception as caught:
            error = explain(caught)
        self._lap("verify")
        self._done(error)

    def _label(self) -> None:
        """What is live is to count as another version; not if it is a mixture."""
        destination = self.session.destination if self._me.server else None
        torn = destination is not None and destination.state == "torn"
        self._done("expected weights of one version, this rank is torn" if torn else "")

    def detail(self, detail: m.Detail) -> None:
        """Sums of the single tensors where folds differ."""
        sent, live = tensor_sums(self._evidence, detail.groups)
        held = held_sums(*self._held_sums, detail.held) if self._held_sums else []
        peer = self.session.link.peer
        self.session.link.send(m.Sums(peer=peer, sent=sent, live=live, held=held))

    @property
    def _held(self) -> Mapping[str, Sequence[Part]]:
        return self._parts(self.session.origin) if self.session.origin else {}

    def suspects(self, suspects: m.Suspects) -> None:
        """What this rank knows of tensors that are wrong somewhere."""
        try:
            clues = [clue(self._evidence, suspect, self._held) for suspect in suspects.suspects]
        except Exception as caught:
            # The verdict stands without them.
            log.warning("clues: %s", explain(caught))
            clues = []
        peer = self.session.link.peer
        self.session.link.send(m.Clues(peer=peer, clues=clues))

    def probe(self, probe: m.Probe) -> None:
        """Sums of boxes of them."""
        sums, error = [], ""
        try:
            sums = [answer(self._evidence, question, self._held) for question in probe.questions]
        except Exception as caught:
            error = explain(caught)
        peer = self.session.link.peer
        self.session.link.send(m.Probed(peer=peer, sums=sums, error=error))

    # -- the end -----------------------------------------------------------------------------------

    def ended(self, outcome: m.Outcome) -> None:
        """Take over the outcome; called once, whatever the round's end. The engine's callback comes last."""
        offer, destination = self.offer, self.session.destination
        self._lap("commit")
        if offer is None or offer.kind == "check":
            return
        try:
            self._take_over(outcome, offer)
        finally:
            if offer.kind == "update" and destination is not None and (not offer.members or self._me.server):
                destination.after(outcome, offer.version, offer.modules, self.progress.wrote)

    def _take_over(self, outcome: m.Outcome, offer: m.Offer) -> None:
        session = self.session
        if outcome.ok:
            session.seal(self.seed, outcome, offer.version)
        if offer.kind == "label":
            for labelled in (session.origin, session.destination):
                if labelled is not None and outcome.ok:
                    labelled.label(offer.version)
            return
        if not outcome.ok and outcome.moved:
            # Transfers may be pending, and nothing may arrive any more once the outcome is known.
            session.drop_group(abort=True)
            if not session.lanes.drain(SLACK_S):
                log.error("copies of a failed update were still under way after %.0f s", SLACK_S)
            # The epoch is over, and what the plans have mapped may be memory of a rank that has died.
            session.forget_plans()
        if outcome.ok:
            (evidence,) = self._evidence
            for end, record in ((session.origin, evidence.sent), (session.destination, evidence.live)):
                if end is not None and record is not None:
                    end.commit(record, offer.modules) if offer.verify else end.forget(offer.modules)


def look_at(link: Link | Loopback, farewell: Callable[[m.Farewell], None]) -> Callable[[], None]:
    """A function to call while working, as often as one likes: raises Ended once the hub has ended the round.

    farewell: told of one that comes meanwhile, which must not hide what comes behind it.
    """
    next_look = time.monotonic() + LOOK_S

    def look() -> None:
        nonlocal next_look
        now = time.monotonic()
        if now < next_look:
            return
        next_look = now + LOOK_S
        message = link.receive(0)
        if isinstance(message, m.Outcome):
            raise Ended(message)
        if isinstance(message, m.Farewell):
            farewell(message)
        elif isinstance(message, m.Polled):
            log.info("late: %s", type(message).__name__)  # it must not hide what comes behind it
        elif message is not None:
            link.push_back(message)

    return look


def explain(error: BaseException) -> str:
    """The reason that travels: never more than a message takes, be it that thousands of names are in it."""
    text = str(error)
    if not isinstance(error, WeightbusError):
        kind = type(error).__name__
        text = f"{kind}: {text}" if text else f"interrupted by {kind}"
    if (more := len(text) - MAX_REASON_CHARACTERS) > 0:
        text = f"{text[:MAX_REASON_CHARACTERS]}... ({more} more characters)"
    return text.encode(errors="backslashreplace").decode()
