"""What both ends of an update have: a model, its layout, and what was committed of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from weightbus.digest.ledger import Former, Ledger, Record
from weightbus.tensors.layout import Layout, Source, layout_of


class Endpoint:
    """A source or target model, its layout, and what was committed of each of its modules."""

    def __init__(
        self,
        source: Source,
        *,
        name_of: Callable[[str], str | None] | None = None,
        declared: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """name_of, declared: as of ``layout_of``."""
        self.source: Source = source if _rereadable(source) else list(source)  # type: ignore[arg-type]
        self._name_of, self.is_declared = name_of, declared
        self.layout: Layout = self._lay_out()
        self._records: dict[str, Record] = {}
        self._written: dict[str, int] = {}  # by module, when an update wrote it last: a count
        self._changed = False

    def refresh(self, *, in_place: bool = False) -> bool:
        """Whether tensors have been replaced or moved since the layout was made; it is then made again.

        in_place: or have changed their shape, strides or dtype, where nobody looks for that later.
        Raises SpecError for a model that now computes with other weights, such as adapters that are not merged.
        """
        look = self.layout.changed if in_place else self.layout.moved
        moved = self._changed or look() is not None
        layout = self._lay_out() if moved else self.layout
        layout.watch.check_wrappers()  # before it counts: plans over the old one are still to be forgotten
        self.layout, self._changed = layout, False
        return moved

    def _lay_out(self) -> Layout:
        return layout_of(self.source, name_of=self._name_of, declared=self.is_declared)

    def changed(self) -> str | None:
        """As ``Layout.changed``; the next ``refresh`` makes the layout again."""
        name = self.layout.changed()
        self._changed = name is not None
        return name

    def _keys(self, modules: Sequence[str] | None) -> Sequence[str]:
        return modules if modules is not None else self.layout.modules or ("",)

    def commit(self, record: Record, modules: Sequence[str] | None) -> None:
        self.forget(modules)
        for key in self._keys(modules):
            self._records[key] = record

    def label(self, version: int) -> None:
        """What was committed counts as ``version`` from now on."""
        relabelled = {id(record): replace(record, version=version) for record in self._records.values()}
        self._records = {key: relabelled[id(record)] for key, record in self._records.items()}

    def former(self, ledger: Ledger, modules: Sequence[str] | None) -> Former | None:
        """What was committed last of these modules, if it was by the same plan."""
        held = [self._records.get(key) for key in self._keys(modules)]
        record = held[0]
        if record is None or record.ledger is not ledger or any(other is not record for other in held):
            return None
        return Former(version=record.version, seed=record.seed, sums=record.sums)

    def forget(self, modules: Sequence[str] | None) -> None:
        """What an update writes from now on counts as of no earlier one."""
        count = max(self._written.values(), default=0) + 1
        for key in self._keys(modules):
            self._records.pop(key, None)
            self._written[key] = count


def _rereadable(source: Source) -> bool:
    return hasattr(source, "named_parameters") or isinstance(source, Mapping | list | tuple)
