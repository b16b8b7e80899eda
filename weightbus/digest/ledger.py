"""A rank's digests of one plan: of its source, or of what it holds live, summed for whoever compares.

Server ranks that want the same boxes form a *group*. For each group, the trainer ranks digest
exactly those boxes of what they hold, so that their sums add up to what each server rank of the
group digests of its own live storage: the sums of two shardings meet without gathering a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from weightbus.digest import Digester, NameKeys, P, fold_with
from weightbus.digest.segments import BoxCopy
from weightbus.planning.box import Box
from weightbus.planning.facts import Facts
from weightbus.tensors.install import Target
from weightbus.tensors.layout import Part

Sums = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.intp]

# When a part is digested: after this wave (a trainer's part is packed, a server's in place), or, by its
# wire name, when it is whole and its hook is about to take it; or, by the wave in brackets, by the kernel that
# copies it then, out of a trainer's part.
Stage = int | str | tuple[int]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tensors by the trainer's modules that own them. modules: of these; None: of all. without: of none of
    these, which another update has written since."""

    modules: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()

    def takes(self, owners: frozenset[str]) -> bool:
        return (self.modules is None or not owners.isdisjoint(self.modules)) and owners.isdisjoint(self.without)


ALL = Chosen()


@dataclass(frozen=True, slots=True)
class Entry:
    """A part to digest for some groups of server ranks, at a stage.

    live: it lies in live storage then and later. own: this rank answers for it towards the groups. holders:
    the set of trainer ranks that hold it (``Replicated``) and are compared with each other; None for one alone.
    copies: where its digest writes it (``Digester``), which is what the last kind of stage is for.
    """

    part: Part
    stage: Stage
    groups: tuple[int, ...]
    live: bool = True
    own: bool = True
    holders: int | None = None
    copies: tuple[BoxCopy, ...] = ()


class Ledger:
    """Entries, and their sums under the seed of the last update.

    wants: what each group wants, which says how much there is to digest. owners: of each tensor, by wire name
    (``owners_of``).
    """

    def __init__(
        self, entries: Iterable[Entry], wants: Mapping[int, Facts], owners: Mapping[str, frozenset[str]]
    ) -> None:
        self.wants, self.owners = wants, owners
        by_stage: dict[Stage, list[Entry]] = {}
        for entry in entries:
            by_stage.setdefault(entry.stage, []).append(entry)
        self._entries = [entry for staged in by_stage.values() for entry in staged]
        self._digesters: dict[Stage, tuple[slice, Digester]] = {}
        first = 0
        for stage, staged in by_stage.items():
            rows = slice(first, first + len(staged))
            copies = [entry.copies for entry in staged] if isinstance(stage, tuple) else []
            self._digesters[stage] = rows, Digester([entry.part for entry in staged], copies)
            first = rows.stop
        self.sums: Sums = np.zeros((len(self._entries), 2), dtype=np.uint64)
        self._launched: list[tuple[slice, Callable[[], Sums]]] = []
        self._names = NameKeys([entry.part.spec.name for entry in self._entries])
        self._keys: tuple[bytes, Sums] = b"", self.sums
        self._nbytes = [entry.part.nbytes for entry in self._entries]
        self._rows: dict[str, list[tuple[int, Entry]]] = {}
        # Kept, for they are asked for at every update.
        self._select = cache(self._selected)
        self.due = cache(self._due)

    def launch(self, stage: Stage, seed: bytes) -> bool:
        """Start to digest what belongs to ``stage``, on the current stream; whether there is anything."""
        if stage not in self._digesters:
            return False
        rows, digester = self._digesters[stage]
        self._launched.append((rows, digester.launch(seed)))
        return True

    def collect(self) -> None:
        """Wait for what was launched, and take it into ``sums``."""
        for rows, result in self._launched:
            self.sums[rows] = result()
        self._launched.clear()

    def digest_live(self, seed: bytes) -> None:
        """Digest everything that lies in live storage, as it lies now; nothing is copied."""
        self._launched.clear()
        for stage in self._digesters:
            if isinstance(stage, int):
                self.launch(stage, seed)
        self.collect()

    def prepare(self, seed: bytes) -> None:
        """Work out what ``fold`` needs under this seed, while there is time."""
        if self._keys[0] != seed:
            self._keys = seed, self._names.under(seed)

    @property
    def groups(self) -> list[int]:
        """Those towards which this rank answers for something."""
        return sorted({group for entry in self._entries if entry.own for group in entry.groups})

    @cached_property
    def shared(self) -> list[tuple[int, int]]:
        """Sets of holders and groups for which this rank is compared with the others of the set."""
        return sorted(
            {(e.holders, group) for e in self._entries if e.holders is not None for group in e.groups}
        )

    def _due(self, group: int, chosen: Chosen = ALL, live_only: bool = False) -> int:
        """Bytes of a group's tensors that are to be digested at each end, as its wants say."""
        return sum(
            holding.nbytes
            for name, holding in self.wants[group].items()
            if chosen.takes(self.owners.get(name, frozenset())) and not (live_only and holding.why_arrived)
        )

    def _selected(
        self, group: int, chosen: Chosen, live_only: bool, holders: int | None
    ) -> tuple[Rows, list[str], int]:
        """Rows, names and bytes of the entries for a group: this rank's own, or those of a set of holders."""
        rows = [
            row
            for row, entry in enumerate(self._entries)
            if group in entry.groups
            and (entry.own if holders is None else entry.holders == holders)
            and (entry.live or not live_only)
            and chosen.takes(self.owners.get(entry.part.spec.name, frozenset()))
        ]
        names = [self._entries[row].part.spec.name for row in rows]
        return np.array(rows, np.intp), names, sum(self._nbytes[row] for row in rows)

    def fold(
        self,
        sums: Sums,
        seed: bytes,
        group: int,
        chosen: Chosen = ALL,
        *,
        live_only: bool = False,
        holders: int | None = None,
    ) -> tuple[tuple[int, int], int]:
        """Folded sums and digested bytes of a group's tensors. sums: as ``self.sums`` was at some time.

        holders: of what this set of trainer ranks holds, else of what this rank answers for.
        """
        rows, _, nbytes = self._select(group, chosen, live_only, holders)
        self.prepare(seed)
        return fold_with(self._keys[1][rows], sums[rows]), nbytes

    def by_tensor(
        self,
        sums: Sums,
        group: int,
        chosen: Chosen = ALL,
        *,
        live_only: bool = False,
        holders: int | None = None,
    ) -> dict[str, tuple[int, int]]:
        """Sums of each of a group's tensors; arguments as of ``fold``."""
        totals: dict[str, tuple[int, int]] = {}
        rows, names, _ = self._select(group, chosen, live_only, holders)
        for name, (a, b) in zip(names, sums[rows].tolist(), strict=True):
            x, y = totals.get(name, (0, 0))
            totals[name] = ((a + x) % P, (b + y) % P)
        return totals

    def rows(self, name: str) -> list[tuple[int, Entry]]:
        """Rows of ``sums`` that are of one tensor and that this rank answers for, with their entries."""
        if not self._rows:
            for row, entry in enumerate(self._entries):
                if entry.own:
                    self._rows.setdefault(entry.part.spec.name, []).append((row, entry))
        return self._rows.get(name, [])


