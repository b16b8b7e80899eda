"""Who does not answer in a round, and whom the others name for it."""

from __future__ import annotations

import math

from weightbus.control import messages as m
from weightbus.hub.links import cut_off
from weightbus.hub.members import LISTED
from weightbus.hub.roster import Roster
from weightbus.hub.round import Phase, Round

Missing = list[tuple[str, str]]


def unanswered(round: Round) -> Missing:
    """Members that have not answered in this phase: each, and what it has not done."""
    waiting = [peer for peer in round.members if peer in round.expected - round.answers.keys()]
    return [(str(round.members[peer]), f"no answer in phase {round.phase.name}") for peer in waiting]


def name_silent(round: Round, missing: Missing, now: float) -> None:
    """Note who has not answered; of these, where it is known, those for whom the others wait."""
    waited = f"waited {now - round.started:.1f} s"
    silent = round.expected - round.answers.keys()
    if round.phase is Phase.RUN:
        still = round.blame.still([peer for peer in round.members if peer in silent], now)
        if round.blame.open and round.blame.all_look(silent, now):
            return  # they wait for who has said that its transfer has failed
        busy = {peer: f", busy elsewhere for {s:.1f} s" if s else "" for peer, s in still.items()}
        missing = [(str(round.members[p]), f"no answer in phase RUN{text}") for p, text in busy.items()]
        silent = set(still)
    if round.phase is not Phase.ENTER:
        round.blame.own(silent, f"no answer in phase {round.phase.name}")
    named = [m.Failure(rank=rank, tensor=None, reason=f"{reason}; {waited}") for rank, reason in missing]
    round.failures = named + round.failures


def name_links(round: Round) -> None:
    """Note who is cut off, where ranks could not reach each other and nobody has failed by itself."""
    if not (round.blame.open and round.blame.apart):
        return
    reasons = {}
    for peer, ends in cut_off(round.members, round.blame.apart).items():
        others = ", ".join(str(round.members[end]) for end in ends[:LISTED])
        more = f" and {len(ends) - LISTED} more" if len(ends) > LISTED else ""
        reasons[peer] = f"no data connection with {others}{more}; expected their hosts to let it through"
    round.blame.peers = reasons
    named = [m.Failure(rank=str(round.members[peer]), tensor=None, reason=why) for peer, why in reasons.items()]
    round.failures = named + round.failures


def absent(round: Round, roster: Roster) -> list[str]:
    """Ranks that are not there, of replicas that wait for them: their beats since then say that they have not
    taken up the update."""
    return [
        id
        for id, member in round.members.items()
        if member.server is not None
        and id not in round.answers
        and (peer := roster.peers.get(id)) is not None
        and peer.state != "updating"
        and peer.heard > round.hurried.get(member.server.replica, math.inf)
    ]
