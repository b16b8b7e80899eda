"""Tasks: loads, saves and probes, outside updates."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from weightbus.control.messages.base import Blob, Count, Message, Name, Rank, Record, Seconds, Size, Token, Word
from weightbus.control.messages.diagnosis import Failure
from weightbus.control.messages.members import Member
from weightbus.control.messages.partial import Partial

# All tensors of one request together; each of them is bounded by MAX_MESSAGE_BYTES.
MAX_PAYLOAD_BYTES = 1 << 30

Path = Annotated[str, Meta(max_length=4096, pattern=r"\A[^\0]*\Z")]  # as it is, to be opened
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
