"""Messages to the hub that come in pieces and are not whole yet: so many bytes of each, so many of all."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from weightbus.errors import ProtocolError

# One that stops coming is forgotten after so long.
STALLED_S = 30.0

# What a member may send in pieces while no round or task waits for it.
MAX_IDLE_BYTES = 2 << 20

# What is decoded into many objects, and not into one blob, is bounded more narrowly.
MAX_OBJECT_BYTES = 64 << 20


Key = TypeVar("Key", bound=Hashable)


class Unfinished(Generic[Key]):
    """The pieces that have come, by sender; one message of each. together: bytes of all senders."""

    def __init__(self, *, together: int) -> None:
        self._together = together
        self._parts: dict[Key, tuple[bytearray, float]] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, key: Key) -> bool:
        """Whether a message of this sender has begun."""
        return key in self._parts

    def add(self, key: Key, blob: bytes, *, last: bool, each: int, now: float) -> bytes | None:
        """Take a piece; the whole message with its last one. Raises ProtocolError, and forgets the message, if
        it is longer than ``each`` or there is no room."""
        whole, _ = self._parts.pop(key, (bytearray(), now))
        self.nbytes -= len(whole)
        for limit, have, of in (
            (each, len(whole), "one message"),
            (self._together, self.nbytes + len(whole), "all messages that are not whole"),
        ):
            if have + len(blob) > limit:
                raise ProtocolError(f"piece: expected at most {limit} bytes in {of} just now")
        whole += blob
        if last:
            return bytes(whole)
        self._parts[key] = whole, now
        self.nbytes += len(whole)
        return None

    def forget(self, key: Key) -> None:
        whole, _ = self._parts.pop(key, (b"", 0.0))
        self.nbytes -= len(whole)

    def expire(self, now: float) -> None:
        for key in [key for key, (_, came) in self._parts.items() if now - came > STALLED_S]:
            self.forget(key)


def check_objects(whole: bytes) -> None:
    """Before a message of pieces is decoded: only those that are blobs may be longest."""
    blobs = (b"\xa4type\xa5facts", b"\xa4type\xa8ask_task")
    if len(whole) > MAX_OBJECT_BYTES and not any(blob in whole[:32] for blob in blobs):
        raise ProtocolError(f"piece: expected at most {MAX_OBJECT_BYTES} bytes in a message that is no blob")
