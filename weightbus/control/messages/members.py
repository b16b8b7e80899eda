"""Who takes part in a round or a task, as members are told of each other."""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec
from msgspec import Meta

from weightbus.control.messages.base import Count, Host, Rank, Record, Token


class ServerId(Record, order=True):
    replica: Rank
    rank: Rank

    def __str__(self) -> str:
        return f"replica {self.replica} server rank {self.rank}"


class Member(Record):
    """One process of the group; its place in the list of members is its group rank.

    peer: on the wire, its ``member_id``. started: as Unix time. donor: of a catch-up, the server rank that is
    the source, in the place of the trainer rank that ``trainer`` says.
    """

    peer: Token
    trainer: Rank | None
    server: ServerId | None
    donor: ServerId | None = None
    host: Host = ""
    pid: Count = 0
    started: Annotated[float, Meta(ge=0, le=1e12)] = 0.0

    def __str__(self) -> str:
        if self.donor is not None:
            return f"{self.donor} as a donor"
        roles = [f"trainer rank {self.trainer}"] if self.trainer is not None else []
        return " and ".join(roles + ([str(self.server)] if self.server else []))


def member_id(peer: str) -> str:
    """By which others know a member. What it says bears ``peer``, which nobody else is told."""
    return hashlib.blake2b(peer.encode(), digest_size=16).hexdigest()


def public(members: list[Member]) -> list[Member]:
    """Members as they are told of each other."""
    return [msgspec.structs.replace(member, peer=member_id(member.peer)) for member in members]
