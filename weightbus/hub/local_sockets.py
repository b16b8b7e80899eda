"""The hub's ends of Unix sockets to ranks of its own host (``control.local_socket``).

Each belongs to one ZeroMQ connection of a member, which has asked for it, and what comes by it counts as said
there: who it is of, what its key allows, where answers go.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from weightbus.control.local_socket import LocalSocket, connect
from weightbus.errors import ProtocolError


@dataclass(slots=True, kw_only=True)
class _Member:
    """identity: of the ZeroMQ connection. user: the public key that it came with; empty without keys."""

    identity: bytes
    user: str
    socket: LocalSocket


class LocalSockets:
    """All of them. max_frames, max_bytes: of a message to the hub. max_unsent, max_unsent_bytes: messages, and
    bytes, that a member may leave unread before it is sent no more."""

    def __init__(self, *, max_frames: int, max_bytes: int, max_unsent: int, max_unsent_bytes: int) -> None:
        self._limits = {"max_frames": max_frames, "max_bytes": max_bytes}
        self._max_unsent, self._max_unsent_bytes = max_unsent, max_unsent_bytes
        self._by_identity: dict[bytes, _Member] = {}
        self._by_number: dict[int, _Member] = {}
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._events: list[tuple[int, int]] = []
        self._unread: dict[bytes, deque[list[bytes]]] = {}  # what a look has brought; first whose turn it is

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._by_identity

    def __len__(self) -> int:
        return len(self._by_identity)

    def fileno(self) -> int:
        """Readable once ``is_ready``; -1 where there can be none."""
        return self._epoll.fileno() if self._epoll else -1

    def open(self, identity: bytes, name: str, user: str) -> None:
        """Connect to a member's end, if it can be reached."""
        self.close_of(identity)
        reached = connect(name, **self._limits) if self._epoll else None
        if reached is None or self._epoll is None:
            return
        try:
            self._epoll.register(reached.fileno(), select.EPOLLIN)
        except OSError:
            reached.close()
            return
        member = _Member(identity=identity, user=user, socket=reached)
        self._by_identity[identity] = self._by_number[reached.fileno()] = member

    def is_ready(self) -> bool:
        """Whether ``receive`` has something to do."""
        if self._by_number and self._epoll:
            self._events = self._epoll.poll(0)
        return bool(self._events or self._unread)

    def receive(self, most: int) -> Iterator[tuple[bytes, str, list[bytes]]]:
        """Messages that have come: the connection's identity, its key, the frames. One of each connection in
        turn, so that who sends much does not keep the others waiting, and ``most`` of all of them."""
        self._read()
        for _ in range(min(most, sum(map(len, self._unread.values())))):
            if not self._unread:
                return  # closed for what was said before
            identity = next(iter(self._unread))
            messages = self._unread.pop(identity)
            frames = messages.popleft()
            if messages:
                self._unread[identity] = messages
            yield identity, self._by_identity[identity].user, frames

    def _read(self) -> None:
        """One look at each that has something to read, or room for what is unsent."""
        events, self._events = self._events, []
        for number, event in events:
            member = self._by_number[number]
            if event & ~select.EPOLLOUT and member.identity not in self._unread:
                try:
                    messages = member.socket.receive()
                except (OSError, ProtocolError):
                    self.close_of(member.identity)  # unless its process has gone, it goes on by ZeroMQ
                    continue
                if messages:
                    self._unread[member.identity] = deque(messages)
            if event & select.EPOLLOUT:
                try:
                    done = member.socket.flush()
                except OSError:
                    done = True  # nobody reads it, but what the other end has said before may still be here
                if done:
                    self._watch(member, select.EPOLLIN)

    def send(self, identity: bytes, frames: Sequence[Any]) -> bool | None:
        """False if the member has too much unread; None if the other end has gone. What that has said before is
        still to be received."""
        member = self._by_identity[identity]
        local = member.socket
        if local.unsent >= self._max_unsent or local.unsent_bytes > self._max_unsent_bytes:
            return False
        try:
            local.send(frames)
        except OSError:
            return None
        if local.unsent:
            self._watch(member, select.EPOLLIN | select.EPOLLOUT)
        return True

    def _watch(self, member: _Member, events: int) -> None:
        if self._epoll:
            self._epoll.modify(member.socket.fileno(), events)

    def keep(self, identities: Collection[bytes]) -> None:
        """Close those of other connections: of members that have gone, or go by another one now."""
        for identity in self._by_identity.keys() - set(identities):
            self.close_of(identity)

    def close_of(self, identity: bytes) -> None:
        if (member := self._by_identity.pop(identity, None)) is None:
            return
        self._unread.pop(identity, None)
        number = member.socket.fileno()
        del self._by_number[number]
        if self._epoll:
            self._epoll.unregister(number)
        member.socket.close()

    def close(self) -> None:
        self.keep(())
        if self._epoll:
            self._epoll.close()
