"""A server rank's live weights as a source: what another replica catches up from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from weightbus.control import messages as m
from weightbus.digest.ledger import Ledger, Record, live_entries
from weightbus.errors import SpecError, UpdateError
from weightbus.planning.box import Box
from weightbus.planning.facts import Facts, Holding, encode_facts, facts_id
from weightbus.planning.spec import Spec
from weightbus.session.destination import Destination
from weightbus.tensors.install import Target
from weightbus.tensors.layout import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveLayout:
    """The live boxes of a committed update, by wire name, in the part of ``Layout`` that a source needs."""

    specs: Mapping[str, Spec]
    parts: dict[str, tuple[Part, ...]]
    aliases: dict[str, str] = field(default_factory=dict)

    def select(self, modules: Sequence[str] | None) -> LiveLayout:
        return self

    def beside_of(self, modules: Sequence[str] | None) -> dict[str, str]:
        return {}


class Donor:
    """In the place of ``Origin``, for one catch-up. Nothing is written here.

    Raises UpdateError unless this rank holds what ``job`` has committed, SpecError where loading code that
    can't be traced hides where its bytes lie.
    """

    def __init__(self, destination: Destination, job: m.Job) -> None:
        record = destination.record(job)
        target = record.target
        if target is None or destination.state != "ready" or destination.version != job.version:
            held = f"version {destination.version}, {destination.state}"
            raise UpdateError(f"expected version {job.version} to give to another replica, got {held}")
        if hidden := target.arrived():
            wire, why = next(iter(hidden.items()))
            raise SpecError(
                f"{wire}: can't be given to another replica, as its bytes are not known here: {why}"
            )
        self._device = destination.device
        self._owners, self._ties = record.ledger.owners, target.ties
        parts = {wire: _parts(target, wire, spec) for wire, spec in target.specs.items()}
        self.layout = LiveLayout(specs=target.specs, parts=parts)

    def facts(self, modules: Sequence[str] | None) -> tuple[bytes, str]:
        """As of ``Origin``; in the servers' own dtypes."""
        held = {
            wire: Holding(
                spec=self.layout.specs[wire],
                boxes=tuple(part.box for part in parts),
                in_place=all(
                    part.tensor.is_contiguous() and part.tensor.device == self._device for part in parts
                ),
                modules=tuple(sorted(self._owners.get(wire, ()))),
                tied=self._ties.get(wire, ""),
            )
            for wire, parts in self.layout.parts.items()
        }
        blob = encode_facts({wire: held[wire] for wire in sorted(held, key=str.encode)})
        return blob, facts_id(blob)


def _parts(target: Target, wire: str, spec: Spec) -> tuple[Part, ...]:
    """Each box once, wherever it lies, as all places were proved to hold the same."""
    found: dict[Box, Part] = {}
    for box, view in target.live(wire):
        found.setdefault(box, Part(spec=spec, box=box, tensor=view))
    return tuple(found.values())


def wants_id(facts: Facts) -> str:
    """By which the hub knows boxes that are wanted again. What a rank takes nothing of is none of them."""
    taken = sorted((wire for wire, holding in facts.items() if not holding.skipped), key=str.encode)
    return facts_id(encode_facts({wire: replace(facts[wire], in_place=False) for wire in taken}))


def as_committed(record: Record, job: m.Job, group: int) -> Record:
    """What has been caught up with, as if this rank had been in the committed update's ``group``."""
    assert record.target is not None  # noqa: S101 - of a server rank
    wants = {group: record.wants[record.group]}
    ledger = Ledger(live_entries(record.target, {}, group, {}), wants, record.ledger.owners)
    sums = ledger.sums.copy()
    return replace(record, plan=job.plan, ledger=ledger, sums=sums, group=group, wants=wants, former=None)