@dataclass(frozen=True, slots=True, kw_only=True)
class Former:
    """The version committed before another one by the same plan. sums: as in Record."""

    version: int
    seed: bytes
    sums: Sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What one committed update left on this rank for some modules: how to check it again.

    sums: of what a trainer rank sent then; of what a server rank held at its last digest.
    group, target: the server rank's own. wants: the facts of all groups.
    """

    version: int
    plan: str
    seed: bytes
    ledger: Ledger
    sums: Sums
    group: int
    target: Target | None
    wants: Mapping[int, Facts]
    former: Former | None = None


def wanted_of(name: str, box: Box, wants: Sequence[Facts]) -> list[tuple[Box, tuple[int, ...], bool]]:
    """What groups want of a box: each box of it, the groups, and whether it is live storage on all of them.

    wants: the facts of each group.
    """
    groups: dict[Box, list[int]] = {}
    opaque: set[Box] = set()
    for group, facts in enumerate(wants):
        for wanted in facts[name].boxes if name in facts else ():
            if (inner := wanted.intersect(box)) is not None:
                groups.setdefault(inner, []).append(group)
                if facts[name].why_arrived:
                    opaque.add(inner)
    return [(inner, tuple(members), inner not in opaque) for inner, members in groups.items()]


def live_entries(
    target: Target, whole: Mapping[str, Tensor], group: int, stages: Mapping[str, int]
) -> list[Entry]:
    """Entries of a server rank: its live storage under wire names, and what its opaque hooks are given.

    stages: of each wire name, the wave after which it is in place; the first where it is not said.
    """
    entries = [
        Entry(part=Part(spec=spec, box=box, tensor=view), stage=stages.get(wire, 0), groups=(group,))
        for wire, spec in target.specs.items()
        for box, view in target.live(wire)
        if box.volume
    ]
    opaque = target.arrived()
    for wire, tensor in whole.items():
        if tensor.numel() and wire in opaque:
            part = Part(spec=target.specs[wire], box=Box.whole(tensor.shape), tensor=tensor)
            entries.append(Entry(part=part, stage=wire, groups=(group,), live=False))
    return entries
