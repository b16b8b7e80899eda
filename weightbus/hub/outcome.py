"""How a round has ended, as all its members are told."""

from __future__ import annotations

from collections.abc import Collection

from weightbus.control import messages as m
from weightbus.hub.round import MAX_FAILURES, MOVED, Round


def has_moved(round: Round) -> bool:
    """Whether bytes may have been written."""
    return round.enter.kind in m.MOVES and round.phase in MOVED


def outcome_of(
    round: Round, verdict: m.Word, now: float, *, blamed: Collection[int], put_off: bool, tasks: list[m.Asked]
) -> m.Outcome:
    """The one outcome of a round.

    blamed: replicas by whose fault it fails. put_off: as the ranks of one replica were not there together.
    tasks: what trainer ranks run next.
    """
    enter, members, dones = round.enter, round.members.values(), round.dones
    ok = verdict not in ("failed", "mismatch")
    servers = [member.server for member in members if member.server]
    replicas = {server.replica for server in servers}
    # The next update does without the replicas that are to blame, if there are enough of others.
    does_without = bool(blamed) and len(replicas.difference(blamed)) >= enter.min_replicas
    # A transfer that has broken in time by nobody's fault may go well the next time.
    broke = round.blame.open and round.blame.since < round.run_by
    again = (put_off and enter.kind == "update") or (not ok and enter.repeats and (does_without or broke))
    stages = [done.stages for peer, done in dones.items() if round.members[peer].server]
    return m.Outcome(
        ok=ok,
        moved=has_moved(round),
        verdict=verdict,
        failures=round.failures[:MAX_FAILURES],
        partial=m.cut({name: why for done in dones.values() for name, why in sorted(done.partial.items())}),
        exempt={name: why for done in dones.values() for name, why in sorted(done.exempt.items())},
        seconds=now - round.started,
        digest_s=max((laps.get("verify", 0.0) for laps in stages), default=0.0),
        trainers=sum(member.trainer is not None for member in members),
        replicas=sorted(replicas),
        servers=len(servers),
        tasks=tasks,
        left_out=round.left_out,
        again=again,
        put_off=put_off,
        version=enter.version,
        right=round.right if verdict == "mismatch" else [],
    )
