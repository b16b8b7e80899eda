"""A plan as one rank has it: chosen, made and compiled out of what all ranks have told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from weightbus.control import messages as m
from weightbus.digest.ledger import Entry, Ledger, live_entries, wanted_of
from weightbus.memory.export import Parts
from weightbus.memory.shard import Part
from weightbus.memory.warn_once import say_once
from weightbus.planning.box import Box
from weightbus.planning.exports import ASKED_FOR, OTHER_HOST, Choice, Exports, Reach, choose_route
from weightbus.planning.facts import Facts, owners_of, ties_of
from weightbus.planning.holders import Replicated, digesters, replicated
from weightbus.planning.peer_plan import CASTS, PeerPlan, casts_of, plan_peer, why_no_cast, why_too_much
from weightbus.planning.plan import Plan, Want, plan_broadcast, skipped_by
from weightbus.planning.reshard_plan import ReshardPlan, plan_reshard
from weightbus.planning.spec import Spec
from weightbus.routes.peer import CompiledPeer, compile_peer
from weightbus.routes.sharing import Sharing
from weightbus.tensors.bucket import Compiled, Staging, compile_waves
from weightbus.tensors.install import Target
from weightbus.tensors.moves import compile_moves

# In how many pieces what lies in place is digested, while other waves are under way.
DIGESTS = 16

# Where ``auto`` takes reshard for broadcast: over gloo. Over NCCL it has to be asked for: it was never measured
# between hosts, and on one host the peer route is faster.
AUTO_RESHARD = frozenset({"cpu"})

# If the busiest rank then carries at most this share of what a broadcast brings to each.
CLEARLY_FEWER = 3 / 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What all ranks have told, by group rank.

    groups: the distinct wants, of which ``group`` are this rank's. hosts: of all.
    """

    rank: int
    sources: Mapping[int, Facts]
    exports: Mapping[int, Exports]
    wants: Mapping[int, Want]
    reaches: Mapping[int, Reach]
    groups: Mapping[int, Facts]
    group: int
    hosts: Mapping[int, str] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Planned:
    """A plan, compiled for this rank, with what it digests.

    group: this server rank's. wants: of all groups. holders: the sets of trainer ranks that hold the same.
    shared: of a trainer rank, all that others hold too.
    skipped: names of which some replica takes nothing, and why. nbytes: the plan's.
    """

    choice: Choice
    sharing: Sharing
    plan: Plan | PeerPlan | ReshardPlan
    compiled: Compiled | CompiledPeer
    target: Target | None
    sent: Ledger
    live: Ledger
    group: int
    wants: Mapping[int, Facts]
    holders: Sequence[Sequence[int]]
    shared: Sequence[Entry]
    skipped: Mapping[str, str]
    nbytes: int


