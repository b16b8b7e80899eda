"""How a rank ends its part in a round that it can't follow: an exception, an interrupt, or a lost hub."""

from __future__ import annotations

import contextlib
import time

from weightbus import messages as m
from weightbus.errors import HubError, ProtocolError
from weightbus.link import Link
from weightbus.loopback import Loopback
from weightbus.rounds import Rounds

# The hub ends a round a second after one rank has given it up; a rank waits so long to hear that.
GIVE_UP_S = 3.0


def failed(rounds: Rounds, rank: str, reason: str, *, moved: bool) -> m.Outcome:
    """The outcome as this rank says it where the hub's is not heard: never a commit."""
    failure = m.Failure(rank=rank, tensor=None, reason=reason)
    outcome = m.Outcome(ok=False, moved=moved, verdict="failed", failures=[failure])
    outcome.stamp(rounds.header)
    return outcome


def give_up(link: Link | Loopback, reason: str) -> m.Outcome | None:
    """Tell the hub, so that nobody waits for this rank, and hear how the round ends.

    It may have been committed just before. None if nothing is heard.
    """
    if link.rounds.outcome is not None:
        return link.rounds.outcome  # an interrupt came between hearing it and acting upon it
    farewell: m.Farewell | None = None
    try:
        with contextlib.suppress(HubError, ProtocolError):
            link.send(m.Refuse(peer=link.peer, reason=reason))
            deadline = time.monotonic() + GIVE_UP_S
            while (left := deadline - time.monotonic()) > 0:
                message = link.receive(left)
                if isinstance(message, m.Outcome):
                    return message
                if isinstance(message, m.Farewell):
                    farewell = message
                elif isinstance(message, m.Offer | m.TaskOffer):
                    link.decline(message, reason)
        return None
    finally:
        if farewell is not None:
            link.push_back(farewell)
