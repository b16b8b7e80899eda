"""What a rank hears: messages of its own rounds. Those of another job, incarnation, epoch or round go."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

from weightbus.control import messages as m
from weightbus.control.wire import FromHub

# Messages inside a round; whoever is not in it has nothing to do with them.
INSIDE = (m.Gathered, m.Go, m.Detail, m.Suspects, m.Probe)

# Rounds that have ended and are still known as such.
MAX_ENDED = 64


class Rounds:
    """Which round this rank is in. For one thread at a time.

    header: of the round, or, between rounds, of what was heard last, with no number. entered: this rank has
    called, and waits for the offer. outcome: of the round, once it was heard. orphaned: its hub
    was lost, and the next round ends the wait for its outcome. opener: an offer that was heard, and is not
    answered so far. stale: how many were dropped.
    """

    def __init__(self, job: str) -> None:
        self.header = m.Header(job)
        self.entered = False
        self.outcome: m.Outcome | None = None
        self.orphaned = False
        self.opener: m.Offer | m.TaskOffer | None = None
        self.stale = 0
        self._ended: deque[int] = deque(maxlen=MAX_ENDED)

    def joined(self, header: m.Header) -> None:
        """A hub has let this rank in. It may be the one that was lost: what has ended there stays so."""
        self.opener = None
        if not self.header.update:
            self.header = header._replace(update=0)

    @contextlib.contextmanager
    def called(self) -> Iterator[None]:
        """While this rank's own call waits for its offer, and then for its end."""
        self.entered, self.outcome = True, None
        try:
            yield
        finally:
            self.entered = False

    @contextlib.contextmanager
    def within(self, offer: m.Offer | m.TaskOffer) -> Iterator[None]:
        """From the offer to the end: what is sent bears its header, and only what bears that is heard.

        A task may come while this rank waits for the offer of its own call, and goes on waiting.
        """
        entered, self.entered = self.entered, False
        self.header, self.outcome, self.opener = offer.header, None, None
        try:
            yield
        finally:
            self._ended.append(offer.update)
            self.header = self.header._replace(update=0)
            self.entered = entered and isinstance(offer, m.TaskOffer)

    @contextlib.contextmanager
    def beside(self, offer: m.Offer | m.TaskOffer) -> Iterator[None]:
        """For one word to a round that this rank takes no part in."""
        header, self.header, self.opener = self.header, offer.header, None
        try:
            yield
        finally:
            self._ended.append(offer.update)
            self.header = header

    def accepts(self, message: FromHub) -> bool:
        """Whether to act upon ``message``; if not, it is counted."""
        taken = self._accepts(message)
        self.stale += not taken
        if taken and isinstance(message, m.Outcome):
            self.outcome = message
        if taken and isinstance(message, m.Offer | m.TaskOffer) and message.update != self.header.update:
            self.opener = message
        return taken

    def _accepts(self, message: FromHub) -> bool:
        inside = self.header.update != 0
        match message:
            case m.Refused():
                return True  # of what could not be read, whatever it was of
            case _ if message.job != self.header.job:
                return False
            case m.Offer() | m.TaskOffer() if self.orphaned:
                return message.update != self.header.update
            case m.Offer() if inside:
                return message.header == self.header  # facts are exchanged again
            case m.Offer() | m.TaskOffer():
                return not inside and message.update not in self._ended
            case m.Outcome() if not inside:
                return self.entered and message.update not in self._ended
            case m.Outcome():
                return message.header == self.header
            case _ if isinstance(message, INSIDE):
                return inside and message.header == self.header
        return True
