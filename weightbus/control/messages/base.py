"""What all messages of the control channel share: types with bounds, the header, the base of each."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

# A peer that is silent for longer counts as dead.
DEAD_AFTER_S = 10.0

# Facts of a large model are the longest message: 100,000 tensors of 16 shards take about 200 MB.
MAX_MESSAGE_BYTES = 256 << 20

# A message to the hub that is longer than this travels in pieces, which only members may send: no
# stranger can make the hub hold more than a frame of this size and a little.
PIECE_BYTES = 256 << 10
MAX_FRAME_BYTES = PIECE_BYTES + 1024

Residue = Annotated[int, Meta(ge=0, lt=1 << 61)]
MAX_COUNT = (1 << 62) - 1
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Rank = Annotated[int, Meta(ge=0, lt=1 << 20)]
Size = Annotated[int, Meta(ge=1, le=1 << 20)]
Name = Annotated[str, Meta(max_length=1024)]
Host = Annotated[str, Meta(pattern=r"\A[\w.-]{0,255}\Z")]
Token = Annotated[str, Meta(max_length=64)]
Reason = Annotated[str, Meta(max_length=64 << 10)]
Seconds = Annotated[float, Meta(ge=0, le=1e6)]
Seed = Annotated[bytes, Meta(min_length=32, max_length=32)]
Blob = Annotated[bytes, Meta(max_length=MAX_MESSAGE_BYTES)]
Pair = tuple[Residue, Residue]
Axes = Annotated[list[Count], Meta(max_length=64)]
Laps = Annotated[dict[Name, Seconds], Meta(max_length=64)]
Word = Literal["verified", "partial", "unverified", "mismatch", "failed"]
Role = Literal["trainer", "server"]
State = Literal["", "empty", "ready", "updating", "torn"]

# Of a job; empty for one that nobody has named. It is shown to people, so nothing else is in it.
JOB_PATTERN = r"\A[A-Za-z0-9._/:@+-]{0,64}\Z"
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
