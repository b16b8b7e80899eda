"""One server rank's account of what its model computes with, kept up to date from update to update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import nn

from weightbus.errors import SpecError
from weightbus.inventory.account import CHANGED, Account, Spoilt, account_of, recount, stale
from weightbus.inventory.derived import Derived
from weightbus.inventory.reads import Inputs, reads_of
from weightbus.tensors.install import Target
from weightbus.tensors.layout import Source

SHOWN = 8


class Audit:
    """Accounts by target, which stands for a plan. source: a module or a mapping; of pairs there is no tree."""

    def __init__(
        self, source: Source, *, local: Sequence[str], derived: Derived, require_proof: bool, inputs: Inputs
    ) -> None:
        self._source, self._local, self._derived = source, local, derived
        self.require_proof, self._inputs = require_proof, inputs
        self._accounts: WeakKeyDictionary[Target, Account] = WeakKeyDictionary()

    def begin(self, target: Target, *, verify: bool = True) -> None:
        """When a plan is made: look at everything, at storage that a forward reads too.

        verify: whether the update is one with proof. Raises SpecError where that is required and something
        is unknown, and with a forward's own error.
        """
        tops = self._tops(target)
        account = account_of(tops, target, local=self._local, derived=self._derived)
        if self._inputs is not None:
            read = reads_of(tops, self._inputs, account.tree)
            account = replace(account, unknown={**account.unknown, **read}, reads=read)
        self._accounts[target] = account
        self._require(target, verify)

    def again(self, target: Target, *, verify: bool) -> bool:
        """Before a planned update: look again if modules hold other objects than they did, and say so.

        Raises SpecError.
        """
        account = self._accounts.get(target)
        if account is None:
            self.begin(target, verify=verify)
            return True
        if changed := account.tree.changed() if account.recipes else account.tree.glance.changed():
            spoilt = {one.name: CHANGED for one in self._recount(target, account)}
            account = self._accounts[target]
            self._accounts[target] = replace(account, unknown={**account.unknown, **spoilt})
        self._require(target, verify)
        return changed

    def check(self, target: Target) -> list[Spoilt]:
        """Look at everything again; constants and derived tensors that hold something else than they should.

        Raises UpdateError with a function's own error.
        """
        if (account := self._accounts.get(target)) is None:
            self.begin(target)
            return []
        return self._recount(target, account) + stale(self._accounts[target])

    def derive(self, target: Target, *, prove: bool) -> list[Spoilt]:
        """Make derived tensors again, of what is live now; those that a second computation makes otherwise.

        Raises UpdateError with a function's own error.
        """
        account = self._accounts[target]
        for recipe in account.recipes:
            recipe.refresh()
        spoilt = stale(account) if prove else []
        if spoilt and len(account.recipes) > 1:
            # Those that are made of others came before them.
            for recipe in account.recipes:
                recipe.refresh()
            spoilt = stale(account)
        return spoilt

    def unproved(self, target: Target) -> dict[str, str]:
        """Names of which an update does not prove that the model computes with the version's, and why."""
        account = self._accounts.get(target)
        return target.arrived() | target.unfed | dict(account.unknown if account else {})

    def follow(self, target: Target, former: Target) -> None:
        """``target`` is ``former`` over storage that has moved."""
        if former in self._accounts:
            self._accounts.setdefault(target, self._accounts[former])

    def _recount(self, target: Target, before: Account) -> list[Spoilt]:
        account, spoilt = recount(
            self._tops(target), target, local=self._local, derived=self._derived, before=before
        )
        self._accounts[target] = account
        return spoilt

    def _require(self, target: Target, verify: bool) -> None:
        if self.require_proof and not verify:
            raise SpecError("verify: expected an update with proof, as require_proof says, got verify=False")
        if not self.require_proof or not (unknown := self.unproved(target)):
            return
        (name, why), *others = unknown.items()
        same = "; the same for " + ", ".join(other for other, _ in others[:SHOWN]) if others else ""
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise SpecError(
            f"{name}: expected proof, as require_proof says, got none: {why} (declare it with local=[...] if "
            f"no update concerns it, with derived={{...}} if the engine computes it){same}{more}"
        )

    def _tops(self, target: Target) -> dict[str, nn.Module]:
        """The modules of which ``target`` is, by the prefix of their names."""
        if isinstance(self._source, nn.Module):
            return {"": self._source}
        if not isinstance(self._source, Mapping):
            return {}
        return {f"{name}.": self._source[name] for name in target.layout.modules}
