"""Who has joined the hub: peers, their roles, and which replicas are complete."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from weightbus import messages as m


@dataclass(slots=True, kw_only=True)
class Peer:
    """One process. It may be a trainer rank, a server rank, or both."""

    id: str
    process: str
    host: str
    pid: int
    heard: float
    roles: dict[str, m.Hello] = field(default_factory=dict)
    held: m.Held | None = None
    state: m.State = ""
    version: int | None = None
    stale: int = 0

    @property
    def trainer(self) -> m.Hello | None:
        return self.roles.get("trainer")

    @property
    def server(self) -> m.Hello | None:
        return self.roles.get("server")

    def member(self) -> m.Member:
        server = self.server
        return m.Member(
            peer=self.id,
            trainer=self.trainer.rank if self.trainer else None,
            server=m.ServerId(replica=server.replica, rank=server.rank) if server else None,
        )

    def __str__(self) -> str:
        return f"{self.member()} (pid {self.pid} on {self.host})"


# More peers than this are refused, so that no flood of them can fill the hub's memory.
MAX_PEERS = 8192


class Roster:
    """All peers that are alive, as far as is known."""

    def __init__(self, *, dead_after_s: float) -> None:
        self.dead_after_s = dead_after_s
        self.peers: dict[str, Peer] = {}

    def refusal(self, hello: m.Hello, now: float) -> m.Refused | None:
        """Why ``hello``'s role can't be had; None if it can, or if the same process has it already."""
        known = self._known(hello.process)
        for other in self.peers.values():
            held = other.roles.get(hello.role)
            if held is None or (hello.role == "server" and held.replica != hello.replica):
                continue
            where = f"replica {hello.replica} server" if hello.role == "server" else "trainer"
            if held.rank == hello.rank and held.process == hello.process:
                # Said again, as the welcome was late.
                return None
            if held.rank == hello.rank:
                silent = now - other.heard
                reason = f"{where} rank {hello.rank} is taken by {other}, heard {silent:.1f} s ago"
                return m.Refused(reason=reason, silent_s=None if other is known else silent)
            if held.size != hello.size:
                reason = f"{where} rank {hello.rank}: expected size {held.size} as {other}, got {hello.size}"
                return m.Refused(reason=reason)
            if held.device != hello.device:
                reason = f"expected {held.device} tensors as {other}, got {hello.device}"
                return m.Refused(reason=f"{where} rank {hello.rank}: {reason}")
        if hello.rank >= hello.size:
            reason = f"expected one below size {hello.size}, got {hello.rank}"
            return m.Refused(reason=f"{hello.role} rank: {reason}")
        if known is not None and hello.role in known.roles:
            return m.Refused(reason=f"this process is {known} already")
        if known is None and len(self.peers) >= MAX_PEERS:
            return m.Refused(reason=f"expected at most {MAX_PEERS} ranks", silent_s=0.0)
        return None

    def admit(self, hello: m.Hello, peer: str, now: float) -> m.Refused | Peer:
        """The peer with its new role, or why it can't have it."""
        if (refused := self.refusal(hello, now)) is not None:
            return refused
        known = self._known(hello.process)
        if known is None:
            known = Peer(id=peer, process=hello.process, host=hello.host, pid=hello.pid, heard=now)
            self.peers[peer] = known
        known.roles[hello.role] = hello
        known.heard = now
        if hello.held is not None:
            known.held = hello.held
        return known

    def _known(self, process: str) -> Peer | None:
        return next((peer for peer in self.peers.values() if peer.process == process), None)

    def silent(self, now: float) -> list[Peer]:
        return [peer for peer in self.peers.values() if now - peer.heard > self.dead_after_s]

    def trainers(self) -> dict[int, Peer]:
        return {peer.trainer.rank: peer for peer in self.peers.values() if peer.trainer}

    def replicas(self) -> dict[int, dict[int, Peer]]:
        """Replica, server rank, peer."""
        found: dict[int, dict[int, Peer]] = {}
        for peer in self.peers.values():
            if peer.server:
                found.setdefault(peer.server.replica, {})[peer.server.rank] = peer
        return found

    def complete(self) -> list[int]:
        return [
            replica
            for replica, ranks in sorted(self.replicas().items())
            if len(ranks) == next(p.server.size for p in ranks.values() if p.server)
        ]

    def missing(self, entered: Container[str], min_replicas: int) -> list[str]:
        """What an update still waits for, a line each; empty if it can start."""
        lines = []
        trainers = self.trainers()
        size = next((p.trainer.size for p in trainers.values() if p.trainer), 1)
        for rank in range(size):
            if rank not in trainers:
                lines.append(f"trainer rank {rank}: has not joined")
            elif trainers[rank].id not in entered:
                lines.append(f"trainer rank {rank}: has not called")
        complete = self.complete()
        if len(complete) < min_replicas:
            text = f"expected {min_replicas} complete, got {len(complete)}"
            for replica, ranks in sorted(self.replicas().items()):
                size = next(p.server.size for p in ranks.values() if p.server)
                if gone := sorted(set(range(size)) - ranks.keys()):
                    text += f"; replica {replica} misses server ranks {gone} of {size}"
            lines.append(f"replicas: {text}")
        return lines

    def group(self, entered: Container[str]) -> list[Peer]:
        """Members of an update in the order of group ranks: trainers, then complete replicas."""
        trainers = [peer for _, peer in sorted(self.trainers().items()) if peer.id in entered]
        replicas = self.replicas()
        servers = [peer for r in self.complete() for _, peer in sorted(replicas[r].items())]
        return list({peer.id: peer for peer in trainers + servers}.values())

    def members(self, peers: list[Peer]) -> list[m.Member]:
        """The group as members; a server rank of an incomplete replica takes part as trainer only."""
        complete = self.complete()
        members = [peer.member() for peer in peers]
        return [
            m.Member(peer=x.peer, trainer=x.trainer, server=x.server)
            if x.server is None or x.server.replica in complete
            else m.Member(peer=x.peer, trainer=x.trainer, server=None)
            for x in members
        ]
