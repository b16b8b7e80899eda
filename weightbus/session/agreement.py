"""How the ranks of a round come to one plan: what each holds and wants, and this rank's compiled part of it."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Sequence

from weightbus.control import messages as m
from weightbus.errors import ProtocolError, SpecError
from weightbus.memory.streams import wait_for
from weightbus.planning.exports import Exports, decode_exports, decode_reach
from weightbus.planning.facts import Facts, decode_facts, encode_facts, ties_of
from weightbus.planning.plan import Want, merge_sources
from weightbus.routes.compiled import Planned, Survey, make_planned
from weightbus.routes.sharing import Look, Sharing
from weightbus.session.context import Context
from weightbus.session.donor import Donor, wants_id
from weightbus.session.evidence import digest_shared, held_folds
from weightbus.session.origin import Origin, SourceCopy
from weightbus.tensors.install import Target
from weightbus.tensors.layout import Part, renamed_parts


class Agreement:
    """One rank's part in it: what it answers to an offer, to all sources, and to all that is wanted of them.

    Whatever is raised here refuses the round, and nothing has been written.
    """

    def __init__(self, context: Context, copied: SourceCopy | None) -> None:
        self._context, self._copied = context, copied
        self._looked = False
        self._seen: tuple[Sharing, Look] | None = None  # of the plan that ran last, looked at ahead
        self._donor: Donor | None = None  # of a catch-up, in which this rank is a source
        self._sharing: Sharing | None = None
        self._sources: m.Gathered | None = None

    def close(self) -> None:
        """Give back what was mapped for a plan that was not made."""
        sharing, self._sharing = self._sharing, None
        if sharing is not None:
            sharing.close()

    @property
    def origin(self) -> Origin | Donor | None:
        """What this rank sends."""
        return self._donor or self._context.origin

    def parts(self) -> dict[str, tuple[Part, ...]]:
        """What this rank sends, by all names of its tensors."""
        if (origin := self.origin) is None:
            return {}
        parts = self._copied.frozen.parts if self._copied else origin.layout.parts
        return parts | renamed_parts(parts, origin.layout.aliases)

    # -- tensors that may have changed -------------------------------------------------------------

    def look_ahead(self) -> None:
        """Trainer ranks, once the hub has been told and while its offer is on the way: look at its tensors."""
        # What is wrong, be it in the source's own code, is said when there is an offer to refuse.
        with contextlib.suppress(Exception):
            self._look_at_source()
            self._looked = True
            if (recent := self._context.plans.recent) is not None and self._copied is None:
                self._seen = recent.sharing, recent.sharing.look()

    def look(self, offer: m.Offer) -> None:
        """Notice those that were replaced or moved; then the engine stops using the weights."""
        context = self._context
        if context.me.trainer is not None and not self._looked:
            self._look_at_source()
        if context.me.server and context.destination:
            if context.destination.refresh():
                context.plans.clear()
            context.destination.before(offer.version)

    def _look_at_source(self) -> None:
        origin = self._context.origin
        if origin is not None and self._copied is None and origin.refresh():
            self._context.plans.clear()

    def _look_at_tree(self, offer: m.Offer) -> None:
        """Server ranks: what the model holds besides its parameters may be more than when the plan was made."""
        planned, destination = self._context.plans.get(offer.plan), self._context.destination
        if planned is not None and planned.target is not None and destination is not None:
            looked_again = destination.audit.again(planned.target, verify=offer.verify)
            if looked_again and destination.loads_otherwise(planned.target):
                self._context.plans.clear()

    # -- answers -----------------------------------------------------------------------------------

    def offered(self, offer: m.Offer) -> m.Ready | m.Facts | None:
        """Whether the plan that is offered still holds here; where there is none, what a source holds."""
        context, me = self._context, self._context.me
        if offer.planned:
            self._look_at_tree(offer)
            return self._ready(offer)
        self.close()
        both = me.trainer is not None and me.server is not None
        self._sharing = Sharing(context.device, offer.settings.route, both=both)
        if me.donor is not None and context.destination is not None:
            self._donor = Donor(context.destination, offer.jobs[0])
        if me.trainer is None or (origin := self.origin) is None:
            return None
        if isinstance(origin, Origin) and self._copied:
            blob, _ = origin.facts(offer.modules, self._copied.frozen.dtypes)
        else:
            blob, _ = origin.facts(offer.modules)
        layout, parts = origin.layout.select(offer.modules), self.parts()
        memory = self._sharing.export({name: parts[name] for name in (*layout.specs, *layout.aliases)})
        return m.Facts(peer=context.link.peer, blob=blob, memory=memory)

    def gathered(self, offer: m.Offer, gathered: m.Gathered) -> m.Ready | m.Facts | None:
        """Of all sources: what this server rank wants. Of all that is wanted: the plan."""
        if gathered.of == "wants":
            planned = self._plan(offer, gathered)
            self._context.plans.keep(offer.plan, planned)
            return self._ready(offer, self._held_folds(offer, planned))
        self._sources = gathered
        if (target := self._target(offer, gathered)) is None or self._context.destination is None:
            return None
        self._context.destination.audit.begin(target, verify=offer.verify)
        assert self._sharing is not None, "made with the offer"  # noqa: S101 - for mypy
        to_host = any(part.device.type == "cpu" for wire in target.specs for _, part in target.live(wire))
        memory = self._sharing.reach(self._exports(gathered), self._context.place, to_host=to_host)
        wanted = target.facts()
        return m.Facts(
            peer=self._context.link.peer, blob=encode_facts(wanted), memory=memory, wants_id=wants_id(wanted)
        )

    def _ready(self, offer: m.Offer, held: Sequence[m.HeldFold] = ()) -> m.Ready:
        """Ready with the offer's plan; without one that still holds, facts must be exchanged again."""
        planned = self._context.plans.get(offer.plan)
        if planned is not None:
            sharing, filled = planned.sharing, self._copied.filled if self._copied else None
            look = self._seen[1] if self._seen and self._seen[0] is sharing else sharing.look(filled)
            if not sharing.ready(look, offer.ready_s):
                self._context.plans.forget(offer.plan)
                planned = None
        return m.Ready(
            peer=self._context.link.peer,
            plan=planned.plan.fingerprint if planned else "",
            stale=planned is None,
            held=list(held),
        )

    # -- the plan ----------------------------------------------------------------------------------

    def _plan(self, offer: m.Offer, gathered: m.Gathered) -> Planned:
        """The plan, alike on all ranks, and this rank's compiled part of it."""
        members, rank = self._context.members, self._context.place
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
            reaches={r: decode_reach(blob, str(members[r])) for r, blob in gathered.memory.items()},
            groups={blob: facts[member] for member, blob in gathered.holder.items()},
            group=gathered.holder.get(rank, 0),
            hosts={place: member.host for place, member in enumerate(members)},
        )
        own = self.parts() if self._context.me.trainer is not None else {}
        target = self._target(offer, self._sources)
        sharing, self._sharing = self._sharing, None  # from here on the plan's to close
        planned = make_planned(survey, offer.settings, sharing, own, target, self._context.staging)
        try:
            self._learn({spec.name: spec.dtype for spec in planned.plan.specs})
        except BaseException:
            sharing.close()
            raise
        return planned

    def _learn(self, wire: dict[str, str]) -> None:
        """Keep the dtypes in which tensors travel. Raises SpecError for a copy that was cast to another one."""
        self._context.wire |= wire
        for name, dtype in self._copied.frozen.dtypes.items() if self._copied else ():
            if wire.get(name, dtype) != dtype:
                raise SpecError(
                    f"{name}: expected server ranks to take {dtype} as before, to which its copy was cast, got "
                    f"{wire[name]}; update again"
                )

    def _target(self, offer: m.Offer, sources: m.Gathered) -> Target | None:
        destination = self._context.destination
        if not self._context.me.server or not destination:
            return None
        facts = self._decode(sources)
        return destination.target(merge_sources(facts), offer.modules, ties=ties_of(facts.values()))

    def _exports(self, sources: m.Gathered) -> dict[int, Exports]:
        """Each trainer rank's, by group rank."""
        facts, members = self._decode(sources), self._context.members
        return {
            rank: decode_exports(blob, facts[rank], str(members[rank])) for rank, blob in sources.memory.items()
        }

    def _decode(self, gathered: m.Gathered) -> dict[int, Facts]:
        """Each group rank's facts; equal ones are decoded once."""
        sender = {blob: self._context.members[rank] for rank, blob in gathered.holder.items()}
        decoded = [decode_facts(blob, str(sender[i])) for i, blob in enumerate(gathered.blobs)]
        return {rank: decoded[blob] for rank, blob in gathered.holder.items()}

    def _held_folds(self, offer: m.Offer, planned: Planned) -> list[m.HeldFold]:
        """Of a new plan: what this and other trainer ranks hold, digested before any byte moves.

        So ranks that hold different bytes under one name are refused. What drifts apart later is found by each
        update, while bytes move.
        """
        if not offer.verify or not planned.shared:
            return []
        if self._copied:
            # What the hub says meanwhile is heard afterwards.
            wait_for(self._copied.filled, lambda: None, until=time.monotonic() + offer.ready_s)
        seed = plan_seed(offer.plan)
        ledger = digest_shared(planned, seed)
        return held_folds(ledger, ledger.sums, seed, planned.holders)


def plan_seed(plan: str) -> bytes:
    """Under which trainer ranks digest what they hold before the update has a seed."""
    return hashlib.sha256(b"weightbus held v1\0" + plan.encode()).digest()