def make_planned(
    survey: Survey, settings: m.Settings, sharing: Sharing, own: Parts, target: Target | None, staging: Staging
) -> Planned:
    """sharing: this rank's part in the peer route; closed if another is taken, or on failure.

    own: the parts that this rank sends. target: where it installs. Raises SpecError or CoverageError.
    """
    try:
        wants = list(survey.wants.values())
        held = _Held(own, survey, replicated(survey.sources))
        alone = survey.sources.keys() == survey.wants.keys() == {survey.rank}
        one_device = len(_devices(own, target)) == 1
        choice, copies = _choose(survey, settings.route, alone=alone, one_device=one_device)
        if choice.route != "peer":
            sharing.close()
        plan: Plan | PeerPlan | ReshardPlan
        compiled: Compiled | CompiledPeer
        if copies is not None:
            plan = copies
            sharing.follow(plan, survey.rank)
            _copied(plan, held)
            compiled = compile_peer(
                plan,
                survey.rank,
                facts=survey.sources,
                imports=sharing.imports,
                own=own,
                target=target,
                staging=staging,
                sent=held.entries,
            )
            held.entries = list(compiled.sent)
        else:
            if not alone and staging.device.type == "cuda" and choice.reason not in (ASKED_FOR, OTHER_HOST):
                say_once(f"no peer copies, NCCL serves: {choice.reason}")
            choice, moves = _moves(survey, settings, choice, staging.device)
            if moves is not None:
                plan = moves
                compiled = compile_moves(plan, survey.rank, source=own, target=target, staging=staging)
                _given(plan, compiled, held)
            else:
                plan = plan_broadcast(
                    survey.sources,
                    wants,
                    bucket_bytes=settings.bucket_bytes,
                    in_place=settings.source != "host",
                )
                compiled = compile_waves(plan, survey.rank, source=own, target=target, staging=staging)
                _sent(plan, compiled, held)
        stages = {name: _stage(last, len(compiled.waves)) for name, last in compiled.last.items()}
        if target:
            # What loading code that can't be traced may write over is digested when all of it has run.
            stages |= dict.fromkeys(target.overwritable(), max(0, len(compiled.waves) - 1))
        owners = owners_of(survey.sources.values())
        live = live_entries(target, compiled.whole, survey.group, stages) if target else []
        return Planned(
            choice=choice,
            sharing=sharing,
            plan=plan,
            compiled=compiled,
            target=target,
            sent=Ledger(held.entries, survey.groups, owners),
            live=Ledger(live, survey.groups, owners),
            group=survey.group,
            wants=survey.groups,
            holders=held.replicas.sets,
            shared=held.shared,
            skipped=skipped_by(wants, ties_of(survey.sources.values())),
            nbytes=plan.nbytes,
        )
    except BaseException:
        sharing.close()
        raise


def _devices(own: Parts, target: Target | None) -> set[torch.device]:
    """On which this rank holds what it sends, and what it writes."""
    live = [view for wire in target.specs for _, view in target.live(wire)] if target else []
    return {part.tensor.device for held in own.values() for part in held} | {view.device for view in live}


def _choose(
    survey: Survey, asked: str, *, alone: bool, one_device: bool = True
) -> tuple[Choice, PeerPlan | None]:
    """The route, the same on all ranks, and the plan of the copies if there are to be any.

    alone: this process is all that there is. one_device: and all of its tensors lie on one; else what is cast
    goes through buckets, since torch casts a NaN to other bits on the host. Raises SpecError or CoverageError.
    """
    casts = casts_of(survey.sources, list(survey.wants.values()))
    if alone and asked == "auto":
        choice = Choice(route="local", reason="source and target are in one process")
        copied = not casts or (casts.keys() <= CASTS and one_device)
        return choice, plan_peer(survey.sources, survey.wants) if copied else None
    why = why_no_cast(casts, survey.reaches.values())
    choice = choose_route(asked, survey.exports, list(survey.reaches.values()), why)
    if choice.route != "peer":
        return choice, None
    plan = plan_peer(survey.sources, survey.wants)
    if (
        casts
        and asked == "auto"
        and (why := why_too_much(plan, survey.sources, survey.exports, survey.reaches))
    ):
        return Choice(route="broadcast", reason=why), None
    return choice, plan


def _moves(
    survey: Survey, settings: m.Settings, choice: Choice, device: torch.device
) -> tuple[Choice, ReshardPlan | None]:
    """The plan of a reshard, if it was asked for or ``auto`` takes it where it took a broadcast before."""
    auto = settings.route == "auto" and choice.route == "broadcast" and len(survey.sources) > 1
    if choice.route != "reshard" and not (auto and device.type in AUTO_RESHARD):
        return choice, None
    plan = plan_reshard(
        survey.sources,
        survey.wants,
        bucket_bytes=settings.bucket_bytes,
        in_place=settings.source != "host",
        hosts=survey.hosts,
    )
    if choice.route == "reshard":
        return choice, plan
    if plan.busiest_bytes > CLEARLY_FEWER * plan.nbytes:
        return choice, None
    why = f"the busiest rank carries {plan.busiest_bytes / 1e9:.2f} GB, by broadcast {plan.nbytes / 1e9:.2f} GB"
    return Choice(route="reshard", reason=why), plan


