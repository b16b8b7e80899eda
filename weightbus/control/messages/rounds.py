"""One update, check, label or catch-up, from the call to the outcome."""

from __future__ import annotations

from typing import Literal

from weightbus.control.messages.base import (
    Blob,
    Count,
    Laps,
    Message,
    Name,
    Pair,
    Rank,
    Reason,
    Record,
    Seconds,
    Seed,
    Size,
    Token,
    Word,
)
from weightbus.control.messages.diagnosis import Failure, TensorSums, Wrong
from weightbus.control.messages.members import Member
from weightbus.control.messages.partial import Partial

# A rank whose poll is over waits at least so long for others of its replica: they hear an offer a moment later.
MEET_S = 0.2

# Where a transfer has failed or stalled, a rank tries for so long to reach the others.
REACH_S = 0.8

Kind = Literal["update", "check", "label", "catch_up"]
MOVES: tuple[Kind, ...] = ("update", "catch_up")  # bytes
FactsOf = Literal["sources", "wants", "prepare", "write"]
Route = Literal["auto", "peer", "broadcast", "reshard"]
Sent = Literal["live", "device", "host"]


class Job(Record):
    """A set of modules that one committed update wrote: its seed and plan say what to expect.

    without: modules that were written later; a tensor that is tied to one of them is no longer this update's.
    """

    version: Count
    plan: Token
    seed: Seed
    modules: list[Name] | None
    without: list[Name] = []


class Settings(Record):
    """What a plan depends on besides facts. source: what is sent: the ``live`` tensors, or a copy of them on
    the ``device`` or the ``host``."""

    bucket_bytes: Count
    route: Route = "auto"
    source: Sent = "live"


class Enter(Message, tag="enter"):
    """A trainer rank calls ``update`` or ``check``. All of them must say the same, ``facts`` apart.

    facts: id of this rank's facts.
    jobs: for a check, what was committed. refusal: why this rank can't take part. task: the request that
    this answers, if any. all_replicas: no replica may be left out. repeats: this rank calls once more if the
    outcome says ``again``; after one that was put off it always does. follows: the hub gives the number: one
    above the last that was committed in this start of the trainer; before its first, one above ``after``, or
    above the last of former starts. catch_up: other replicas may get it later, from those that have it.
    """

    peer: Token
    kind: Kind
    version: Count
    modules: list[Name] | None
    verify: bool
    facts: Token
    settings: Settings
    min_replicas: Size
    join_s: Seconds
    ready_s: Seconds
    transfer_s: Seconds
    jobs: list[Job] = []
    refusal: Reason = ""
    task: Token = ""
    all_replicas: bool = False
    repeats: bool = True
    follows: bool = False
    after: Count | None = None
    catch_up: bool = True


# What all trainer ranks must say alike.
ALIKE = (
    *("kind", "follows", "after", "version", "modules", "verify", "settings", "jobs"),
    *("min_replicas", "all_replicas", "repeats"),
)


class Offer(Message, tag="offer"):
    """The start for every member. ``planned``: all members have the plan of this name.

    group: the epoch's token. members: empty where all were told in this epoch. meet_s: so long a rank whose
    ``poll`` is over waits at least for the others of its replica.
    """

    group: Token
    kind: Kind
    version: Count
    modules: list[Name] | None
    verify: bool
    plan: Token
    planned: bool
    settings: Settings
    members: list[Member]
    ready_s: Seconds
    transfer_s: Seconds
    jobs: list[Job] = []
    meet_s: Seconds = MEET_S


class Facts(Message, tag="facts"):
    """What a member holds as trainer rank, and then, in a second message, wants as server rank.

    memory: of a trainer rank, how others of its host can read what it holds; of a server rank, whether it
    can read all of that. wants_id: of what a server rank wants, for another time.
    """

    peer: Token
    blob: Blob
    memory: Blob = b""
    wants_id: Token = ""


class Gathered(Message, tag="gathered"):
    """All members' facts of one kind: the distinct ones, which of them is whose, and each one's ``memory``."""

    of: FactsOf
    blobs: list[Blob]
    holder: dict[Rank, Count]
    memory: dict[Rank, Blob] = {}


