"""The trainer's end of an update on one rank: the tensors that are sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from weightbus.control import messages as m
from weightbus.control.sketch import sketch_of
from weightbus.digest.ledger import Record
from weightbus.errors import SpecError
from weightbus.memory.streams import Mark
from weightbus.planning.facts import Holding, encode_facts, facts_id
from weightbus.planning.peer_plan import CASTS
from weightbus.session.endpoint import Endpoint
from weightbus.tensors.layout import Layout, Source
from weightbus.tensors.source_copy import NOT_CAST, Frozen, Where
from weightbus.tensors.torch_owners import Owners

_Asked = tuple[tuple[str, ...] | None, frozenset[tuple[str, str]]]
"""Modules, and the dtypes to which a copy of them is cast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCopy:
    """What a trainer rank sends instead of its live source. filled: reached once it is complete."""

    frozen: Frozen
    filled: Mark


class Origin(Endpoint):
    """A trainer rank's source."""

    def __init__(self, source: Source, name_of: Callable[[str], str | None] | None = None) -> None:
        super().__init__(source, name_of=name_of)
        pairs = not isinstance(self.source, nn.Module | Mapping)
        self._owners = Owners(self.layout.watch.named if pairs else ())
        self._told: tuple[Layout, dict[_Asked, tuple[bytes, str]]] = self.layout, {}
        self._frozen: Frozen | None = None

    def refresh(self, *, in_place: bool = False) -> bool:
        """As of both ends. Raises SpecError for pairs whose modules have gone on with other memory."""
        if (moved := self._owners.moved()) is not None:
            name, owner = moved
            raise SpecError(
                f"{name}: expected the memory of {owner}, of which the source's (name, tensor) pair was taken, "
                f"got memory that it has given up, with old weights; publish the module, or new pairs"
            )
        return super().refresh(in_place=in_place)

    def narrowed(self, wire: Mapping[str, str]) -> dict[str, str]:
        """Those dtypes of ``wire``, by wire name, to which a copy may be cast as peer copies cast."""
        layout, found = self.layout, dict[str, str]()
        names = {name: [name] for name in layout.specs}
        for alias, name in layout.aliases.items():
            names[name].append(alias)
        for name, spec in layout.specs.items():
            dtypes = {wire[one] for one in names[name] if one in wire}
            if len(dtypes) == 1 and (spec.dtype, dtype := dtypes.pop()) in CASTS:
                found |= dict.fromkeys(names[name], dtype)
        return found

    def copy(
        self, where: Where, modules: Sequence[str] | None, dtypes: Mapping[str, str] = NOT_CAST
    ) -> SourceCopy:
        """A copy of the source as it is now; its memory is kept as long as layout and dtypes are the same."""
        kept = self._frozen
        if kept is None or kept.layout is not self.layout or kept.dtypes != dtypes:
            self._frozen = None  # before as much is allocated again
            self._frozen = kept = Frozen(self.layout, where, dtypes)
        return SourceCopy(frozen=kept, filled=kept.fill(modules))

    def facts(self, modules: Sequence[str] | None, dtypes: Mapping[str, str] = NOT_CAST) -> tuple[bytes, str]:
        """This rank's facts and their id, kept as long as the layout is the same.

        dtypes: of a copy that is sent instead, as of ``copy``.
        Raises SpecError for a module that the source does not have.
        """
        if self._told[0] is not self.layout:
            self._told = self.layout, {}
        key, told = (None if modules is None else tuple(modules), frozenset(dtypes.items())), self._told[1]
        if key not in told:
            layout, device = self.layout.select(modules), self.layout.device
            tied = set(layout.aliases.values())
            held = {
                name: Holding(
                    spec=replace(spec, dtype=dtypes.get(name, spec.dtype)),
                    boxes=tuple(part.box for part in layout.parts[name]),
                    in_place=all(
                        part.tensor.is_contiguous() and part.tensor.device == device
                        for part in layout.parts[name]
                    ),
                    modules=tuple(sorted(layout.owners[name] - {""})),
                    tied=name if name in tied else "",
                )
                for name, spec in layout.specs.items()
            }
            for alias, name in layout.aliases.items():
                held[alias] = replace(held[name], spec=replace(held[name].spec, name=alias))
            blob = encode_facts({name: held[name] for name in sorted(held, key=str.encode)})
            told[key] = blob, facts_id(blob)
        return told[key]

    def sketch(self) -> m.Sketch:
        """What this rank holds, in short."""
        specs = self.layout.specs
        return sketch_of(specs, plain=specs, whole=True)

    def jobs(self) -> list[m.Job]:
        """What was committed and can be checked: one job for each update that still counts."""
        modules: dict[int, list[str]] = {}
        records = {}
        for key, record in sorted(self._records.items()):
            modules.setdefault(id(record), []).append(key)
            records[id(record)] = record
        return [
            m.Job(
                version=records[i].version,
                plan=records[i].plan,
                seed=records[i].seed,
                modules=None if keys == [""] else keys,
                without=sorted(k for k, when in self._written.items() if when > self._written[keys[0]]),
            )
            for i, keys in modules.items()
        ]

    def unproved(self) -> list[str]:
        """Modules of a mapping of which no verified update counts."""
        return [key for key in self._keys(None) if key not in self._records]

    def record(self, job: m.Job) -> Record:
        return self._records[self._keys(job.modules)[0]]