def _stage(wave: int, waves: int) -> int:
    """The wave after which what ``wave`` completes is digested: few digests, of which the last is short."""
    every = -(-waves // DIGESTS)
    return min((wave // every + 1) * every, waves) - 1


class _Held:
    """What a trainer rank digests of what it holds.

    entries: in an update. shared: all that others hold too, for when a plan is made, and to name what differs.
    """

    def __init__(self, own: Parts, survey: Survey, replicas: Replicated) -> None:
        self.own, self.rank, self.replicas = own, survey.rank, replicas
        self.wants = [survey.groups[group] for group in sorted(survey.groups)]
        self.entries: list[Entry] = []
        self.shared: list[Entry] = []

    def add(
        self,
        src: int,
        spec: Spec,
        box: Box,
        stage: int = 0,
        sent: Tensor | None = None,
        sent_stage: int = 0,
        ranks: Mapping[Box, tuple[int, ...]] | None = None,
    ) -> None:
        """``box``, which ``src`` holds. sent: as it leaves ``src``, if there. ranks: of each wanted box, its
        ``digesters``; those of a box that all take from ``src`` where it is not said."""
        place = self.replicas.set_of(spec.name, box)
        holders = (src,) if place is None else self.replicas.sets[place]
        if self.rank not in holders:
            return
        part = next(part for part in self.own[spec.name] if part.box.intersect(box) == box)
        lies = part.tensor[box.within(part.box)]
        cast = part.spec.dtype != spec.dtype
        if cast and place is not None:
            # Compared as it is held: only the rank that sends has it in the wire's dtype. For no server ranks.
            held = Part(spec=part.spec, box=box, tensor=lies)
            nobody = (len(self.wants),)
            self.entries.append(Entry(part=held, stage=stage, groups=nobody, own=False, holders=place))
            self.shared.append(self.entries[-1])
            if src != self.rank:
                return
            place, holders, ranks = None, (src,), None
        if sent is not None and place is None and (cast or sent.device != lies.device):
            lies, stage = sent, sent_stage
        usual = digesters(holders, {src}, dict.fromkeys(holders, 0))
        for inner, groups, live in wanted_of(spec.name, box, self.wants):
            piece = Part(spec=spec, box=inner, tensor=lies[inner.within(box)])
            entry = Entry(part=piece, stage=stage, groups=groups, live=live, own=False, holders=place)
            if place is not None:
                self.shared.append(entry)
            chosen = ranks[inner] if ranks else usual
            if self.rank in chosen:
                own, compared = chosen[0] == self.rank, place if len(chosen) > 1 else None
                self.entries.append(replace(entry, own=own, holders=compared))


def _sent(plan: Plan, compiled: Compiled, held: _Held) -> None:
    """What a rank digests that broadcasts, at the waves in which it is on its way."""
    specs: dict[str, Spec] = {spec.name: spec for spec in plan.specs}
    for index, wave in enumerate(compiled.waves):
        for step in wave.steps:
            for name, box, view, _ in step.boxes:
                held.add(step.src, specs[name], box, _stage(index, len(compiled.waves)), view, index)


def _given(plan: ReshardPlan, compiled: Compiled, held: _Held) -> None:
    """What a rank digests of what leaves its source, or another holder's, or stays."""
    names: dict[int, list[Spec]] = {}
    for index, spec in enumerate(plan.specs):
        names.setdefault(plan.echoes.get(index, index), []).append(spec)
    for given in plan.given:
        view = compiled.packed.get((given.tensor, given.box)) if given.src == held.rank else None
        stage = _stage(given.wave, len(compiled.waves))
        for spec in names[given.tensor]:
            ranks = {given.box: given.digesters}
            held.add(given.src, spec, given.box, stage, view, given.wave, ranks)


def _copied(plan: PeerPlan, held: _Held) -> None:
    """What a rank digests out of whose memory others copy, where it lies."""
    for proof in plan.proofs:
        held.add(proof.src, plan.specs[proof.tensor], proof.box, ranks=proof.ranks)
