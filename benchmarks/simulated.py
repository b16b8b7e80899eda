"""Server ranks that are nothing but their messages: many in one process, without weights or torch.

Each has a connection of its own and answers like a rank that wants one tensor: so a hub can be timed with more
ranks than a machine has cores.
"""

from __future__ import annotations

import argparse
import os
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import zmq

from weightbus.control import messages as m
from weightbus.control import wire

PLAN = "simulated"


@dataclass(slots=True)
class Rank:
    """One simulated process: its connection, its place, and what it does with each message."""

    socket: zmq.Socket[Any]
    hello: m.Hello
    peer: str = ""
    outcomes: list[m.Outcome] = field(default_factory=list)
    is_member: bool = False
    header: m.Header = field(default_factory=m.Header)

    def send(self, message: m.Message) -> None:
        message.stamp(self.header)
        for frames in wire.encode_to_hub(message, self.peer):
            self.socket.send_multipart(frames)

    def hear(self, message: wire.FromHub) -> None:
        server = self.hello.role == "server"
        if isinstance(message, m.Offer):
            self.header = message.header
        match message:
            case m.Welcome():
                self.peer = message.peer
                self.send(m.Beat(peer=self.peer))
            case m.Alive():
                self.is_member = message.known
                if not self.header.update:
                    self.header = message.header
            case m.Offer() if message.kind != "update":
                self.send(m.Done(peer=self.peer, live=self._live(), sent=self._sent()))
            case m.Offer() if message.planned:
                self.send(m.Ready(peer=self.peer, plan=PLAN))
            case m.Offer() if not server:
                self.send(m.Facts(peer=self.peer, blob=b"source"))
            case m.Gathered(of="sources") if server:
                self.send(m.Facts(peer=self.peer, blob=b"want"))
            case m.Gathered(of="wants"):
                self.send(m.Ready(peer=self.peer, plan=PLAN))
            case m.Go():
                self.send(m.Done(peer=self.peer, live=self._live(), sent=self._sent()))
            case m.Outcome():
                self.outcomes.append(message)
                self.header = message.header._replace(update=0)

    def _live(self) -> list[m.Fold]:
        return [m.Fold(job=0, group=0, sums=(1, 2), nbytes=8, due=8)] if self.hello.role == "server" else []

    def _sent(self) -> list[m.Fold]:
        return [m.Fold(job=0, group=0, sums=(1, 2), nbytes=8, due=8)] if self.hello.role == "trainer" else []


class Crowd:
    """Simulated ranks, all served by whoever calls ``run``; each beats like a real one."""

    def __init__(self, address: str, job: str = "") -> None:
        self._address, self._job = address, job
        self._context: zmq.Context[Any] = zmq.Context(2)
        self._context.set(zmq.MAX_SOCKETS, 8192)
        self._poller = zmq.Poller()
        self.ranks: dict[Any, Rank] = {}
        self._next_beat = 0.0

    def join(self, role: m.Role, rank: int, size: int, replica: int = 0) -> Rank:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTING_ID, secrets.token_bytes(16))
        socket.connect(self._address)
        self._poller.register(socket, zmq.POLLIN)
        hello = m.Hello(
            process=secrets.token_hex(16),
            host="simulated",
            pid=os.getpid(),
            device="cpu",
            role=role,
            rank=rank,
            size=size,
            replica=replica,
        )
        joined = self.ranks[socket] = Rank(socket, hello, header=m.Header(self._job))
        joined.send(hello)
        return joined

    def run(self, until: Any, timeout_s: float) -> bool:
        """Answer messages until ``until()`` is true, or for ``timeout_s``; whether it came true."""
        deadline = time.monotonic() + timeout_s
        while not until():
            now = time.monotonic()
            if now > deadline:
                return False
            if now > self._next_beat:
                self._next_beat = now + 2.0
                for rank in self.ranks.values():
                    if rank.is_member:
                        rank.send(m.Beat(peer=rank.peer))
            for socket, _ in self._poller.poll(20):
                rank = self.ranks[socket]
                while True:
                    try:
                        frames = socket.recv_multipart(zmq.NOBLOCK)
                    except zmq.Again:
                        break
                    rank.hear(wire.decode_from_hub(frames))
        return True

    def close(self) -> None:
        for socket in self.ranks:
            socket.close()
        self._context.term()


def enter(trainer: Rank, version: int) -> m.Enter:
    return m.Enter(
        peer=trainer.peer,
        kind="update",
        version=version,
        modules=None,
        verify=True,
        facts="f",
        settings=m.Settings(bucket_bytes=1024),
        min_replicas=1,
        join_s=60.0,
        ready_s=60.0,
        transfer_s=60.0,
    )


def main() -> int:
    """Server ranks of one replica or several, until the address has no hub any more."""
    parser = argparse.ArgumentParser(description="simulated server ranks at a hub")
    parser.add_argument("--address", required=True)
    parser.add_argument("--ranks", type=range_of, required=True, metavar="FIRST:LAST", help="server ranks")
    parser.add_argument("--size", type=int, required=True, help="ranks in a replica")
    args = parser.parse_args()
    crowd = Crowd(args.address)
    for rank in args.ranks:
        crowd.join("server", rank % args.size, args.size, rank // args.size)
    parent = os.getppid()
    crowd.run(lambda: os.getppid() != parent, 3600.0)
    crowd.close()
    return 0


def range_of(text: str) -> range:
    first, last = map(int, text.split(":"))
    return range(first, last)


if __name__ == "__main__":
    raise SystemExit(main())
