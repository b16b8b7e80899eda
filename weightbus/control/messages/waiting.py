"""Ranks that wait for a version or a request, what they wait for, and how a trainer rank ends that."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from weightbus.control.messages.base import Count, Message, Name, Reason, Seconds, Token
from weightbus.control.messages.diagnosis import Failure
from weightbus.control.messages.rounds import Asked


class Await(Message, tag="await"):
    """A server rank waits for ``version``, or a later one; counted by itself. It takes part in rounds, too.

    holds, of: the version that was committed here last, and its incarnation.
    """

    peer: Token
    number: Count
    version: Count
    wait_s: Seconds
    holds: Count | None = None
    of: Count = 0


class Waited(Message, tag="waited"):
    """The end of a wait, where no outcome that the rank hears ends it; the same for all ranks of a replica."""

    number: Count
    ok: bool
    moved: bool = False
    failures: list[Failure] = []


# How many of those that are missing are told of.
MAX_MISSING = 8


class Missing(Message, tag="missing"):
    """To ranks that wait, for their logs: for whom, and for what, since ``waited_s``."""

    what: Name
    waited_s: Seconds
    lines: Annotated[list[Reason], Meta(max_length=MAX_MISSING)]


class Cancel(Message, tag="cancel"):
    """Of a trainer rank, over whichever connection: end the round before bytes move, and all servers' waits."""

    peer: Token
    reason: Reason


class Cancelled(Message, tag="cancelled"):
    """ended: whether there was something to end."""

    ended: bool


class Poll(Message, tag="poll"):
    """A trainer rank's ``poll``, counted by itself: all ranks get the same answer to the same number."""

    peer: Token
    number: Count


class Polled(Message, tag="polled"):
    number: Count
    task: Asked | None = None
