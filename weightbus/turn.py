"""One rank's turn in one update or check: its answer to each of the hub's messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weightbus import messages as m
from weightbus.broadcast import IN_FLIGHT, Broadcast, on_side_stream, synchronise
from weightbus.bucket import Compiled, compile_steps
from weightbus.errors import ProtocolError, UpdateError, WeightbusError
from weightbus.facts import Facts, decode_facts, encode_facts
from weightbus.install import Target
from weightbus.ledger import LIVE, Entry, Ledger, Record, Stage, live_entries, sent_entries
from weightbus.plan import Plan, Want, merge_sources, plan_broadcast
from weightbus.spec import Spec

if TYPE_CHECKING:
    from weightbus.session import Session

# The hub ends every phase by its own deadline; a rank allows it this much more.
SLACK_S = 30.0

# How often a rank that is moving bytes looks at what the hub says.
LOOK_S = 0.02


class Ended(WeightbusError):
    """The hub has ended the update while this rank was still working on it."""

    def __init__(self, outcome: m.Outcome) -> None:
        super().__init__("the update has ended")
        self.outcome = outcome


@dataclass(slots=True, kw_only=True)
class Planned:
    """A plan, compiled for this rank, with what it digests. group: this server rank's."""

    plan: Plan
    compiled: Compiled
    target: Target | None
    sent: Ledger
    live: Ledger
    group: int


