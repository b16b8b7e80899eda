"""What a server rank's model computes with: each tensor is fed, derived, local, constant or unknown."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from weightbus.digest import Digester
from weightbus.inventory.constants import Constants, placeholder
from weightbus.inventory.derived import Derived, Recipe, recipes_of
from weightbus.inventory.regions import Regions
from weightbus.inventory.tree import Found, Tree, tree_of
from weightbus.memory.shard import Part
from weightbus.planning.box import Box
from weightbus.planning.spec import ITEMSIZE, Spec
from weightbus.tensors.install import Target, matches

Pair = tuple[int, int]

FILLED = "zeros or ones when a plan was made, filled since; not fed by updates"
CHANGED = (
    "expected the bytes that its constructor makes, as it had when a plan was made, got others "
    "(declare it with local=[...] if the engine writes to it)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """All tensors of a module tree but those that updates feed, and those that are local.

    unknown: by name, why nothing is known of the tensor. reads: those that only a forward showed. held: the
    constants; constants: their sums under ``seed`` when they were found out; places: those that were zeros or
    ones then. recipes: what makes the derived ones. tree: what was looked at.
    """

    unknown: Mapping[str, str]
    held: tuple[Found, ...]
    constants: Mapping[str, Pair]
    places: frozenset[str]
    recipes: tuple[Recipe, ...]
    seed: bytes
    tree: Tree
    reads: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spoilt:
    """A constant or derived tensor that holds other bytes than it should."""

    name: str
    kind: Literal["constant", "derived"]
    box: Box
    reason: str


@dataclass(frozen=True, slots=True)
class _Sorted:
    """unknown: by name, with the reason. recipes: of what is derived. left: neither fed, local nor derived."""

    unknown: dict[str, str]
    recipes: list[Recipe]
    left: list[Found]


def account_of(
    tops: Mapping[str, nn.Module], target: Target, *, local: Sequence[str], derived: Derived
) -> Account:
    """Look at every tensor of these modules, by prefix; ``target`` says which of them updates feed.

    Runs constructors of modules that hold other tensors a second time (``constants``), derived= functions once.
    Raises SpecError for a function that does not make its tensors.
    """
    tree = tree_of(tops)
    known = _sorted(tree, target, local, derived)
    for recipe in known.recipes:
        recipe.try_out()
    constants, unknown = Constants(tree).among(known.left)
    seed = secrets.token_bytes(32)
    return Account(
        unknown=known.unknown | unknown,
        held=tuple(constants),
        constants=_sums(constants, seed),
        places=frozenset(one.name for one in constants if placeholder(one.tensor)),
        recipes=tuple(known.recipes),
        seed=seed,
        tree=tree,
    )


def recount(
    tops: Mapping[str, nn.Module], target: Target, *, local: Sequence[str], derived: Derived, before: Account
) -> tuple[Account, list[Spoilt]]:
    """The same for a tree that may have changed, and the constants that no longer are what they were."""
    account = before if not before.tree.changed() else _recounted(tops, target, local, derived, before)
    sums = _sums(account.held, account.seed)
    changed = [one for one in account.held if sums[one.name] != account.constants[one.name]]
    filled = {one.name: FILLED for one in changed if one.name in account.places}
    spoilt = [one for one in changed if one.name not in account.places]
    if filled:
        account = replace(account, unknown={**account.unknown, **filled})
    return account, [Spoilt(one.name, "constant", _whole(one), CHANGED) for one in spoilt]


def _recounted(
    tops: Mapping[str, nn.Module], target: Target, local: Sequence[str], derived: Derived, before: Account
) -> Account:
    """Only what is new is looked into: what was unknown stays so until a plan is made."""
    tree = tree_of(tops)
    known = _sorted(tree, target, local, derived)
    held = [one for one in known.left if one.name in before.constants]
    new = [one for one in known.left if one.name not in before.constants and one.name not in before.unknown]
    constants, unknown = Constants(tree).among(new)
    unknown |= {one.name: before.unknown[one.name] for one in known.left if one.name in before.unknown}
    return Account(
        unknown=known.unknown | unknown | dict(before.reads),
        reads=before.reads,
        held=(*held, *constants),
        constants=_sums(constants, before.seed) | {one.name: before.constants[one.name] for one in held},
        places=before.places | {one.name for one in constants if placeholder(one.tensor)},
        recipes=tuple(known.recipes),
        seed=before.seed,
        tree=tree,
    )


def stale(account: Account) -> list[Spoilt]:
    """Derived tensors that hold something else than a new computation gives. Raises UpdateError."""
    return [
        Spoilt(one.name, "derived", _whole(one), f"computed again, {recipe.what} gives other bytes")
        for recipe in account.recipes
        for one in recipe.differ()
    ]


def _sorted(tree: Tree, target: Target, local: Sequence[str], derived: Derived) -> _Sorted:
    layout, exempt = target.layout, target.exempt
    unknown = {
        name: why
        for name, why in (exempt | tree.unseen).items()
        if why not in ("local", "derived") and not matches(name, local)
    }
    fed = Regions(
        part.tensor
        for name, parts in layout.parts.items()
        if exempt.get(name) != "derived" and name not in unknown
        for part in parts
    )
    # What a declared tensor is made of, such as the values of a sparse one, is declared with it.
    whole = tuple(f"{name}." for name in layout.left_out if exempt.get(name) == "local")
    left = [
        one
        for one in tree.found
        if one.name not in unknown
        and not one.name.startswith(whole)
        and id(one.held) not in layout.stand_ins
        and not fed.cover(one.tensor)
    ]
    own = Regions([*fed.tensors, *(one.tensor for one in left if matches(one.name, local))])
    left = [one for one in left if not own.cover(one.tensor)]
    made = [one for one in left if matches(one.name, derived) or exempt.get(one.name) == "derived"]
    recipes, undone = recipes_of(made, tree, derived)
    unknown |= undone
    known = Regions([*own.tensors, *(one.tensor for recipe in recipes for one in recipe.found)])
    left = [one for one in left if one.name not in unknown and not known.cover(one.tensor)]
    unknown |= {one.name: f"its dtype is {one.tensor.dtype}" for one in left if _dtype(one) not in ITEMSIZE}
    return _Sorted(unknown, recipes, [one for one in left if one.name not in unknown])


def _whole(one: Found) -> Box:
    return Box.whole(tuple(one.tensor.shape))


def _sums(found: Sequence[Found], seed: bytes) -> dict[str, Pair]:
    parts = []
    for one in found:
        spec = Spec(name=one.name, dtype=_dtype(one), shape=tuple(one.tensor.shape))
        parts.append(Part(spec=spec, box=_whole(one), tensor=one.tensor))
    rows = Digester(parts).sums(seed).tolist() if parts else []
    return {one.name: (a, b) for one, (a, b) in zip(found, rows, strict=True)}


def _dtype(one: Found) -> str:
    return str(one.tensor.dtype).removeprefix("torch.")
