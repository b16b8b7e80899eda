"""A plan as one rank has it: chosen, made and compiled out of what all ranks have told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightbus.bucket import Compiled, Staging, compile_waves
from weightbus.errors import ProtocolError
from weightbus.exports import ASKED_FOR, OTHER_HOST, Choice, Exports, Reach, choose_route
from weightbus.facts import Facts
from weightbus.install import Target
from weightbus.ipc import Parts
from weightbus.ledger import Entry, Ledger, live_entries, sent_entries
from weightbus.once import say_once
from weightbus.peer import CompiledPeer, compile_peer
from weightbus.peer_plan import PeerPlan, plan_peer, why_cast
from weightbus.plan import Plan, Want, plan_broadcast
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

    group: this server rank's. wants: of all groups. nbytes: the plan's.
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
    nbytes: int


def make_planned(
    survey: Survey, settings: Settings, sharing: Sharing, own: Parts, target: Target | None, staging: Staging
) -> Planned:
    """sharing: this rank's part in the peer route; closed if another is taken, or on failure.

    own: the parts that this rank sends. target: where it installs. Raises SpecError or CoverageError.
    """
    try:
        wants = list(survey.wants.values())
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
            sent = _owned(plan, own, survey.rank, survey.groups)
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
            sent = _sent(plan, compiled, survey.rank, survey.groups)
        stages = {name: _stage(last, len(compiled.waves)) for name, last in compiled.last.items()}
        live = live_entries(target, compiled.whole, survey.group, stages) if target else []
        return Planned(
            choice=choice,
            sharing=sharing,
            plan=plan,
            compiled=compiled,
            target=target,
            sent=Ledger(sent),
            live=Ledger(live),
            group=survey.group,
            wants=survey.groups,
            nbytes=plan.nbytes,
        )
    except BaseException:
        sharing.close()
        raise


def _stage(wave: int, waves: int) -> int:
    """The wave after which what ``wave`` completes is digested: few digests, of which the last is short."""
    every = -(-waves // DIGESTS)
    return min((wave // every + 1) * every, waves) - 1


def _sent(plan: Plan, compiled: Compiled, rank: int, groups: Mapping[int, Facts]) -> list[Entry]:
    """Entries for everything that this rank sends: where it lies, or as cast in its bucket."""
    specs: dict[str, Spec] = {spec.name: spec for spec in plan.specs}
    wants = [groups[group] for group in sorted(groups)]
    entries = []
    for index, wave in enumerate(compiled.waves):
        for step in wave.steps:
            if step.src != rank:
                continue
            for name, box, view, origin in step.boxes:
                assert origin is not None
                if origin.dtype == view.dtype and origin.device == view.device:
                    stage, view = _stage(index, len(compiled.waves)), origin
                else:
                    stage = index
                entries += sent_entries(name, specs[name], box, view, stage, wants)
    return entries


def _owned(plan: PeerPlan, own: Parts, rank: int, groups: Mapping[int, Facts]) -> list[Entry]:
    """Entries for everything that this rank answers for, where it lies."""
    wants = [groups[group] for group in sorted(groups)]
    entries = []
    for piece in plan.owned:
        if piece.src == rank:
            spec = plan.specs[piece.tensor]
            part = next(part for part in own[spec.name] if part.box == piece.box)
            entries += sent_entries(spec.name, spec, piece.box, part.tensor, 0, wants)
    return entries
