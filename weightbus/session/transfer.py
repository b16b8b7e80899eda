"""A plan as it runs on one rank: bytes move, and what this rank can prove of them remains."""

from __future__ import annotations

import time
from collections.abc import Callable

from weightbus.control import messages as m
from weightbus.digest.ledger import Ledger, Record
from weightbus.errors import UpdateError
from weightbus.planning.reshard_plan import ReshardPlan
from weightbus.routes.broadcast import Broadcast
from weightbus.routes.compiled import Planned
from weightbus.routes.group import GroupError
from weightbus.routes.peer import CompiledPeer, Peer
from weightbus.routes.reshard import Reshard
from weightbus.routes.waves import Waves
from weightbus.session.context import Context
from weightbus.session.destination import Destination
from weightbus.session.evidence import Evidence, amiss
from weightbus.session.hearing import look_at
from weightbus.session.origin import Origin, SourceCopy
from weightbus.session.progress import Progress, Stages
from weightbus.tensors.install import Target

# An update in the background looks this often whether bytes have moved, and leaves the interpreter alone.
BACKGROUND_PAUSE_S = 0.0005

CHANGED_IN_PLACE = "expected shape, strides and dtype as planned, got others at the same address"


class Transfer:
    """Of one update or catch-up. copied: what a trainer rank sends instead of its live source."""

    def __init__(
        self,
        context: Context,
        offer: m.Offer,
        copied: SourceCopy | None,
        progress: Progress,
        stages: Stages,
    ) -> None:
        self._context, self._offer, self._copied = context, offer, copied
        self._progress, self._stages = progress, stages

    def run(self, planned: Planned, seed: bytes) -> tuple[Evidence, list[m.Wrong]]:
        """What both ends have digested here, and what this rank itself finds wrong.

        Raises Ended once the hub has ended the round, GroupError for a transfer that has failed or stalled,
        UpdateError for tensors that have changed in place.
        """
        progress, verify, wrong = self._progress, self._offer.verify, list[m.Wrong]()
        progress.tensors, progress.nbytes = len(planned.plan.specs), planned.nbytes
        progress.choice = planned.choice
        look = self._look(time.monotonic() + self._offer.transfer_s)
        route = self._route(planned, look)
        try:
            route.run(
                seed if verify else None,
                check=look,
                progress=progress.move,
                meanwhile=self._check_tensors,
                after=self._copied.filled if self._copied else None,
                pause_s=BACKGROUND_PAUSE_S if self._copied else 0.0,
            )
            if planned.target:
                planned.target.fill()
                if destination := self._context.destination:
                    wrong = amiss(destination.audit.derive(planned.target, prove=verify))
        finally:
            progress.wrote |= route.wrote
        self._stages.lap("transfer")
        if verify:
            begun = time.monotonic()
            planned.sent.collect()
            planned.live.collect()
            self._stages.clock("digest", begun)
            self._stages.lap("verify")
        return self._evidence(planned, seed), wrong

    def _route(self, planned: Planned, look: Callable[[], None]) -> Waves | Peer:
        lanes, hooks = self._context.lanes, planned.target.hooks if planned.target else {}
        if isinstance(planned.compiled, CompiledPeer):
            return Peer(planned.compiled, lanes, hooks, planned.sent, planned.live)
        group = self._context.join_group(self._offer.transfer_s, look)
        self._stages.lap("group")
        kind = Reshard if isinstance(planned.plan, ReshardPlan) else Broadcast
        route = kind(planned.compiled, group, lanes, hooks, planned.sent, planned.live)
        route.clock = self._stages.clock
        return route

    def _look(self, deadline: float) -> Callable[[], None]:
        """A function to call while waiting: raises once the hub has ended the update, or too late."""
        look = look_at(self._context.link, self._context.aside)

        def look_in_time() -> None:
            look()
            if time.monotonic() > deadline:
                raise GroupError(f"transfer: expected to end within {self._offer.transfer_s:.0f} s")

        return look_in_time

    def _check_tensors(self) -> None:
        """Raise if a tensor has changed its shape, strides or dtype in place: its bytes went by the old ones.

        Done while bytes move, when it costs no time. Whatever was replaced or moved was noticed before.
        """
        me = self._context.me
        ends = (
            (self._context.origin, me.trainer is not None and self._copied is None),
            (self._context.destination, me.server is not None or me.donor is not None),
        )
        for end, takes_part in ends:
            if end is not None and takes_part and (name := end.changed()) is not None:
                raise UpdateError(f"{name}: {CHANGED_IN_PLACE}")

    def _evidence(self, planned: Planned, seed: bytes) -> Evidence:
        offer, context, me = self._offer, self._context, self._context.me

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

        return Evidence(
            sent=record(planned.sent, None, context.origin) if me.trainer is not None else None,
            live=record(planned.live, planned.target, context.destination) if me.server else None,
            holders=planned.holders,
        )
