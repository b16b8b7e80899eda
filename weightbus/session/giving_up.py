"""How a rank answers, and how it ends its part in a round that it can't follow.

That is after an exception, an interrupt, or where the hub is lost.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from weightbus.control import messages as m
from weightbus.control.link import HubLost, Link
from weightbus.control.rounds import Rounds
from weightbus.errors import HubError, ProtocolError, WeightbusError, visible
from weightbus.hub.in_process import Loopback
from weightbus.session.hearing import Aside, Ended

# The hub ends a round a second after one rank has given it up; a rank waits so long to hear that.
GIVE_UP_S = 3.0

# Of a reason that a rank gives; the schema allows more.
MAX_REASON_CHARACTERS = 8 << 10


def answer(link: Link | Loopback, step: Callable[[], m.Message | None]) -> None:
    """Send what ``step`` says, or refuse with what it raises; None: nothing is to be said."""
    try:
        if (said := step()) is not None:
            link.send(said)
    except (Ended, HubLost):
        raise
    except Exception as error:
        link.send(m.Refuse(peer=link.peer, reason=explain(error)))


def explain(error: BaseException) -> str:
    """The reason that travels: never more than a message takes, be it that thousands of names are in it."""
    text = str(error)
    if not isinstance(error, WeightbusError):
        kind = type(error).__name__
        text = f"{kind}: {text}" if text else f"interrupted by {kind}"
    if (more := len(text) - MAX_REASON_CHARACTERS) > 0:
        text = f"{text[:MAX_REASON_CHARACTERS]}... ({more} more characters)"
    return visible(text)


def failed(rounds: Rounds, rank: str, reason: str, *, moved: bool) -> m.Outcome:
    """The outcome as this rank says it where the hub's is not heard: never a commit."""
    failure = m.Failure(rank=rank, tensor=None, reason=reason)
    outcome = m.Outcome(ok=False, moved=moved, verdict="failed", failures=[failure])
    outcome.stamp(rounds.header)
    return outcome


def give_up(link: Link | Loopback, aside: Aside, reason: str) -> m.Outcome | None:
    """Tell the hub, so that nobody waits for this rank, and hear how the round ends.

    It may have been committed just before. None if nothing is heard.
    """
    if link.rounds.outcome is not None:
        return link.rounds.outcome  # an interrupt came between hearing it and acting upon it
    with contextlib.suppress(HubError, ProtocolError):
        link.send(m.Refuse(peer=link.peer, reason=reason))
        deadline = time.monotonic() + GIVE_UP_S
        while (left := deadline - time.monotonic()) > 0:
            message = link.receive(left)
            if isinstance(message, m.Outcome):
                return message
            if isinstance(message, m.Offer | m.TaskOffer):
                link.decline(message, reason)
            elif message is not None:
                aside.take(message)
    return None
