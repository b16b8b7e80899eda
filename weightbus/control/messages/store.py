"""The store of a process group's rendezvous, which the hub keeps."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from weightbus.control.messages.base import Count, Message, Name, Token


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