class Fold(Record):
    """Folded sums of one job for one group of server ranks that want the same boxes.

    nbytes: that were digested for it. due: that the group's wants say are to be digested at each end, all told.
    """

    job: Count
    group: Count
    sums: Pair
    nbytes: Count
    due: Count = 0


class HeldFold(Record):
    """Folded sums of what a set of trainer ranks holds alike, of which this is one.

    holders, group: which set, and for which group's boxes; ranks: how many ranks are in it.
    """

    holders: Count
    ranks: Size
    group: Count
    sums: Pair
    nbytes: Count


class Ready(Message, tag="ready"):
    """``stale``: this rank's tensors moved since the plan was made; facts must be exchanged again.

    held: of a new plan, what several trainer ranks hold, under a seed of the plan's own.
    """

    peer: Token
    plan: Token = ""
    stale: bool = False
    held: list[HeldFold] = []


class Refuse(Message, tag="refuse"):
    """A member can't take part; no byte has moved."""

    peer: Token
    reason: Reason


class Later(Message, tag="later"):
    """Of a server rank whose ``poll`` is over before bytes move: where others of its replica are not there, the
    round is to be put off until all of them are."""

    peer: Token


class Go(Message, tag="go"):
    """Every member is ready: run the plan, digest under ``seed``.

    group: of a catch-up, that of the committed update which wanted what this rank does.
    """

    seed: Seed
    group: Count = 0


class Done(Message, tag="done"):
    """A member has run its part. Of a trainer rank: ``sent``, and ``held`` of what others digest too; of a
    server rank: ``live``.

    partial: names that are not proved, and why (``cut``). wrong: what the rank itself finds
    wrong. nbytes: of the plan. starts, stages: seconds from the offer to the start of each stage on this
    rank, and of work in it. Of a check also: hidden, sums of this rank's parameters of which no wire tensor's
    digest tells all, to be compared between replicas; exempt, names that are declared not to be fed in full,
    and as what. version, verdict: of a load, what the rank holds now, and how far that is proved. symptom:
    the error is that a transfer has failed or stalled under this rank, by whoever's fault. apart: the group
    ranks that this one can't reach then. other_version: of a check: the error is that this rank holds other
    weights than those of the version that is checked.
    """

    peer: Token
    nbytes: Count = 0
    sent: list[Fold] = []
    held: list[HeldFold] = []
    live: list[Fold] = []
    partial: Partial = {}
    wrong: list[Wrong] = []
    hidden: list[TensorSums] = []
    exempt: dict[Name, Reason] = {}
    error: Reason = ""
    symptom: bool = False
    apart: list[Rank] = []
    other_version: bool = False
    starts: Laps = {}
    stages: Laps = {}
    version: Count | None = None
    verdict: Literal["verified", "partial", "unverified"] = "unverified"


class Asked(Record):
    """What a client has asked for and the trainer runs, as the ``task`` of its next ``Enter``."""

    task: Token
    kind: Kind
    version: Count | None = None
    modules: list[Name] | None = None
    verify: bool = True


class Outcome(Message, tag="outcome"):
    """The end for every member, decided once. ``moved``: bytes may have been written.

    tasks: what trainer ranks run next, before their update returns.
    digest_s: the longest that a server rank took to digest, after its transfers or in a check.
    left_out: replicas that did not take part, each with the reason. again: trainer ranks call once more: it
    failed by the fault of replicas that the next one does without, or was put off (``put_off``), as the ranks
    of one replica were not there together. version: of the update.
    right: where there is a mismatch, the group ranks of server ranks that hold what they should all the same.
    """

    ok: bool
    moved: bool
    verdict: Word
    failures: list[Failure] = []
    partial: Partial = {}
    exempt: dict[Name, Reason] = {}
    seconds: Seconds = 0.0
    digest_s: Seconds = 0.0
    trainers: Count = 0
    replicas: list[Rank] = []
    servers: Count = 0
    tasks: list[Asked] = []
    left_out: dict[Rank, Reason] = {}
    again: bool = False
    put_off: bool = False
    version: Count | None = None
    right: list[Rank] = []
