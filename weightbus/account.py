"""What a server rank's model computes with: each tensor is fed, derived, local, constant or unknown."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from weightbus.box import Box
from weightbus.constants import Constants, placeholder
from weightbus.derived import Derived, Recipe, recipes_of
from weightbus.digest import Digester
from weightbus.install import Target, matches
from weightbus.part import Part
from weightbus.regions import Regions
from weightbus.spec import ITEMSIZE, Spec
from weightbus.tree import Found, tree_of

Pair = tuple[int, int]

CHANGED = (
    "expected the bytes that its constructor makes, as it had when a plan was made, got others "
    "(declare it with local=[...] if the engine writes to it)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """All tensors of a module tree but those that updates feed, and those that are local.

    unknown: by name, why nothing is known of the tensor. constants: by name, their sums under ``seed`` when
    they were found out; places: those that were zeros or ones then. recipes: what makes the derived ones.
    regions: memory of all that is known.
    """

    unknown: Mapping[str, str]
    constants: Mapping[str, Pair]
    places: frozenset[str]
    recipes: tuple[Recipe, ...]
    seed: bytes
    regions: Regions


@dataclass(frozen=True, slots=True)
class Spoilt:
    """A constant or derived tensor that holds other bytes than it should."""

    name: str
    kind: Literal["constant", "derived"]
    box: Box
    reason: str


def account_of(
    tops: Mapping[str, nn.Module], target: Target, *, local: Sequence[str], derived: Derived
) -> Account:
    """Look at every tensor of these modules, by prefix; ``target`` says which of them updates feed.

    Runs constructors of modules that hold other tensors a second time (``constants``), derived= functions once.
    Raises SpecError for a function that does not make its tensors.
    """
    return _account(tops, target, local, derived, None)[0]


def recount(
    tops: Mapping[str, nn.Module], target: Target, *, local: Sequence[str], derived: Derived, before: Account
) -> tuple[Account, list[Spoilt]]:
    """The same again, with what has changed of the constants and of what is derived since ``before``."""
    return _account(tops, target, local, derived, before)


def _account(
    tops: Mapping[str, nn.Module],
    target: Target,
    local: Sequence[str],
    derived: Derived,
    before: Account | None,
) -> tuple[Account, list[Spoilt]]:
    layout, tree = target.layout, tree_of(tops)
    unknown = {
        name: why
        for name, why in (target.exempt | tree.unseen).items()
        if why not in ("local", "derived") and not matches(name, local)
    }
    known = Regions(
        part.tensor
        for name, parts in layout.parts.items()
        if target.exempt.get(name) != "derived" and name not in unknown
        for part in parts
    )
    left = [one for one in tree.found if id(one.held) not in layout.stand_ins and not known.cover(one.tensor)]
    left = [one for one in left if one.name not in unknown]
    own = [one for one in left if matches(one.name, local)]
    known = Regions([*known.tensors, *(one.tensor for one in own)])
    left = [one for one in left if not known.cover(one.tensor)]
    made = [one for one in left if matches(one.name, derived) or target.exempt.get(one.name) == "derived"]
    recipes, undone = recipes_of(made, tree, derived)
    unknown |= undone
    if before is None:
        for recipe in recipes:
            recipe.try_out()
    known = Regions([*known.tensors, *(one.tensor for recipe in recipes for one in recipe.found)])
    left = [one for one in left if one.name not in undone and not known.cover(one.tensor)]
    odd = {one.name: f"its dtype is {one.tensor.dtype}" for one in left if _dtype(one) not in ITEMSIZE}
    unknown |= odd
    left = [one for one in left if one.name not in odd]
    held = before.constants if before else {}
    constants, others = Constants(tree).among([one for one in left if one.name not in held])
    constants += [one for one in left if one.name in held]
    seed = before.seed if before else secrets.token_bytes(32)
    sums = _sums(constants, seed)
    changed = {one.name for one in constants if one.name in held and held[one.name] != sums[one.name]}
    filled = {name for name in changed if before and name in before.places}
    others |= dict.fromkeys(filled, "zeros or ones when a plan was made, filled since; not fed by updates")
    spoilt = [
        Spoilt(one.name, "constant", _whole(one), CHANGED) for one in constants if one.name in changed - filled
    ]
    account = Account(
        unknown=unknown | others,
        constants={name: held.get(name, pair) for name, pair in sums.items()},
        places=(before.places if before else frozenset())
        | {o.name for o in constants if placeholder(o.tensor)},
        recipes=tuple(recipes),
        seed=seed,
        regions=Regions([*known.tensors, *(one.tensor for one in constants)]),
    )
    return account, spoilt + (stale(account) if before else [])


def stale(account: Account) -> list[Spoilt]:
    """Derived tensors that hold something else than a new computation gives. Raises UpdateError."""
    return [
        Spoilt(one.name, "derived", _whole(one), f"computed again, {recipe.what} gives other bytes")
        for recipe in account.recipes
        for one in recipe.differ()
    ]


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
