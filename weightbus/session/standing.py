"""What this rank tells a hub of itself: in its hello, what it has committed; in its beats, its state."""

from __future__ import annotations

from weightbus.control import messages as m
from weightbus.session.context import Context


class Standing:
    """What was committed on this rank, and what it is in the middle of.

    version, incarnation: of the last commit here. taken_up: it takes part in an update, be it that the engine
    is not told yet. unheard: the seed of one in which it has done its part, and whose end it has not heard.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.version: int | None = None
        self.incarnation = 0
        self.taken_up = False
        self.unheard: bytes | None = None
        self._sealed: tuple[bytes | None, m.Word] = None, "unverified"

    def committed(self, version: int, seed: bytes | None, outcome: m.Outcome) -> None:
        """An update, or a label, which has no seed."""
        self.version, self.incarnation = version, outcome.incarnation
        if seed is not None:
            self._sealed = seed, outcome.verdict

    def served(self) -> int | None:
        """What is served here, if it can be, as committed by the trainer."""
        destination = self._context.destination
        return self.version if destination is not None and destination.state == "ready" else None

    def held(self) -> m.Held:
        """For the hello."""
        context, alive = self._context, self._context.has_group
        header = context.link.rounds.header
        seed, verdict = self._sealed
        return m.Held(
            incarnation=header.incarnation,
            epoch=max(context.epoch, 0),
            place=context.place,
            members=len(context.members),
            group=context.token if alive else "",
            plans=context.plans.tokens[-1024:] if alive else [],
            version=self.version,
            sealed=seed,
            verdict=verdict,
            unheard=self.unheard,
            round=header.update,
        )

    def state(self) -> tuple[m.State, int | None]:
        """For the beats, and called from their thread."""
        destination = self._context.destination
        if destination is None:
            return "", self.version
        return "updating" if self.taken_up else destination.state, destination.version
