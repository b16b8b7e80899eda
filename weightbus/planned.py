"""A plan as one rank has it: chosen, made and compiled out of what all ranks have told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from weightbus.box import Box
from weightbus.bucket import Compiled, Staging, compile_waves
from weightbus.errors import ProtocolError
from weightbus.exports import ASKED_FOR, OTHER_HOST, Choice, Exports, Reach, choose_route
from weightbus.facts import Facts, owners_of, ties_of
from weightbus.holders import Replicated, replicated
from weightbus.install import Target
from weightbus.ipc import Parts
from weightbus.ledger import Entry, Ledger, live_entries, sent_entries
from weightbus.once import say_once
from weightbus.part import Part
from weightbus.peer import CompiledPeer, compile_peer
from weightbus.peer_plan import PeerPlan, plan_peer, why_cast
from weightbus.plan import Plan, Want, plan_broadcast, skipped_by
from weightbus.sharing import Sharing
from weightbus.spec import Spec

ROUTES = ("auto", "peer", "broadcast")
SOURCES = ("live", "device", "host")

# In how many pieces what lies in place is digested, while other waves are under way.
DIGESTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a plan depends on besides facts; the same on all ranks.

    source: what is sent: ``live``, or a snapshot on the ``device`` or the ``host``.
    """

    bucket_bytes: int
    route: str
    source: str = "live"

    @classmethod
    def parse(cls, text: str) -> Settings:
        """Raises ProtocolError unless it is the text of settings."""
        bucket_bytes, route, source = (*text.split(" "), "", "", "")[:3]
        if not bucket_bytes.isdecimal() or route not in ROUTES or source not in SOURCES:
            raise ProtocolError(f"settings: expected bytes, a route and a source, got {text!r}")
        return cls(bucket_bytes=int(bucket_bytes), route=route, source=source)

    def __str__(self) -> str:
        return f"{self.bucket_bytes} {self.route} {self.source}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What all ranks have told, by group rank.

    groups: the distinct wants, of which ``group`` are this rank's.
    """

    rank: int
    sources: Mapping[int, Facts]
    exports: Mapping[int, Exports]
    wants: Mapping[int, Want]
    reaches: Sequence[Reach]
    groups: Mapping[int, Facts]
    group: int


@dataclass(slots=True, kw_only=True)
class Planned:
    """A plan, compiled for this rank, with what it digests.

    group: this server rank's. wants: of all groups. holders: the sets of trainer ranks that hold the same.
    skipped: names of which some replica takes nothing, and why. nbytes: the plan's.
    """

    choice: Choice
    sharing: Sharing
    plan: Plan | PeerPlan
    compiled: Compiled | CompiledPeer
    target: Target | None
    sent: Ledger
    live: Ledger
    group: int
    wants: Mapping[int, Facts]
    holders: Sequence[Sequence[int]]
    skipped: Mapping[str, str]
    nbytes: int


def make_planned(
    survey: Survey, settings: Settings, sharing: Sharing, own: Parts, target: Target | None, staging: Staging
) -> Planned:
    """sharing: this rank's part in the peer route; closed if another is taken, or on failure.

    own: the parts that this rank sends. target: where it installs. Raises SpecError or CoverageError.
    """
    try:
        wants = list(survey.wants.values())
        shared = replicated(survey.sources)
        cast = why_cast(survey.sources, wants)
        alone = survey.sources.keys() == survey.wants.keys() == {survey.rank}
        if alone and settings.route == "auto":
            choice = Choice(route="local", reason="source and target are in one process")
        else:
            choice = choose_route(settings.route, survey.exports, survey.reaches, cast)
        if choice.route != "peer":
            sharing.close()
        plan: Plan | PeerPlan
        compiled: Compiled | CompiledPeer
        if choice.route == "peer" or (choice.route == "local" and not cast):
            plan = plan_peer(survey.sources, survey.wants)
            sharing.follow(plan, survey.rank)
            compiled = compile_peer(
                plan,
                survey.rank,
                facts=survey.sources,
                imports=sharing.imports,
                own=own,
                target=target,
                staging=staging,
            )
            sent = _owned(plan, _Held(own, survey, shared))
        else:
            if not alone and staging.device.type == "cuda" and choice.reason not in (ASKED_FOR, OTHER_HOST):
                say_once(f"no peer copies, NCCL serves: {choice.reason}")
            plan = plan_broadcast(
                survey.sources,
                wants,
                bucket_bytes=settings.bucket_bytes,
                in_place=settings.source != "host",
            )
            compiled = compile_waves(plan, survey.rank, source=own, target=target, staging=staging)
            sent = _sent(plan, compiled, _Held(own, survey, shared))
        stages = {name: _stage(last, len(compiled.waves)) for name, last in compiled.last.items()}
        owners = owners_of(survey.sources.values())
        live = live_entries(target, compiled.whole, survey.group, stages) if target else []
        return Planned(
            choice=choice,
            sharing=sharing,
            plan=plan,
            compiled=compiled,
            target=target,
            sent=Ledger(sent, survey.groups, owners),
            live=Ledger(live, survey.groups, owners),
            group=survey.group,
            wants=survey.groups,
            holders=shared.sets,
            skipped=skipped_by(wants, ties_of(survey.sources.values())),
            nbytes=plan.nbytes,
        )
    except BaseException:
        sharing.close()
        raise


def _stage(wave: int, waves: int) -> int:
    """The wave after which what ``wave`` completes is digested: few digests, of which the last is short."""
    every = -(-waves // DIGESTS)
    return min((wave // every + 1) * every, waves) - 1


class _Held:
    """What a trainer rank digests of what it holds: what it answers for, and what others hold too."""

    def __init__(self, own: Parts, survey: Survey, shared: Replicated) -> None:
        self.own, self.rank, self.shared = own, survey.rank, shared
        self.wants = [survey.groups[group] for group in sorted(survey.groups)]
        self.entries: list[Entry] = []

    def add(
        self, src: int, spec: Spec, box: Box, stage: int, sent: Tensor | None = None, cast_stage: int = 0
    ) -> None:
        """``box``, for which ``src`` answers. sent: as it is sent, if by this rank, else where it lies."""
        holders = self.shared.set_of(spec.name, box)
        if src != self.rank and (holders is None or self.rank not in self.shared.sets[holders]):
            return
        part = next(part for part in self.own[spec.name] if part.box.intersect(box) == box)
        lies = part.tensor[box.within(part.box)]
        own, cast = src == self.rank, part.spec.dtype != spec.dtype
        if own and sent is not None and (cast or sent.device != lies.device):
            # What is answered for is what leaves, from its bucket; what is compared is what is held.
            self.entries += sent_entries(spec.name, spec, box, sent, cast_stage, self.wants)
            own = False
            if holders is None:
                return
        if cast:
            # As it is held: only the rank that sends has it in the wire's dtype. For no group of server ranks.
            held = Part(spec=part.spec, box=box, tensor=lies)
            groups = (len(self.wants),)
            self.entries.append(Entry(part=held, stage=stage, groups=groups, own=False, holders=holders))
        else:
            self.entries += sent_entries(
                spec.name, spec, box, lies, stage, self.wants, own=own, holders=holders
            )


def _sent(plan: Plan, compiled: Compiled, held: _Held) -> list[Entry]:
    """Entries of a rank that broadcasts, at the waves in which what they digest is on its way."""
    specs: dict[str, Spec] = {spec.name: spec for spec in plan.specs}
    for index, wave in enumerate(compiled.waves):
        for step in wave.steps:
            for name, box, view, _ in step.boxes:
                stage = _stage(index, len(compiled.waves))
                held.add(step.src, specs[name], box, stage, sent=view, cast_stage=index)
    return held.entries


def _owned(plan: PeerPlan, held: _Held) -> list[Entry]:
    """Entries of a rank out of whose memory others copy, where it lies."""
    for piece in plan.owned:
        held.add(piece.src, plan.specs[piece.tensor], piece.box, 0)
    return held.entries
