"""One rank's part in one update or check: its answer to each of the hub's messages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from weightbus.control import messages as m
from weightbus.routes.compiled import Planned
from weightbus.routes.group import GroupError
from weightbus.session.agreement import Agreement, plan_seed
from weightbus.session.context import Context
from weightbus.session.destination import OtherVersion
from weightbus.session.donor import as_committed
from weightbus.session.giving_up import answer, explain
from weightbus.session.hearing import SLACK_S, Ended
from weightbus.session.origin import SourceCopy
from weightbus.session.progress import Progress, Stages
from weightbus.session.transfer import Transfer
from weightbus.session.verification import Verification

log = logging.getLogger("weightbus")


class Participant:
    """State of this rank from the offer to the outcome.

    seed: of the update, once bytes may move. finished: this rank has done its part of it.
    """

    def __init__(self, context: Context, progress: Progress, copied: SourceCopy | None) -> None:
        self.context, self.progress, self.copied = context, progress, copied
        self.offer: m.Offer | None = None
        self.limit_s = SLACK_S
        self.seed: bytes | None = None
        self.finished = False
        self._committed_group = 0
        self._stages = Stages(progress.stages)
        self._agreement = Agreement(context, copied)
        self._verification = Verification(context)

    def close(self) -> None:
        self._agreement.close()

    @property
    def _offer(self) -> m.Offer:
        assert self.offer is not None, "the hub sends the offer first"  # noqa: S101 - for mypy
        return self.offer

    @property
    def rank(self) -> str:
        """This rank, for messages."""
        return str(self.context.me) if self.offer else "this rank"

    @property
    def moved(self) -> bool:
        """Whether bytes may have been written somewhere."""
        return self.seed is not None

    @property
    def _planned(self) -> Planned | None:
        return self.context.plans.get(self._offer.plan)

    # -- offer and plan ----------------------------------------------------------------------------

    def look_ahead(self) -> None:
        """Trainer ranks, while the hub's offer is on the way."""
        self._agreement.look_ahead()

    def offered(self, offer: m.Offer) -> None:
        """A second offer in one round says that the plan has to be made anew."""
        offer = self.context.enter_epoch(offer)
        first, self.offer = self.offer is None, offer
        self.limit_s = offer.ready_s + offer.transfer_s + SLACK_S
        if first:
            self._stages.offered()
        match offer.kind:
            case "check":
                self._check(offer)
            case "label":
                self._label()
            case _:
                answer(self.context.link, partial(self._agree, offer, first))

    def _agree(self, offer: m.Offer, first: bool) -> m.Message | None:
        if first:
            self._agreement.look(offer)
        return self._agreement.offered(offer)

    def gathered(self, gathered: m.Gathered) -> None:
        answer(self.context.link, partial(self._agreement.gathered, self._offer, gathered))

    # -- transfer and verification -----------------------------------------------------------------

    def go(self, go: m.Go) -> None:
        """Run the plan and answer. Raises Ended if the hub has ended the update meanwhile."""
        self._stages.lap("ready")
        context, offer, planned = self.context, self._offer, self._planned
        self.seed, self._committed_group = go.seed, go.group
        error, symptom, apart = "", False, list[int]()
        try:
            assert planned is not None, "ready was answered with this plan"  # noqa: S101 - for mypy
            context.plans.recent = planned
            origin = self._agreement.origin
            beside = origin.layout.beside_of(offer.modules) if origin is not None else {}
            self.progress.skipped = beside | dict(planned.skipped)
            transfer = Transfer(context, offer, self.copied, self.progress, self._stages)
            evidence, self._verification.wrong = transfer.run(planned, go.seed)
            self._verification.evidence = [evidence]
        except Ended:
            raise
        except GroupError as caught:
            error, symptom, apart = explain(caught), True, list(caught.apart)
        except Exception as caught:
            error = explain(caught)
        self._done(error, symptom=symptom, apart=apart)

    def _check(self, offer: m.Offer) -> None:
        error, other_version = "", False
        try:
            self._verification.check(offer)
        except Exception as caught:
            error, other_version = explain(caught), isinstance(caught, OtherVersion)
        self._stages.lap("verify")
        self._done(error, other_version=other_version)

    def _label(self) -> None:
        """What is live is to count as another version; not if it is a mixture."""
        destination = self.context.destination if self.context.me.server else None
        torn = destination is not None and destination.state == "torn"
        self._done("expected weights of one version, this rank is torn" if torn else "")

    def _done(
        self, error: str = "", *, symptom: bool = False, apart: Sequence[int] = (), other_version: bool = False
    ) -> None:
        check = self._offer.kind == "check"
        if not error and (self._offer.verify or check):
            done = self._verification.done(check=check)
        else:
            done = m.Done(peer=self.context.link.peer, wrong=list(self._verification.wrong))
        done.error, done.symptom, done.other_version = error, symptom, other_version
        done.apart = list(apart)
        done.nbytes = self.progress.nbytes
        done.starts, done.stages = self._stages.starts, self._stages.seconds | self._stages.overlapping
        self.context.link.send(done)
        self.finished = not error

    def detail(self, detail: m.Detail) -> None:
        """Sums of the single tensors where folds differ."""
        offer, planned = self._offer, self._planned if self._offer.kind == "update" else None
        seed = self.seed or plan_seed(offer.plan)
        self.context.link.send(self._verification.sums(detail, planned, seed))

    def suspects(self, suspects: m.Suspects) -> None:
        self.context.link.send(self._verification.clues(suspects.suspects, self._agreement.parts()))

    def probe(self, probe: m.Probe) -> None:
        self.context.link.send(self._verification.boxes(probe.questions, self._agreement.parts()))

    # -- the end -----------------------------------------------------------------------------------

    def ended(self, outcome: m.Outcome) -> None:
        """Take over the outcome; called once, whatever the round's end. The engine's callback comes last."""
        offer, destination = self.offer, self.context.destination
        self._stages.lap("commit")
        if offer is None or offer.kind == "check":
            return
        try:
            self._take_over(outcome, offer)
        finally:
            if offer.kind in m.MOVES and destination is not None and self.context.me.server is not None:
                destination.after(outcome, offer.version, offer.modules, self.progress.wrote)

    def _take_over(self, outcome: m.Outcome, offer: m.Offer) -> None:
        context = self.context
        if offer.kind == "label":
            for labelled in (context.origin, context.destination):
                if labelled is not None and outcome.ok:
                    labelled.label(offer.version)
            return
        if not outcome.ok and outcome.moved:
            # Transfers may be pending, and nothing may arrive any more once the outcome is known.
            context.drop_group(abort=True)
            if not context.lanes.drain(SLACK_S):
                log.error("copies of a failed update were still under way after %.0f s", SLACK_S)
            # The epoch is over, and what the plans have mapped may be memory of a rank that has died.
            context.plans.clear()
        if outcome.ok:
            (evidence,) = self._verification.evidence
            live = evidence.live
            if offer.kind == "catch_up" and live is not None:
                live = as_committed(live, offer.jobs[0], self._committed_group)
            for end, record in ((context.origin, evidence.sent), (context.destination, live)):
                if end is not None and record is not None:
                    end.commit(record, offer.modules) if offer.verify else end.forget(offer.modules)
