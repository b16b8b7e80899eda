"""What a rank hears while it works: that its round has ended, and what is not of its round."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from weightbus.control import messages as m
from weightbus.control.link import Link
from weightbus.control.wire import FromHub
from weightbus.errors import WeightbusError
from weightbus.hub.in_process import Loopback

log = logging.getLogger("weightbus")

# The hub ends every phase by its own deadline; a rank allows it this much more.
SLACK_S = 30.0

# How often a rank that is moving bytes looks at what the hub says.
LOOK_S = 0.02


class Ended(WeightbusError):
    """The hub has ended the round while this rank was still working on it."""

    def __init__(self, outcome: m.Outcome) -> None:
        super().__init__("the update has ended")
        self.outcome = outcome


class Aside:
    """What is heard in a round and is not of it: it must not hide what comes behind it.

    waited: the end of a wait. A farewell is heard again once the round is over.
    """

    def __init__(self, link: Link | Loopback) -> None:
        self._link = link
        self._farewell: m.Farewell | None = None
        self.waited: m.Waited | None = None

    def take(self, message: FromHub) -> bool:
        """Whether ``message`` is such a one; it is then kept, or logged."""
        match message:
            case m.Farewell():
                self._farewell = message
            case m.Waited():
                self.waited = message
            case m.Missing():
                log_missing(message)
            case _:
                return False
        return True

    def give_back(self) -> None:
        """The round is over: what was said meanwhile is heard again."""
        farewell, self._farewell = self._farewell, None
        if farewell is not None:
            self._link.push_back(farewell)


def look_at(link: Link | Loopback, aside: Aside) -> Callable[[], None]:
    """A function to call while working, as often as one likes: raises Ended once the hub has ended the
    round."""
    next_look = time.monotonic() + LOOK_S

    def look() -> None:
        nonlocal next_look
        now = time.monotonic()
        if now < next_look:
            return
        next_look = now + LOOK_S
        message = link.receive(0)
        if isinstance(message, m.Outcome):
            raise Ended(message)
        if isinstance(message, m.Polled):
            log.info("late: %s", type(message).__name__)  # it must not hide what comes behind it
        elif message is not None and not aside.take(message):
            link.push_back(message)

    return look


def log_missing(missing: m.Missing) -> None:
    """What the hub says that a round waits for."""
    lines = "\n  ".join(["", *missing.lines])
    log.warning("%s has waited %.0f s for:%s", missing.what, missing.waited_s, lines)
