"""What the hub says of itself and of its ranks: the answer to ``AskStatus``."""

from __future__ import annotations

from collections.abc import Mapping

import weightbus
from weightbus.control import client_messages as a
from weightbus.hub.coordinator import Coordinator


def status_of(
    coordinator: Coordinator,
    ask: a.AskStatus,
    hub: str,
    up_s: float,
    counts: Mapping[str, int],
    jobs: list[str],
    now: float,
) -> a.Status:
    """State of the hub now. States and versions of ranks are as of their last beats."""
    roster = coordinator.roster
    round = coordinator.round
    peers = sorted(
        roster.peers.values(),
        key=lambda peer: (
            peer.trainer is None,
            peer.trainer.rank if peer.trainer else 0,
            (peer.server.replica, peer.server.rank) if peer.server else (0, 0),
        ),
    )
    return a.Status(
        id=ask.id,
        hub=hub,
        weightbus=weightbus.__version__,
        up_s=up_s,
        job=coordinator.job,
        incarnation=coordinator.incarnation,
        epoch=coordinator.epoch,
        version=coordinator.committed if coordinator.committed >= 0 else None,
        paused_s=max(0.0, coordinator.paused_until - now),
        peers=[
            a.PeerStatus(
                rank=str(peer.member()),
                replica=peer.server.replica if peer.server else None,
                host=peer.host,
                pid=peer.pid,
                device=next(iter(peer.roles.values())).device,
                state=peer.state if peer.server else "",
                version=peer.version,
                heard_s=max(0.0, now - peer.heard),
            )
            for peer in peers
        ],
        incomplete=sorted(roster.replicas().keys() - set(roster.complete())),
        phase=f"{round.enter.kind} {round.enter.version}: {round.phase.name}" if round else "",
        missing=[f"{who}: {what}"[:1000] for who, what in coordinator.missing(now)[:64]],
        requests=len(coordinator.requests),
        counts=dict(counts),
        jobs=jobs,
        past=coordinator.past(min(ask.past, 16)),
    )
