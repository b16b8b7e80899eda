"""The control channel's messages between ranks and hub, typed and bounded (docs/protocol.md).

``asks`` has those of clients, ``wire`` puts both into frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

# Facts of a large model are the longest message: 100,000 tensors of 16 shards take about 200 MB.
MAX_MESSAGE_BYTES = 256 << 20

# A message to the hub that is longer than this travels in pieces, which only members may send: no
# stranger can make the hub hold more than a frame of this size and a little.
PIECE_BYTES = 256 << 10
MAX_FRAME_BYTES = PIECE_BYTES + 1024

Residue = Annotated[int, Meta(ge=0, lt=1 << 61)]
Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
Rank = Annotated[int, Meta(ge=0, lt=1 << 20)]
Size = Annotated[int, Meta(ge=1, le=1 << 20)]
Name = Annotated[str, Meta(max_length=1024)]
Host = Annotated[str, Meta(pattern=r"^[\w.-]{0,255}$")]
Token = Annotated[str, Meta(max_length=64)]
Reason = Annotated[str, Meta(max_length=64 << 10)]
Seconds = Annotated[float, Meta(ge=0, le=1e6)]
Seed = Annotated[bytes, Meta(min_length=32, max_length=32)]
Blob = Annotated[bytes, Meta(max_length=MAX_MESSAGE_BYTES)]
Pair = tuple[Residue, Residue]
Axes = Annotated[list[Count], Meta(max_length=64)]

# All tensors of one request together; each of them is bounded by MAX_MESSAGE_BYTES.
MAX_PAYLOAD_BYTES = 1 << 30
Kind = Literal["update", "check", "label"]
FactsOf = Literal["sources", "wants", "prepare", "write"]
Word = Literal["verified", "partial", "unverified", "mismatch", "failed"]
Role = Literal["trainer", "server"]
State = Literal["", "empty", "ready", "updating", "torn"]

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


# How many names that are not proved travel, with their reasons; of the others, how many there are.
MAX_PARTIAL = 256
MORE = "more names"
Partial = Annotated[dict[Name, Annotated[str, Meta(max_length=1024)]], Meta(max_length=MAX_PARTIAL + 1)]


def cut(partial: Mapping[str, str]) -> dict[str, str]:
    """What travels of names that are not proved. Never empty unless ``partial`` is; the same once cut."""
    if len(partial) <= MAX_PARTIAL:
        return {name[:1024]: why[:1024] for name, why in partial.items()}
    kept = [name for name in partial if name != MORE][:MAX_PARTIAL]
    more = len(partial) - len(kept) + (0 if MORE not in partial else int(partial[MORE].split()[0]) - 1)
    return cut({name: partial[name] for name in kept}) | {MORE: f"{more} more are not proved either"}


# Of a job; empty for one that nobody has named. It is shown to people, so nothing else is in it.
JOB_PATTERN = r"^[A-Za-z0-9._/:@+-]{0,64}$"
JobName = Annotated[str, Meta(pattern=JOB_PATTERN)]


class Header(NamedTuple):
    """What a message is of. Whatever is not of the receiver's own is dropped and counted, never acted upon.

    job: its name. incarnation: of the job, drawn by the hub for each start of the trainer. epoch: of the set of
    ranks. update: number of the round (an update, check, label or task); 0 outside rounds.
    """

    job: str = ""
    incarnation: int = 0
    epoch: int = 0
    update: int = 0


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages; these fields are the header, and in each of them."""

    job: JobName = ""
    incarnation: Count = 0
    epoch: Count = 0
    update: Count = 0

    @property
    def header(self) -> Header:
        return Header(self.job, self.incarnation, self.epoch, self.update)

    def stamp(self, header: Header) -> None:
        """Make it a message of ``header``'s round, or of none."""
        self.job, self.incarnation, self.epoch, self.update = header


