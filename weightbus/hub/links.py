"""Which ranks are cut off, by what others and they themselves could not reach once a transfer had stalled."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from weightbus.control import messages as m

Links = Mapping[str, Collection[str]]  # each rank's peers at the other ends


def cut_off(members: Mapping[str, m.Member], apart: Links) -> dict[str, list[str]]:
    """Ranks at fault for the links that do not work, each with the other ends of these.

    Of a link between a trainer rank and a server rank it is the server rank, unless the trainer rank reaches
    none of several replicas; of one between two server ranks, the one with more such links.
    """
    links = {frozenset((one, other)) for one, others in apart.items() for other in others if one != other}
    trainers = {peer for peer, member in members.items() if member.trainer is not None}
    replica = {peer: member.server.replica for peer, member in members.items() if member.server}
    found: dict[str, list[str]] = {}

    def blame(peer: str) -> None:
        mine = {link for link in links if peer in link}
        found[peer] = [other for other in members if frozenset((peer, other)) in mine]
        links.difference_update(mine)

    for peer in [peer for peer in members if peer in trainers]:
        ends = {other for link in links if peer in link for other in link - {peer}}
        lost = {replica[other] for other in ends if other in replica}
        if ends & trainers or (lost == set(replica.values()) and len(lost) > 1):
            blame(peer)
    while links:
        servers = [peer for peer in members if peer not in trainers and any(peer in link for link in links)]
        if not servers:
            break  # processes that are both: each is its own trainer's
        blame(max(servers, key=lambda peer: sum(peer in link for link in links)))
    return found
