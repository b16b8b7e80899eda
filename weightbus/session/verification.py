"""What one rank answers of the digests of a round, from their sums down to boxes of single tensors."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from weightbus.control import messages as m
from weightbus.digest.ledger import Chosen, Record
from weightbus.routes.compiled import Planned
from weightbus.session.context import Context
from weightbus.session.evidence import (
    Evidence,
    Held,
    amiss,
    answer,
    clue,
    digest_shared,
    held_folds,
    held_sums,
    hidden_sums,
    spoiled,
    tensor_sums,
)
from weightbus.session.giving_up import explain

log = logging.getLogger("weightbus")


class Verification:
    """Of one round. evidence: of each job; an update is one job. wrong: what this rank itself has found."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.evidence: list[Evidence] = []
        self.wrong: list[m.Wrong] = []

    def check(self, offer: m.Offer) -> None:
        """Digest again what is live, under the seeds of the versions; trainer ranks fold what they kept.

        Raises OtherVersion where this rank holds other weights than those of a job.
        """
        context, me = self._context, self._context.me
        for job in offer.jobs:
            sent = context.origin.record(job) if me.trainer is not None and context.origin else None
            live = context.destination.record(job) if me.server and context.destination else None
            if live:
                live.ledger.digest_live(job.seed)
                live.sums[:] = live.ledger.sums
                if live.target is not None and context.destination:
                    self.wrong += amiss(context.destination.audit.check(live.target))
            modules = None if job.modules is None else tuple(job.modules)
            chosen = Chosen(modules=modules, without=tuple(job.without))
            self.evidence.append(Evidence(sent=sent, live=live, chosen=chosen, live_only=True))

    def done(self, *, check: bool) -> m.Done:
        """What the hub compares."""
        done = m.Done(peer=self._context.link.peer, wrong=list(self.wrong))
        partial: dict[str, str] = {}
        for job, one in enumerate(self.evidence):
            if sent := one.sent:
                if one.holders:
                    done.held += held_folds(sent.ledger, sent.sums, sent.seed, one.holders)
                done.sent += [self._fold(job, sent, group) for group in sent.ledger.groups]
            if live := one.live:
                done.live.append(self._fold(job, live, live.group))
                if (target := live.target) is not None and (end := self._context.destination):
                    done.wrong += spoiled(target)
                    partial |= end.audit.unproved(target)
                    if check:
                        done.hidden.append(hidden_sums(job, target, live.seed))
                        done.exempt |= target.exempt
        done.partial = m.cut(partial)
        return done

    def _fold(self, job: int, record: Record, group: int) -> m.Fold:
        one = self.evidence[job]
        sums, nbytes = record.ledger.fold(record.sums, record.seed, group, one.chosen, live_only=one.live_only)
        due = record.ledger.due(group, one.chosen, one.live_only)
        return m.Fold(job=job, group=group, sums=sums, nbytes=nbytes, due=due)

    # -- where they differ -------------------------------------------------------------------------

    def sums(self, detail: m.Detail, planned: Planned | None, seed: bytes) -> m.Sums:
        """Of the single tensors where folds differ. planned, seed: of an update."""
        sent, live = tensor_sums(self.evidence, detail.groups)
        held: list[m.HeldSums] = []
        if planned is not None and planned.shared:
            held = self._held_sums(detail, planned, seed)
        return m.Sums(peer=self._context.link.peer, sent=sent, live=live, held=held)

    def _held_sums(self, detail: m.Detail, planned: Planned, seed: bytes) -> list[m.HeldSums]:
        """Of what other trainer ranks hold too, be it that this one only sent it and did not digest it."""
        try:
            groups = {group for _, group in detail.groups}
            return held_sums(digest_shared(planned, seed), groups, detail.held)
        except Exception as caught:
            # The verdict stands without them.
            log.warning("what other trainer ranks hold too: %s", explain(caught))
            return []

    def clues(self, suspects: Sequence[m.Suspect], source: Held) -> m.Clues:
        """What this rank knows of tensors that are wrong somewhere. source: where what it sends lies now."""
        try:
            clues = [clue(self.evidence, suspect, source) for suspect in suspects]
        except Exception as caught:
            # The verdict stands without them.
            log.warning("clues: %s", explain(caught))
            clues = []
        return m.Clues(peer=self._context.link.peer, clues=clues)

    def boxes(self, questions: Sequence[m.Question], source: Held) -> m.Probed:
        """Sums of boxes of them."""
        sums, error = [], ""
        try:
            sums = [answer(self.evidence, question, source) for question in questions]
        except Exception as caught:
            error = explain(caught)
        return m.Probed(peer=self._context.link.peer, sums=sums, error=error)