class Record(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of what messages contain."""


# -- joining ---------------------------------------------------------------------------------------


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

    stale: how many messages of other rounds this rank has dropped so far.
    """

    peer: Token
    state: State = ""
    version: Count | None = None
    stale: Count = 0


class Alive(Message, tag="alive"):
    """Answer to a beat, or to a message of a peer that the hub does not know (any more)."""

    peer: Token
    hub: Token
    known: bool


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


# -- one update or check ---------------------------------------------------------------------------


class Job(Record):
    """A set of modules that one committed update wrote: its seed and plan say what to expect.

    without: modules that were written later; a tensor that is tied to one of them is no longer this update's.
    """

    version: Count
    plan: Token
    seed: Seed
    modules: list[Name] | None
    without: list[Name] = []


class Enter(Message, tag="enter"):
    """A trainer rank calls ``update`` or ``check``. All of them must say the same, ``facts`` apart.

    facts: id of this rank's facts. settings: everything else that a plan depends on.
    jobs: for a check, what was committed. refusal: why this rank can't take part. task: the request that
    this answers, if any.
    """

    peer: Token
    kind: Kind
    version: Count
    modules: list[Name] | None
    verify: bool
    facts: Token
    settings: Name
    min_replicas: Size
    join_s: Seconds
    ready_s: Seconds
    transfer_s: Seconds
    jobs: list[Job] = []
    refusal: Reason = ""
    task: Token = ""


class ServerId(Record, order=True):
    replica: Rank
    rank: Rank

    def __str__(self) -> str:
        return f"replica {self.replica} server rank {self.rank}"


class Member(Record):
    """One process of the group; its place in the list of members is its group rank.

    peer: on the wire, its ``member_id``. started: as Unix time.
    """

    peer: Token
    trainer: Rank | None
    server: ServerId | None
    host: Host = ""
    pid: Count = 0
    started: Annotated[float, Meta(ge=0, le=1e12)] = 0.0

    def __str__(self) -> str:
        roles = [f"trainer rank {self.trainer}"] if self.trainer is not None else []
        return " and ".join(roles + ([str(self.server)] if self.server else []))


def member_id(peer: str) -> str:
    """By which others know a member. What it says bears ``peer``, which nobody else is told."""
    return hashlib.blake2b(peer.encode(), digest_size=16).hexdigest()


def public(members: list[Member]) -> list[Member]:
    """Members as they are told of each other."""
    return [msgspec.structs.replace(member, peer=member_id(member.peer)) for member in members]


class Offer(Message, tag="offer"):
    """The start for every member. ``planned``: all members have the plan of this name.

    group: the epoch's token. members: empty where all were told in this epoch.
    """

    group: Token
    kind: Kind
    version: Count
    modules: list[Name] | None
    verify: bool
    plan: Token
    planned: bool
    settings: Name
    members: list[Member]
    ready_s: Seconds
    transfer_s: Seconds
    jobs: list[Job] = []


class Facts(Message, tag="facts"):
    """What a member holds as trainer rank, and then, in a second message, wants as server rank.

    memory: of a trainer rank, how others of its host can read what it holds; of a server rank, whether it
    can read all of that.
    """

    peer: Token
    blob: Blob
    memory: Blob = b""


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


class HeldSums(Record):
    holders: Count
    group: Count
    sums: dict[Name, Pair]


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


class Go(Message, tag="go"):
    """Every member is ready: run the plan, digest under ``seed``."""

    seed: Seed


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


class Done(Message, tag="done"):
    """A member has run its part. Of a trainer rank: ``sent``, and ``held`` of what others hold too; of a server
    rank: ``live``.

    partial: names that are not proved, and why (``cut``). wrong: what the rank itself finds
    wrong. nbytes: of the plan. starts, stages: seconds from the offer to the start of each stage on this
    rank, and of work in it. Of a check also: hidden, sums of this rank's parameters of which no wire tensor's
    digest tells all, to be compared between replicas; exempt, names that are declared not to be fed in full,
    and as what. version, verdict: of a load, what the rank holds now, and how far that is proved.
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
    starts: dict[Name, Seconds] = {}
    stages: dict[Name, Seconds] = {}
    version: Count | None = None
    verdict: Literal["verified", "partial", "unverified"] = "unverified"


class Detail(Message, tag="detail"):
    """Folds differ: send the sums of each tensor for these groups of these jobs, and for what these sets of
    trainer ranks hold for these groups."""

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


class Failure(Record):
    """One thing that went wrong: on which rank, with which tensor if it is one tensor's.

    kind: what it turned out to be. where: as text, and as the box of the global tensor that holds all
    that differs.
    """

    rank: Name
    tensor: Name | None
    reason: Reason
    kind: Damage = ""
    where: Reason = ""
    box: Span | None = None

    def __str__(self) -> str:
        where = ": ".join(filter(None, (self.kind, self.where)))
        text = "; ".join(filter(None, (self.reason, where)))
        return f"{self.tensor}: {text}; {self.rank}" if self.tensor else f"{self.rank}: {text}"


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


class Poll(Message, tag="poll"):
    """A trainer rank's ``poll``, counted by itself: all ranks get the same answer to the same number."""

    peer: Token
    number: Count


class Polled(Message, tag="polled"):
    number: Count
    task: Asked | None = None


# -- tasks: loads, saves and probes, outside updates ------------------------------------------------

Path = Annotated[str, Meta(max_length=4096)]
PayloadFormat = Literal["safetensors", "flattened_bucket", "shared"]


class Frame(Record):
    """A raw frame of a message: tensors for the rank at this place, of this module (None: of the only one)."""

    place: Rank
    module: Name | None
    nbytes: Count


# Tensors of one request: one payload for each rank and module.
MAX_PAYLOADS = 1 << 16
Frames = Annotated[list[Frame], Meta(max_length=MAX_PAYLOADS)]


class LoadTask(Record, tag="load", tag_field="kind"):
    """The server ranks of a replica take tensors from a directory that each can read, or from frames.

    replica: None is the only complete one. path: "" where frames carry the tensors. version: a label; None
    takes the directory's. roots: where files may lie; [] is anywhere. partial: tensors that are not given
    stay. atomic: everything is read into memory before the first write.
    """

    replica: Rank | None = None
    path: Path = ""
    modules: list[Name] | None = None
    version: Count | None = None
    format: PayloadFormat = "safetensors"
    roots: list[Path] = []
    partial: bool = False
    atomic: bool = False
    verify: bool = True


class SaveTask(Record, tag="save", tag_field="kind"):
    """All trainer ranks together write their tensors to a directory that each can reach."""

    path: Path
    modules: list[Name] | None
    version: Count | None
    file_bytes: Count


class ProbeTask(Record, tag="probe", tag_field="kind"):
    """The server ranks of a replica each answer a question about what they hold; nothing is written."""

    replica: Rank | None
    question: Name
    modules: list[Name] | None = None
    argument: Blob = b""


Task = LoadTask | SaveTask | ProbeTask


class AskTask(Message, tag="ask_task"):
    """Of a client, which never says hello. hub: the token that its status told; no other hub does the task.
    wait_s: until the task may start; run_s: for each of its steps."""

    id: Token
    hub: Token
    task: Task
    wait_s: Seconds
    run_s: Seconds
    frames: Frames = []
    payloads: Annotated[list[bytes], Meta(max_length=MAX_PAYLOADS)] = []


class TaskOffer(Message, tag="task_offer"):
    """The start of a task for every rank that takes part; their order gives each its place."""

    task: Task
    members: list[Member]
    run_s: Seconds
    frames: list[Frame] = []
    payloads: list[bytes] = []


class TaskEnd(Message, tag="task_end"):
    """To the client: how its task ended. answers: of a probe, in the order of the ranks."""

    id: Token
    ok: bool
    verdict: Word
    moved: bool = False
    failures: list[Failure] = []
    partial: Partial = {}
    version: Count | None = None
    seconds: Seconds = 0.0
    ranks: Count = 0
    answers: list[Blob] = []


class AskReplicas(Message, tag="ask_replicas"):
    id: Token


class ReplicaInfo(Record):
    """What the hub knows of a replica; ``version`` is None where it does not know, or there is none."""

    replica: Rank
    size: Size
    joined: Count
    state: Literal["empty", "ready", "torn"]
    version: Count | None


class Replicas(Message, tag="replicas"):
    id: Token
    replicas: list[ReplicaInfo]
    busy: bool


# -- rendezvous ------------------------------------------------------------------------------------


class StoreCall(Message):
    """Base: by a member, who counts its calls, so that a late answer is not taken for another's."""

    peer: Token
    call: Count


class StoreSet(StoreCall, tag="store_set"):
    key: Name
    value: Annotated[bytes, Meta(max_length=1 << 20)]


class StoreGet(StoreCall, tag="store_get"):
    key: Name


class StoreAdd(StoreCall, tag="store_add"):
    key: Name
    amount: Annotated[int, Meta(ge=-(1 << 62), lt=1 << 62)]


class StoreCheck(StoreCall, tag="store_check"):
    keys: list[Name]


class StoreDelete(StoreCall, tag="store_delete"):
    key: Name


class StoreCount(StoreCall, tag="store_count"):
    """How many keys there are."""


class StoreValue(Message, tag="store_value"):
    """Answer to each of them: a value, a number, or whether all keys are there."""

    call: Count
    value: bytes | None = None
    number: int = 0
