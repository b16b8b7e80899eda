"""Random numbers that a test draws anew at each run."""

from __future__ import annotations

import random


def seeded(seed: float | str) -> random.Random:
    """A generator of its own: equal seeds draw equal numbers."""
    return random.Random(seed)  # noqa: S311 - what has failed must fail again
