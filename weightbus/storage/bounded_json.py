"""JSON of others, bounded before it is parsed: so many values, and each name once in an object."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from weightbus.errors import SpecError
from weightbus.storage.opened import short

MAX_VALUES = 1 << 20
"""Of one text. A parsed value takes up to 120 bytes."""


def check_values(where: object, text: bytes, limit: int = MAX_VALUES) -> None:
    """Raise SpecError where a JSON text may have more than ``limit`` values: each one but the first follows a
    comma, or begins an array or an object. Reads the text three times, and makes nothing of it."""
    values = 1 + text.count(b",") + text.count(b"[") + text.count(b"{")
    if values > limit:
        raise SpecError(f"{where}: expected JSON of at most {limit} values, got up to {values}")


def decode(where: object, text: bytes, kind: Any, limit: int = MAX_VALUES) -> Any:
    """A JSON text as ``kind``, a type that msgspec knows. ``where`` names it in errors.

    Raises SpecError for other JSON or none, too many values, a name that one object has twice, which parsers
    silently drop, and names that are no UTF-8.
    """
    check_values(where, text, limit)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise SpecError(
                f"{where}: {short(twice)}: expected each name once, got it twice in one JSON object"
            )
        "".join(found).encode()  # JSON can spell half a surrogate pair
        return found

    try:
        return msgspec.convert(json.loads(text, object_pairs_hook=once), kind)
    except SpecError:
        raise
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise SpecError(f"{where}: expected a JSON object, got {short(error)}") from error
