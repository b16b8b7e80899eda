"""Strategies for any message's schema: values of the right types, meaning anything or nothing."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect as i

from weightbus.control import messages as m

# Numbers that are close to something: other ranks, limits, the ends of what a field takes.
NUMBERS = (0, 1, 2, 3, 7, 1 << 19, 1 << 40, (1 << 60) - 1, 1 << 61, (1 << 62) - 1)
SECONDS = (0.0, 0.5, 3.0, 1e5, 1e6)
WORDS = ("", "a", "b", "weight")
SOCKET = f"weightbus-{0:032x}"

Plain = st.SearchStrategy[Any]


def of(kind: type[msgspec.Struct], /, words: Sequence[str] = WORDS, **given: Plain) -> Plain:
    """Messages whose every field is anything that its type allows; fields with a default shrink to that.

    words: their text. given: what is drawn for fields, by name.
    """
    return _fields(_info(kind), words, given).map(lambda fields: msgspec.convert(fields, kind))


@functools.cache
def _info(kind: type[msgspec.Struct]) -> i.StructType:
    info = i.type_info(kind)
    assert isinstance(info, i.StructType)
    return info


def _fields(info: i.StructType, words: Sequence[str], given: dict[str, Plain]) -> Plain:
    needed = given | {f.name: value(f.type, words) for f in info.fields if f.required and f.name not in given}
    others = {f.name: value(f.type, words) for f in info.fields if f.name not in needed}
    return st.fixed_dictionaries(needed, optional=others)


def value(kind: Any, words: Sequence[str] = WORDS) -> Plain:
    """Of a type, as plain data."""
    match kind:
        case i.Metadata():
            return value(kind.type, words)
        case i.NoneType():
            return st.none()
        case i.BoolType():
            return st.booleans()
        case i.IntType():
            least = 0 if kind.ge is None else kind.ge
            ends = (kind.lt, None if kind.le is None else kind.le + 1, 1 << 62)
            below = min(end for end in ends if end is not None)
            near = {least, below - 1, *(number for number in NUMBERS if least <= number < below)}
            return st.sampled_from(sorted(near, key=abs))
        case i.FloatType():
            return st.sampled_from([number for number in SECONDS if kind.le is None or number <= kind.le])
        case i.StrType():
            fit = [word for word in (*WORDS, SOCKET) if re.search(kind.pattern or "", word)]
            return st.sampled_from(words if kind.pattern is None else fit)
        case i.BytesType():
            return st.sampled_from([one * (kind.min_length or 1) for one in (b"x", b"y")])
        case i.LiteralType():
            return st.sampled_from(kind.values)
        case i.UnionType():
            return st.one_of([value(one, words) for one in kind.types])
        case i.ListType() | i.VarTupleType():
            return st.lists(value(kind.item_type, words), max_size=2)
        case i.TupleType():
            return st.tuples(*[value(one, words) for one in kind.item_types]).map(list)
        case i.DictType():
            keys, values = value(kind.key_type, words), value(kind.value_type, words)
            return st.dictionaries(keys, values, max_size=2)
        case i.StructType():
            tag = {kind.tag_field: st.just(kind.tag)} if kind.tag_field else {}
            return st.tuples(_fields(kind, words, {}), st.fixed_dictionaries(tag)).map(
                lambda two: two[0] | two[1]
            )
    raise AssertionError(f"no values of {kind}")


def any_of(kinds: tuple[type[m.Message], ...], /, **given: Plain) -> Plain:
    """Messages of any of these kinds."""
    return st.one_of([of(kind, **given) for kind in kinds])
