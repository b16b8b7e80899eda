"""Who has joined a job: peers, their roles, complete replicas, and the start of the trainer that counts."""

from __future__ import annotations

from collections.abc import Container

import msgspec

from weightbus.control import messages as m
from weightbus.control.sketch import unlike
from weightbus.hub.members import LISTED, MAX_HELD_INCARNATION, Peer, Start, _process

# Of so many starts that have gone it is still known who was of them.
MAX_STARTS = 16


# More peers than this are refused, so that no flood of them can fill the hub's memory.
MAX_PEERS = 8192


class Roster:
    """All peers that are alive, as far as is known."""

    def __init__(self, *, dead_after_s: float) -> None:
        self.dead_after_s = dead_after_s
        self.peers: dict[str, Peer] = {}
        self._processes: dict[str, Peer] = {}
        self._trainers: dict[int, Peer] = {}
        self._replicas: dict[int, dict[int, Peer]] = {}
        self._complete: set[int] = set()
        self._starts: list[Start] = []  # by incarnation
        self._current: Start | None = None
        self._floor = 0

    # -- starts of the trainer ---------------------------------------------------------------------

    def review(self) -> None:
        """Trainer ranks have come or gone. The start that counts goes on as long as a rank of it is here; then
        the next one does."""
        here = self._here()
        current = self._current.incarnation if self._current else 0
        following = [start for start in self._starts if id(start) in here and start.incarnation >= current]
        self._current = following[0] if following else self._current
        kept = self._starts[-MAX_STARTS:]
        self._starts = [start for start in self._starts if id(start) in here or start in kept]

    def _here(self) -> set[int]:
        return {id(peer.start) for peer in self._trainers.values()}

    @property
    def incarnation(self) -> int:
        """Number of the start that counts; 0 before the first one."""
        return self._current.incarnation if self._current else 0

    def is_early(self, peer: Peer) -> bool:
        """Whether it is a trainer rank of a start that has to wait until an older one has gone."""
        return peer.trainer is not None and peer.start is not self._current

    def _start_of(self, hello: m.Hello) -> Start | None:
        """The start of which a trainer rank is; None if it is of a new one."""
        here = self._here()
        starts = reversed(self._starts)
        return next((start for start in starts if start.fits(hello, here=id(start) in here)), None)

    def _enlist(self, hello: m.Hello) -> Start:
        start = self._start_of(hello)
        if start is None:
            held = hello.held.incarnation if hello.held else 0
            last = self._starts[-1].incarnation if self._starts else 0
            drawn = max(last, self._floor) + 1
            known = last < held < MAX_HELD_INCARNATION
            start = Start(incarnation=held if known else drawn, token=hello.start)
            self._starts.append(start)
        start.token = start.token or hello.start
        start.places[hello.rank] = _process(hello)
        return start

    def _outlived(self, incarnation: int) -> None:
        """A server rank has known this incarnation: whatever is drawn from now on is above it."""
        if incarnation < MAX_HELD_INCARNATION:
            self._floor = max(self._floor, incarnation)

    # -- joining -----------------------------------------------------------------------------------

    def refusal(self, hello: m.Hello, now: float) -> m.Refused | None:
        """Why ``hello``'s role can't be had; None if it can, or if the same process has it already."""
        known = self.known(hello.process)
        server = hello.role == "server"
        others = self._replicas.get(hello.replica, {}) if server else self._trainers
        where = f"replica {hello.replica} server" if server else "trainer"
        if (there := others.get(hello.rank)) is not None:
            if there.process == hello.process:
                return None  # said again, as the welcome was late
            silent = now - there.heard
            reason = f"{where} rank {hello.rank} is taken by {there}, heard {silent:.1f} s ago"
            return m.Refused(reason=reason, silent_s=None if there is known else silent)
        for other in others.values():
            held = other.roles[hello.role]
            if held.size != hello.size:
                reason = f"{where} rank {hello.rank}: expected size {held.size} as {other}, got {hello.size}"
                return m.Refused(reason=reason)
            if held.device != hello.device:
                reason = f"expected {held.device} tensors as {other}, got {hello.device}"
                return m.Refused(reason=f"{where} rank {hello.rank}: {reason}")
            break  # those that are here are alike
        if hello.rank >= hello.size:
            reason = f"expected one below size {hello.size}, got {hello.rank}"
            return m.Refused(reason=f"{hello.role} rank: {reason}")
        if known is not None and hello.role in known.roles:
            return m.Refused(reason=f"this process is {known} already")
        if (fenced := self._fenced(hello)) is not None:
            return fenced
        if (other_model := self._other_model(hello, now)) is not None:
            return other_model
        if known is None and len(self.peers) >= MAX_PEERS:
            return m.Refused(reason=f"expected at most {MAX_PEERS} ranks", silent_s=0.0)
        return None

    def admit(self, hello: m.Hello, peer: str, now: float) -> m.Refused | Peer:
        """The peer with its new role, or why it can't have it."""
        if (refused := self.refusal(hello, now)) is not None:
            return refused
        known = self.known(hello.process)
        if known is None:
            known = self._as_peer(hello, peer)
            self.peers[peer] = self._processes[hello.process] = known
        if hello.role == "trainer":
            known.start = self._enlist(hello)
        elif hello.held is not None and hello.held.incarnation:
            self._outlived(hello.held.incarnation)
        known.roles[hello.role] = hello
        if hello.role == "trainer":
            self._trainers[hello.rank] = known
        else:
            ranks = self._replicas.setdefault(hello.replica, {})
            ranks[hello.rank] = known
            if len(ranks) == hello.size:
                self._complete.add(hello.replica)
        self.review()
        known.heard = now
        if hello.held is not None:
            known.held = hello.held
        return known

    def _other_model(self, hello: m.Hello, now: float) -> m.Refused | None:
        """Of a job without a name, whose ranks may have met by chance: trainer and servers of another model."""
        if hello.job or hello.model is None:
            return None
        mine = self._as_peer(hello, "")
        trainers = [peer for peer in self.trainers().values() if peer.trainer and peer.trainer.model]
        servers = [(p, p.server.model) for p in self.peers.values() if p.server and p.server.model]
        if hello.role == "trainer":
            trainers.append(mine)
        else:
            servers = [(mine, hello.model)]
        size = next((peer.trainer.size for peer in trainers if peer.trainer), 0)
        sketches = {
            p.trainer.model.fingerprint: p.trainer.model for p in trainers if p.trainer and p.trainer.model
        }
        seen: set[str] = set()
        for server, model in servers:
            if model.fingerprint in seen or any(server.process == one.process for one in trainers):
                continue  # compared already; or both ends are one process, which pairs them on purpose
            seen.add(model.fingerprint)
            if why := unlike(list(sketches.values()), model, complete=len(trainers) == size):
                ends = f"{trainers[0]} and {server}"
                others = trainers if hello.role == "server" else [server]
                return m.Refused(
                    silent_s=now - max(other.heard for other in others),
                    reason=f"{ends} are of different models, and their job has no name: {why}; name each job"
                    " (job=, WEIGHTBUS_JOB), or give each an address",
                )
        return None

    @staticmethod
    def _as_peer(hello: m.Hello, peer: str) -> Peer:
        return Peer(
            id=peer,
            process=hello.process,
            host=hello.host,
            pid=hello.pid,
            started=hello.started,
            heard=0.0,
            roles={hello.role: hello},
        )

    def _fenced(self, hello: m.Hello) -> m.Refused | None:
        """A trainer rank of an older start than the one that has taken over has no place any more."""
        if hello.role != "trainer" or self._current is None:
            return None
        start, held = self._start_of(hello), hello.held.incarnation if hello.held else 0
        number, current = start.incarnation if start else held, self._current.incarnation
        if not 0 < number < current:
            return None
        return m.Refused(
            reason=f"trainer rank {hello.rank} (pid {hello.pid} on {hello.host}) is of incarnation {number} of"
            f" its job, which incarnation {current} has followed"
        )

    def known(self, process: str) -> Peer | None:
        """The peer that this process is already."""
        return self._processes.get(process)

    def remove(self, peer: Peer) -> None:
        """It has left or died."""
        del self.peers[peer.id], self._processes[peer.process]
        for role in peer.roles:
            self._vacate(peer, role)

    def take_role(self, peer: Peer, role: str) -> m.Hello:
        """It gives up one of its roles."""
        self._vacate(peer, role)
        return peer.roles.pop(role)

    def _vacate(self, peer: Peer, role: str) -> None:
        hello = peer.roles[role]
        if role == "trainer":
            self._trainers.pop(hello.rank, None)
            return
        self._complete.discard(hello.replica)
        ranks = self._replicas.get(hello.replica, {})
        ranks.pop(hello.rank, None)
        if not ranks:
            self._replicas.pop(hello.replica, None)

    def silent(self, now: float) -> list[Peer]:
        return [peer for peer in self.peers.values() if now - peer.heard > self.dead_after_s]

    def trainers(self) -> dict[int, Peer]:
        """Those of the start that counts."""
        return {rank: peer for rank, peer in self._trainers.items() if peer.start is self._current}

    @property
    def has_trainers(self) -> bool:
        """Whether any start has a rank here."""
        return bool(self._trainers)

    def replicas(self) -> dict[int, dict[int, Peer]]:
        """Replica, server rank, peer."""
        return self._replicas

    def complete(self) -> list[int]:
        return sorted(self._complete)

    def can_start(self, entered: Container[str], min_replicas: int) -> bool:
        """Whether an update waits for nobody."""
        trainers = self.trainers()
        size = next((p.trainer.size for p in trainers.values() if p.trainer), 1)
        return (
            len(trainers) == size
            and len(self._complete) >= min_replicas
            and all(peer.id in entered for peer in trainers.values())
        )

    def missing(self, entered: Container[str], min_replicas: int) -> list[tuple[str, str]]:
        """What an update waits for: who, and what; empty if it can start. Bounded, whatever sizes were said."""
        lines = []
        trainers = self.trainers()
        size = next((p.trainer.size for p in trainers.values() if p.trainer), 1)
        if len(trainers) < size:
            absent = first_absent(size, trainers)
            lines += [(f"trainer rank {rank}", "has not joined") for rank in absent]
            if (more := size - len(trainers) - len(absent)) > 0:
                lines.append(("trainer ranks", f"{more} more of {size} have not joined"))
        waiting = [rank for rank, peer in sorted(trainers.items()) if peer.id not in entered]
        lines += [(f"trainer rank {rank}", "has not called") for rank in waiting]
        if len(self._complete) < min_replicas:
            text = f"expected {min_replicas} complete, got {len(self._complete)}"
            partly = sorted(self._replicas.keys() - self._complete)
            for replica in partly[:LISTED]:
                ranks = self._replicas[replica]
                size = next(p.server.size for p in ranks.values() if p.server)
                text += f"; replica {replica} misses server ranks {absent_of(size, ranks)} of {size}"
            if len(partly) > LISTED:
                text += f"; {len(partly) - LISTED} more replicas miss some"
            lines.append(("replicas", text))
        return lines

    def group(self, entered: Container[str], without: Container[int] = ()) -> list[Peer]:
        """Members of an update in the order of group ranks: trainers, then complete replicas but some."""
        trainers = [peer for _, peer in sorted(self.trainers().items()) if peer.id in entered]
        replicas = self.replicas()
        taken = [replica for replica in self.complete() if replica not in without]
        servers = [peer for replica in taken for _, peer in sorted(replicas[replica].items())]
        return list({peer.id: peer for peer in trainers + servers}.values())

    def members(self, peers: list[Peer], without: Container[int] = ()) -> list[m.Member]:
        """The group as members; a server rank of a replica that does not, or not wholly, takes part is one as
        trainer only."""
        complete = [replica for replica in self.complete() if replica not in without]
        trainers = {peer.id for peer in self.trainers().values()}
        members = [peer.member() for peer in peers]
        return [
            msgspec.structs.replace(
                x,
                trainer=x.trainer if x.peer in trainers else None,
                server=x.server if x.server and x.server.replica in complete else None,
            )
            for x in members
        ]


def first_absent(size: int, here: Container[int]) -> list[int]:
    """The first few of ``size`` ranks that are not here: never more work than there are ranks here."""
    absent: list[int] = []
    for rank in range(size):
        if len(absent) == LISTED:
            break
        if rank not in here:
            absent.append(rank)
    return absent


def absent_of(size: int, here: dict[int, Peer]) -> str:
    absent = first_absent(size, here)
    more = size - len(here) - len(absent)
    return f"{absent}" + (f" and {more} more" if more > 0 else "")
