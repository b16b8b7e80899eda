"""Names that are not proved, with their reasons, as they travel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta

from weightbus.control.messages.base import Name

# How many names that are not proved travel, with their reasons; of the others, how many there are.
MAX_PARTIAL = 256
MORE = "more names"
Partial = Annotated[dict[Name, Annotated[str, Meta(max_length=1024)]], Meta(max_length=MAX_PARTIAL + 1)]


def cut(partial: Mapping[str, str]) -> dict[str, str]:
    """What travels of names that are not proved. Never empty unless ``partial`` is; the same once cut."""
    if len(partial) <= MAX_PARTIAL:
        return {name[:1024]: why[:1024] for name, why in partial.items()}
    kept = [name for name in partial if name != MORE][:MAX_PARTIAL]
    more = len(partial) - len(kept) + (0 if MORE not in partial else int(partial[MORE].split()[0]) - 1)
    return cut({name: partial[name] for name in kept}) | {MORE: f"{more} more are not proved either"}
