"""Things that a user should hear once, not at every step."""

from __future__ import annotations

import logging
from functools import cache

_log = logging.getLogger("weightbus")


@cache
def say_once(text: str) -> None:
    _log.warning("%s", text)
