"""Joining the hub, being heard there, and leaving it."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from weightbus.control.messages.base import (
    PIECE_BYTES,
    Axes,
    Count,
    Host,
    Message,
    Name,
    Rank,
    Reason,
    Record,
    Role,
    Seconds,
    Seed,
    Size,
    State,
    Token,
    Word,
)


class Held(Record):
    """What a rank brings from an earlier hub, so that a new one takes up where that was lost.

    epoch: the last one it was in, as ``place`` of ``members``. group: that epoch's token, while its process
    group lives. plans: kept under it. version: last committed here. sealed, verdict: seed and verdict of the
    last update that was committed here. unheard: seed of an update that this rank has run, and of which it
    has not heard the outcome; it was round ``round``. incarnation: of its job, as far as it knows.
    """

    incarnation: Count = 0
    epoch: Count = 0
    place: Count = 0
    members: Count = 0
    group: Token = ""
    plans: Annotated[list[Token], Meta(max_length=1024)] = []
    version: Count | None = None
    sealed: Seed | None = None
    verdict: Word = "unverified"
    unheard: Seed | None = None
    round: Count = 0


# Only sockets of this kind are connected to, whatever a rank says.
LocalName = Annotated[str, Meta(pattern=r"\A(weightbus-[0-9a-f]{32})?\Z")]

# How many tensors of a model a hello tells of.
MAX_SAMPLE = 64


class Sampled(Record):
    """One tensor: its name on the wire, dtype and global shape."""

    name: Name
    dtype: Annotated[str, Meta(max_length=32)]
    shape: Axes


class Sketch(Record):
    """A model in short, to see whether two can be one (``sketch``). tensors: how many; plain: how many of them
    mean the same on both ends; whole: all do. sample: some of the plain ones, picked alike on both ends.
    """

    fingerprint: Token
    tensors: Count
    plain: Count
    whole: bool
    sample: Annotated[list[Sampled], Meta(max_length=MAX_SAMPLE)]


class Hello(Message, tag="hello"):
    """A process asks for a role; it has it once it has answered the welcome with a beat.

    The same process may take both roles, each with its own hello. process: drawn by it at random.
    started: when it started, as Unix time. start: what all ranks of one start of a job share and those of no
    other do; empty where nothing is known. model: what it holds; None where that is not told.
    """

    process: Token
    host: Host
    pid: Count
    device: Literal["cpu", "cuda"]
    role: Role
    rank: Rank
    size: Size
    replica: Rank = 0
    started: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    start: Token = ""
    model: Sketch | None = None
    held: Held | None = None


class Welcome(Message, tag="welcome"):
    """``peer``: drawn by the hub at random, and told to nobody else; every later message of this rank carries
    it."""

    peer: Token
    hub: Token
    beat_s: Seconds


class Refused(Message, tag="refused"):
    """``silent_s``: the place is taken by a rank that was last heard so long ago. of: the refused type."""

    reason: Reason
    silent_s: Seconds | None = None
    of: Name = ""


class Beat(Message, tag="beat"):
    """Sent once over the rank's own connection, which takes the role, then again and again over another.

    stale: how many messages of other rounds this rank has dropped so far. here: from now on this rank is to be
    sent to over the connection that this comes by. looks: how often its main thread has looked for messages.
    local_socket: under which the hub may connect, if it is on this rank's host; empty where not.
    """

    peer: Token
    state: State = ""
    version: Count | None = None
    stale: Count = 0
    here: bool = False
    looks: Count = 0
    local_socket: LocalName = ""


class Alive(Message, tag="alive"):
    """Answer to a beat, or to a message of a peer that the hub does not know (any more)."""

    peer: Token
    hub: Token
    known: bool


class Known(Message, tag="known"):
    """To a trainer rank that has joined: the last version that the hub knows of, of whichever start of the
    trainer; None if of none."""

    version: Count | None


class Piece(Message, tag="piece"):
    """Part of a message to the hub that is too long for one frame; the last one completes it."""

    peer: Token
    blob: Annotated[bytes, Meta(max_length=PIECE_BYTES)]
    last: bool


class Leave(Message, tag="leave"):
    peer: Token
    role: Role


class Farewell(Message, tag="farewell"):
    """To server ranks: the trainer job has left."""