@dataclass(slots=True, kw_only=True)
class Progress:
    """What this rank has done so far; ``report(done, total)`` is called as bytes move."""

    report: Callable[[int, int], None] | None = None
    stages: dict[str, float] = field(default_factory=dict)
    tensors: int = 0
    nbytes: int = 0
    moved: int = 0
    wrote: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What this rank can fold for one job: of what it sent, of what it holds live."""

    sent: Record | None
    live: Record | None
    modules: Sequence[str] | None = None
    live_only: bool = False


class Turn:
    """State of this rank from the offer to the outcome."""

    def __init__(self, session: Session, progress: Progress) -> None:
        self.session, self.progress = session, progress
        self.offer: m.Offer | None = None
        self.limit_s = SLACK_S
        self._sources: m.Gathered | None = None
        self._evidence: list[Evidence] = []
        # The update's seed, once bytes may move; whether this rank has done its part of it.
        self.seed: bytes | None = None
        self.finished = False
        self._starts: dict[str, float] = {}
        self._overlapping: dict[str, float] = {}
        self._offered = self._begun = time.monotonic()

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
        self.session.link.send(m.Refuse(peer=peer, update=self._offer.update, reason=explain(error)))

    def _ready(self, planned: Planned | None) -> None:
        """Ready with this plan; without one, facts must be exchanged again."""
        self.session.link.send(
            m.Ready(
                peer=self.session.link.peer,
                update=self._offer.update,
                plan=planned.plan.fingerprint if planned else "",
                stale=planned is None,
            )
        )

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
        if first and self._me.server and session.destination:
            try:
                if session.destination.refresh():
                    session.forget_plans()
                session.destination.before(offer.version)
            except Exception as error:
                return self._refuse(error)
        if offer.planned:
            self._ready(session.plan(offer.plan))
        elif self._me.trainer is not None and session.origin:
            blob = session.origin.blob(offer.modules)
            session.link.send(m.Facts(peer=session.link.peer, update=offer.update, blob=blob))
        return None

    def gathered(self, gathered: m.Gathered) -> None:
        session = self.session
        try:
            if gathered.of == "wants":
                planned = self._plan(gathered)
                session.keep_plan(self._offer.plan, planned)
                self._ready(planned)
                return
            self._sources = gathered
            if (target := self._target(gathered)) is not None:
                blob = encode_facts(target.facts())
                session.link.send(m.Facts(peer=session.link.peer, update=self._offer.update, blob=blob))
        except Exception as error:
            self._refuse(error)

    def _decode(self, gathered: m.Gathered) -> dict[int, Facts]:
        """Each group rank's facts; equal ones are decoded once."""
        sender = {blob: self._offer.members[rank] for rank, blob in gathered.holder.items()}
        decoded = [decode_facts(blob, str(sender[i])) for i, blob in enumerate(gathered.blobs)]
        return {rank: decoded[blob] for rank, blob in gathered.holder.items()}

    def _target(self, sources: m.Gathered) -> Target | None:
        if not self._me.server or not self.session.destination:
            return None
        return self.session.destination.target(merge_sources(self._decode(sources)), self._offer.modules)

    def _plan(self, gathered: m.Gathered) -> Planned:
        """The plan, alike on all ranks, and this rank's compiled part of it."""
        session, members, rank = self.session, self._offer.members, self._rank
        if self._sources is None:
            raise ProtocolError("wants: expected the sources first")
        facts = self._decode(gathered)
        wants = [
            Want(replica=server.replica, rank=server.rank, facts=facts[member])
            for member in facts
            if (server := members[member].server) is not None
        ]
        bucket_bytes = int(self._offer.settings)
        plan = plan_broadcast(self._decode(self._sources), wants, bucket_bytes=bucket_bytes)
        target = self._target(self._sources)
        sends = self._me.trainer is not None and session.origin is not None
        compiled = compile_steps(
            plan,
            rank,
            source=session.origin.layout.parts if sends and session.origin else {},
            target=target,
            staging=session.staging,
            in_flight=IN_FLIGHT,
        )
        groups = {blob: facts[member] for member, blob in gathered.holder.items()}
        group = gathered.holder.get(rank, 0)
        return Planned(
            plan=plan,
            compiled=compiled,
            target=target,
            sent=Ledger(_sent(plan, compiled, rank, groups)),
            live=Ledger(live_entries(target, compiled.whole, group) if target else []),
            group=group,
        )

    # -- transfer and verification -----------------------------------------------------------------

    def go(self, go: m.Go) -> m.Outcome | None:
        """Run the plan and answer; the outcome, if the hub has ended the update meanwhile."""
        self._lap("ready")
        planned = self.session.plan(self._offer.plan)
        self.seed = go.seed
        error = ""
        try:
            assert planned is not None, "ready was answered with this plan"
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
        progress.tensors, progress.nbytes = len(planned.plan.specs), planned.plan.nbytes
        look = self._look(time.monotonic() + offer.transfer_s)

        def moved(nbytes: int) -> None:
            progress.moved += nbytes
            if progress.report:
                progress.report(progress.moved, progress.nbytes)

        group = session.join_group(self._rank, len(offer.members), offer.transfer_s)
        self._lap("group")
        route = Broadcast(planned.compiled, group, planned.target.hooks if planned.target else {})

        def digest(ledger: Ledger, stage: Stage) -> None:
            if verify:
                begun = time.monotonic()
                ledger.digest(stage, seed)
                self._clock("digest", begun)

        with on_side_stream(session.device):
            try:
                route.run(
                    look,
                    packed=lambda step: digest(planned.sent, step),
                    arrived=lambda wire: digest(planned.live, wire),
                    progress=moved,
                    clock=self._clock,
                )
                synchronise(session.device, look)
            finally:
                progress.wrote |= route.wrote
            self._lap("transfer")
            digest(planned.sent, LIVE)
            digest(planned.live, LIVE)
            if verify:
                self._lap("verify")

        def record(ledger: Ledger, target: Target | None) -> Record:
            return Record(
                version=offer.version,
                plan=offer.plan,
                seed=seed,
                ledger=ledger,
                sums=ledger.sums.copy(),
                group=planned.group,
                target=target,
            )

        self._evidence = [
            Evidence(
                sent=record(planned.sent, None) if self._me.trainer is not None else None,
                live=record(planned.live, planned.target) if self._me.server else None,
            )
        ]

    def _look(self, deadline: float) -> Callable[[], None]:
        """A function to call while waiting: raises once the hub has ended the update, or too late."""
        next_look = 0.0

        def look() -> None:
            nonlocal next_look
            now = time.monotonic()
            if now < next_look:
                return
            next_look = now + LOOK_S
            message = self.session.link.receive(0)
            if isinstance(message, m.Outcome):
                raise Ended(message)
            if message is not None:
                self.session.link.push_back(message)
            if now > deadline:
                raise UpdateError(f"transfer: expected to end within {self._offer.transfer_s:.0f} s")

        return look

    def _done(self, error: str = "") -> None:
        sent, live, wrong = [], [], []
        arrived: dict[str, str] = {}
        if not error and (self._offer.verify or self._offer.kind == "check"):
            for job, evidence in enumerate(self._evidence):
                if evidence.sent:
                    sent += [self._fold(job, evidence.sent, group) for group in evidence.sent.ledger.groups]
                if evidence.live:
                    live.append(self._fold(job, evidence.live, evidence.live.group))
                    if (target := evidence.live.target) is not None:
                        arrived |= target.arrived()
                        wrong += target.spoiled_fills()
        self.session.link.send(
            m.Done(
                peer=self.session.link.peer,
                update=self._offer.update,
                sent=sent,
                live=live,
                arrived=arrived,
                wrong=wrong,
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
            record.sums, record.seed, group, evidence.modules, live_only=evidence.live_only
        )
        return m.Fold(job=job, group=group, sums=sums, nbytes=nbytes)

    # -- checks ------------------------------------------------------------------------------------

    def _check(self, offer: m.Offer) -> None:
        """Digest again what is live, under the seeds of the versions; trainer ranks fold what they kept."""
        session, error = self.session, ""
        try:
            for job in offer.jobs:
                sent = session.origin.record(job) if self._me.trainer is not None and session.origin else None
                live = session.destination.record(job) if self._me.server and session.destination else None
                if live:
                    live.ledger.digest(LIVE, job.seed)
                    live.sums[:] = live.ledger.sums
                self._evidence.append(Evidence(sent=sent, live=live, modules=job.modules, live_only=True))
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
        sent: list[m.TensorSums] = []
        live: list[m.TensorSums] = []
        for job, group in detail.groups:
            evidence = self._evidence[job]
            for record, found in ((evidence.sent, sent), (evidence.live, live)):
                if record and (record is evidence.sent or record.group == group):
                    sums = record.ledger.by_tensor(
                        record.sums, group, evidence.modules, live_only=evidence.live_only
                    )
                    found.append(m.TensorSums(job=job, group=group, sums=sums))
        peer = self.session.link.peer
        self.session.link.send(m.Sums(peer=peer, update=self._offer.update, sent=sent, live=live))

    # -- the end -----------------------------------------------------------------------------------

    def ended(self, outcome: m.Outcome) -> m.Outcome:
        """Take over the outcome; the engine's callbacks run here."""
        session, offer = self.session, self.offer
        self._lap("commit")
        if offer is None or offer.kind == "check":
            return outcome
        if outcome.ok:
            session.seal(self.seed, outcome, offer.version)
        if offer.kind == "label":
            for labelled in (session.origin, session.destination):
                if labelled is not None and outcome.ok:
                    labelled.label(offer.version)
            return outcome
        if not outcome.ok and outcome.moved:
            # Transfers may be pending, and nothing may arrive any more once the outcome is known.
            session.drop_group(abort=True)
        if outcome.ok:
            (evidence,) = self._evidence
            for end, record in ((session.origin, evidence.sent), (session.destination, evidence.live)):
                if end is not None and record is not None:
                    end.commit(record, offer.modules) if offer.verify else end.forget(offer.modules)
        if self._me.server and session.destination:
            session.destination.after(outcome, offer.version, offer.modules, self.progress.wrote)
        return outcome


def _sent(plan: Plan, compiled: Compiled, rank: int, groups: Mapping[int, Facts]) -> list[Entry]:
    """Entries for everything that this rank sends: where it lies, or as cast in its bucket."""
    specs: dict[str, Spec] = {spec.name: spec for spec in plan.specs}
    wants = [groups[group] for group in sorted(groups)]
    entries = []
    for index, step in enumerate(compiled.steps):
        if step.src != rank:
            continue
        for i, (name, box, view) in enumerate(step.boxes):
            stage: Stage = LIVE
            if step.bucket is not None:
                source = step.pack.src[i]
                stage, view = (LIVE, source) if source.dtype == view.dtype else (index, view)
            entries += sent_entries(name, specs[name], box, view, stage, wants)
    return entries


def explain(error: Exception) -> str:
    return str(error) if isinstance(error, WeightbusError) else f"{type(error).__name__}: {error}"
