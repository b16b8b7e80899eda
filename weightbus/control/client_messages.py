"""Requests from outside, and the hub's answers: messages between a client and the hub.

A client never says hello. Each request has an id of its own, which every answer to it carries; those that
change something name the hub, as its status did, so that a recorded request is of no use to anyone.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from weightbus.control.messages import (
    Count,
    Failure,
    Kind,
    Message,
    Name,
    Rank,
    Reason,
    Record,
    Seconds,
    State,
    Token,
    Word,
)


class AskStatus(Message, tag="ask_status"):
    """``past``: how many of the last updates and checks to tell."""

    id: Token
    past: Count = 1


class AskUpdate(Message, tag="ask_update"):
    id: Token
    hub: Token
    wait_s: Seconds
    version: Count | None = None
    modules: list[Name] | None = None
    verify: bool = True


class AskCheck(Message, tag="ask_check"):
    id: Token
    hub: Token
    wait_s: Seconds


class AskVersion(Message, tag="ask_version"):
    """From now on, what trainer and servers hold counts as ``version``."""

    id: Token
    hub: Token
    wait_s: Seconds
    version: Count


class AskPause(Message, tag="ask_pause"):
    """Hold updates back until resumed, but not longer than ``for_s``."""

    id: Token
    hub: Token
    for_s: Seconds


class AskResume(Message, tag="ask_resume"):
    id: Token
    hub: Token


class Waiting(Message, tag="waiting"):
    """The request is in the queue; ``reason`` says for what it waits."""

    id: Token
    reason: Reason


class Answer(Message, tag="answer"):
    """The end of a request. ``verdict``: of the update or check that was run for it."""

    id: Token
    ok: bool
    reason: Reason = ""
    verdict: Word = "unverified"
    version: Count | None = None
    failures: tuple[Failure, ...] = ()
    partial: tuple[tuple[Name, Reason], ...] = ()
    servers: Count = 0
    seconds: Seconds = 0.0


class PeerStatus(Record):
    rank: Name
    replica: Rank | None
    host: Name
    pid: Count
    device: Name
    state: State
    version: Count | None
    heard_s: Seconds


class RankTimes(Record):
    """Seconds since the round began: of a rank's answers, and of its stages' starts; stages as in Done."""

    rank: Name
    ready_s: Seconds | None
    done_s: Seconds | None
    starts: dict[Name, Seconds]
    stages: dict[Name, Seconds]


class Past(Record):
    """One round that has ended. ``phases``: seconds since its beginning at which each began."""

    kind: Kind
    version: Count
    epoch: Count
    planned: bool
    began: Annotated[float, Meta(ge=0)]
    seconds: Seconds
    verdict: Word
    nbytes: Count
    servers: Count
    failures: list[Failure]
    phases: dict[Name, Seconds]
    ranks: list[RankTimes]


class Status(Message, tag="status"):
    """Answer to ``AskStatus``. ``missing``: what a round that is going on waits for. counts: of the hub, all
    jobs together. jobs: that have ranks here; empty for the one without a name."""

    id: Token
    hub: Token
    weightbus: Name
    up_s: Seconds
    version: Count | None
    paused_s: Seconds
    peers: list[PeerStatus]
    incomplete: list[Rank]
    phase: Name
    missing: list[Reason]
    requests: Count
    counts: dict[Name, Count]
    jobs: list[Name]
    past: list[Past]


Command = AskUpdate | AskCheck | AskVersion | AskPause | AskResume
