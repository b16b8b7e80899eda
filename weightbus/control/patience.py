"""When to say in the log what is waited for: after some seconds, and then more and more rarely."""

from __future__ import annotations

from dataclasses import dataclass

AFTER_S = 5.0
TIMES = 3.0


@dataclass(slots=True)
class Patience:
    """Of one wait. since: when it began, on the clock of whoever asks."""

    since: float
    after_s: float = AFTER_S

    def is_over(self, now: float) -> bool:
        """Whether it is time for a word; not again before ``TIMES`` as long."""
        if now - self.since < self.after_s:
            return False
        self.after_s *= TIMES
        return True
