"""What is wrong: failures, and the search for wrong tensors by sums, clues and ever smaller boxes."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from weightbus.control.messages.base import Axes, Count, Message, Name, Pair, Reason, Record, Token

# What a wrong tensor turned out to be (docs/checks.md); empty where nothing is known of it.
Damage = Literal[
    "",
    "zeros",
    "stale",
    "swapped",
    "other shard",
    "element",
    "block",
    "scattered",
    "fill",
    "constant",
    "derived",
    "replicas differ",
]

# How many wrong tensors are looked into in one update or check, how many of them are narrowed down, and
# how many boxes of each are compared at a time.
MAX_SUSPECTS = 256
MAX_NARROWED = 16
MAX_BOXES = 256

# With the boxes of how many other groups a server rank compares its bytes.
MAX_GROUPS = 16
Elsewhere = Annotated[dict[Count, Pair], Meta(max_length=MAX_GROUPS)]


class Failure(Record):
    """One thing that went wrong: on which rank, with which tensor if it is one tensor's.

    kind: what it turned out to be. where: as text, and as the box of the global tensor that holds all
    that differs. other_version: as of ``Done``.
    """

    rank: Name
    tensor: Name | None
    reason: Reason
    kind: Damage = ""
    where: Reason = ""
    box: Span | None = None
    other_version: bool = False

    def __str__(self) -> str:
        where = ": ".join(filter(None, (self.kind, self.where)))
        text = "; ".join(filter(None, (self.reason, where)))
        return f"{self.tensor}: {text}; {self.rank}" if self.tensor else f"{self.rank}: {text}"


class Span(Record):
    """A box on the wire."""

    offsets: Axes
    sizes: Axes


class Wrong(Record):
    """A tensor that a server rank itself finds wrong. kind: one that loading code fills with a constant, one
    that never changes, or one that the engine computes from others."""

    name: Name
    reason: Reason
    box: Span
    kind: Literal["fill", "constant", "derived"] = "fill"


class TensorSums(Record):
    job: Count
    group: Count
    sums: dict[Name, Pair]


class HeldSums(Record):
    holders: Count
    group: Count
    sums: dict[Name, Pair]


class Detail(Message, tag="detail"):
    """Folds differ: send the sums of each tensor for these groups of these jobs.

    Trainer ranks of an update also send those of what others hold too: for the same groups, and for these sets
    and groups (``held``).
    """

    groups: list[tuple[Count, Count]]
    held: list[tuple[Count, Count]] = []


class Sums(Message, tag="sums"):
    peer: Token
    sent: list[TensorSums] = []
    live: list[TensorSums] = []
    held: list[HeldSums] = []


class Suspect(Record):
    """A tensor that is wrong on some server rank of a group."""

    job: Count
    group: Count
    tensor: Name


class Suspects(Message, tag="suspects"):
    """Say what you know of these tensors: a Clue for each, in order."""

    suspects: Annotated[list[Suspect], Meta(max_length=MAX_SUSPECTS)]


class SentClue(Record):
    """What a trainer rank knows of a suspect; the sums of all trainer ranks add up.

    former: the version committed before this one, and the sums kept of it. elsewhere: sums of the boxes that
    other groups want. now: of what the source holds now; None if that is something else, why: the reason.
    """

    former: Count | None
    former_sums: Pair
    elsewhere: Elsewhere
    now: Pair | None
    why: Reason


class LiveClue(Record):
    """What a server rank knows of a suspect.

    former: the version committed before this one, and sums of what is live now under that one's seed.
    elsewhere: by group, what the live bytes come to if taken for that group's boxes.
    pieces: how many boxes of the tensor, whose shape it is, lie here; none where they can't be digested.
    box: around all of them.
    """

    former: Count | None
    former_sums: Pair
    elsewhere: Elsewhere
    pieces: Count
    box: Span | None
    shape: Axes


class Clue(Record):
    sent: SentClue | None = None
    live: LiveClue | None = None


class Clues(Message, tag="clues"):
    peer: Token
    clues: Annotated[list[Clue], Meta(max_length=MAX_SUSPECTS)]


class Question(Record):
    """Boxes of one tensor, of which sums are asked for: of what lies within the group's boxes.

    sent: of what trainer ranks hold now, else of what is live on a server rank.
    """

    job: Count
    group: Count
    tensor: Name
    sent: bool
    boxes: Annotated[list[Span], Meta(max_length=MAX_BOXES)]


class Probe(Message, tag="probe"):
    questions: Annotated[list[Question], Meta(max_length=2 * MAX_NARROWED)]


class Probed(Message, tag="probed"):
    """Sums for each box of each question, in order."""

    peer: Token
    sums: list[Annotated[list[Pair], Meta(max_length=MAX_BOXES)]] = []
    error: Reason = ""
