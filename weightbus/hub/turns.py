"""Which connections may still cost the hub an answer, or a line in its log, in this second."""

from __future__ import annotations

from collections import Counter

# Refusals, hellos and requests that one connection gets answered in a second, and all of them before each gets
# few; what a stranger sends beyond that is only counted.
MAX_ANSWERS_PER_S = 100
MAX_ANSWERS_OF_ALL_PER_S = 2000
FEW_ANSWERS_PER_S = 5


class Turns:
    """Counts answers and lines of one second. counts: the hub's own, of what it has left unanswered."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        self._answered: Counter[bytes] = Counter()
        self._answers = self._logged = 0

    def take(self, identity: bytes) -> bool:
        """Whether this connection may cost the hub another answer; that is then counted."""
        if self.is_muted(identity):
            self._counts["muted"] += 1
            return False
        self._answered[identity] += 1
        self._answers += 1
        return True

    def is_muted(self, identity: bytes) -> bool:
        few = self._answers >= MAX_ANSWERS_OF_ALL_PER_S
        return self._answered.get(identity, 0) >= (FEW_ANSWERS_PER_S if few else MAX_ANSWERS_PER_S)

    def may_log(self) -> bool:
        self._logged += 1
        return self._logged <= MAX_ANSWERS_PER_S

    def next_second(self) -> None:
        self._answered.clear()
        self._answers = self._logged = 0
