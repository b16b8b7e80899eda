"""Values of any message's schema: of the right types, meaning anything or nothing."""

from __future__ import annotations

import functools
import random
from typing import Any

import msgspec
from msgspec import inspect as i

from weightbus import messages as m

# Numbers that are close to something: other ranks, limits, the ends of what a field takes.
NUMBERS = (0, 0, 1, 1, 2, 3, 7, 1 << 19, 1 << 40, (1 << 60) - 1, 1 << 61, (1 << 62) - 1)
SECONDS = (0.0, 0.5, 3.0, 1e5, 1e6)
WORDS = ("", "a", "b", "weight")

fields_of = functools.cache(i.type_info)


def of(kind: type[m.Message], rng: random.Random, /, **given: Any) -> m.Message:
    """A message whose every field is anything that its type allows. given: fields' values, by name."""
    info = fields_of(kind)
    assert isinstance(info, i.StructType)
    fields = {field.name: value(field.type, rng) for field in info.fields if field.name not in given}
    return msgspec.convert(fields | given, kind)


def value(kind: Any, rng: random.Random) -> Any:
    """Of a type, as plain data."""
    match kind:
        case i.Metadata():
            return value(kind.type, rng)
        case i.NoneType():
            return None
        case i.BoolType():
            return rng.random() < 0.5
        case i.IntType():
            least = 0 if kind.ge is None else kind.ge
            ends = (kind.lt, None if kind.le is None else kind.le + 1, 1 << 62)
            below = min(end for end in ends if end is not None)
            return rng.choice([least, below - 1, *(n for n in NUMBERS if least <= n < below)])
        case i.FloatType():
            return rng.choice([n for n in SECONDS if kind.le is None or n <= kind.le])
        case i.StrType():
            return rng.choice(WORDS)
        case i.BytesType():
            return rng.choice((b"x", b"y")) * (kind.min_length or rng.randrange(3))
        case i.LiteralType():
            return rng.choice(kind.values)
        case i.UnionType():
            return value(rng.choice(kind.types), rng)
        case i.ListType() | i.VarTupleType():
            return [value(kind.item_type, rng) for _ in range(rng.randrange(3))]
        case i.TupleType():
            return [value(one, rng) for one in kind.item_types]
        case i.DictType():
            return {value(kind.key_type, rng): value(kind.value_type, rng) for _ in range(rng.randrange(3))}
        case i.StructType():
            fields = {field.name: value(field.type, rng) for field in kind.fields}
            return fields | ({kind.tag_field: kind.tag} if kind.tag_field else {})
    raise AssertionError(f"no values of {kind}")
