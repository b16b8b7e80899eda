"""One update or check on one rank: from its call, or the hub's offer, to the one outcome."""

from __future__ import annotations

import contextlib
import logging
import math
import time

from weightbus.control import messages as m
from weightbus.control.link import HubLost
from weightbus.control.wire import FromHub
from weightbus.errors import HubError
from weightbus.hub.server import HUB_SPIN_S, SPIN_S
from weightbus.session.giving_up import explain, failed, give_up
from weightbus.session.hearing import Ended
from weightbus.session.participant import Participant
from weightbus.session.standing import Standing
from weightbus.session.task_participant import take_part

log = logging.getLogger("weightbus")

# A rank that has run an update and lost the hub waits so long to hear, from a new one, how it ended.
UNHEARD_S = 20.0


class Round:
    """Hears the hub's messages, and has ``participant`` answer each.

    start: this trainer rank's call, or the offer that a server rank has heard.
    """

    def __init__(self, participant: Participant, standing: Standing, start: m.Enter | m.Offer) -> None:
        self._participant, self._standing, self._start = participant, standing, start
        self._context = participant.context
        self._link = participant.context.link

    def run(self, wait_s: float, *, again: bool = False, until: float = math.inf) -> m.Outcome | None:
        """The outcome; None if the hub was lost before it had offered anything, and ``again`` is wished for.

        wait_s: for the offer. until: when this rank would rather go on with something else, if no byte moves
        yet. Whatever happens, the participant is told of one outcome: the only one that all are told, or, where
        the hub is not heard, that it has failed.
        """
        participant, link = self._participant, self._link
        outcome: m.Outcome | None = None
        with contextlib.ExitStack() as stack:
            stack.callback(participant.close)
            try:
                outcome = self._follow(stack, wait_s, until)
            except Ended as ended:
                outcome = ended.outcome
            except HubLost as lost:
                if again and participant.offer is None:
                    return None  # the same call is said again
                if isinstance(self._start, m.Enter) and participant.offer is None:
                    link.forsake(str(lost))  # what still comes of this call is not for the next one
                log.warning("%s", lost)
                outcome = failed(link.rounds, "hub", str(lost), moved=participant.moved)
                outcome = self._orphaned() or outcome
            except BaseException as error:
                reason = explain(error)
                outcome = failed(link.rounds, participant.rank, reason, moved=participant.moved)
                outcome = self._give_up(reason) or outcome
                raise
            finally:
                self._standing.taken_up = False
                self._context.aside.give_back()
                if outcome is not None:
                    self._end(outcome)
        return outcome

    def _follow(self, stack: contextlib.ExitStack, wait_s: float, until: float) -> m.Outcome:
        participant, link, start = self._participant, self._link, self._start
        if isinstance(start, m.Offer):
            stack.enter_context(link.rounds.within(start))
            if (missed := self._missed(start)) is not None:
                return missed
            self._standing.taken_up = start.kind == "update"
            participant.offered(start)
            until = max(until, time.monotonic() + start.meet_s)
        else:
            link.send(start)
            participant.look_ahead()
        while True:
            limit_s = participant.limit_s if participant.offer else wait_s
            # The end comes as soon as all are done, and a rank that sleeps hears it late.
            spin_s = HUB_SPIN_S if participant.moved and participant.copied is None else SPIN_S
            asked_s = math.inf if participant.moved else until - time.monotonic()
            message = link.receive(min(limit_s, max(0.0, asked_s)), spin_s=spin_s)
            match message:
                case None if asked_s < limit_s:
                    until = math.inf
                    link.send(m.Later(peer=link.peer))
                case None:
                    raise HubLost(f"no word from {link.address} for {limit_s:.0f} s in an update")
                case m.Offer() if isinstance(start, m.Enter) and not _is_of(message, start):
                    link.decline(message, "this trainer rank has given up the call that it is of")
                case m.Offer():
                    if participant.offer is None:
                        stack.enter_context(link.rounds.within(message))
                    participant.offered(message)
                case m.Gathered():
                    participant.gathered(message)
                case m.Go():
                    participant.go(message)
                case m.Detail():
                    participant.detail(message)
                case m.Suspects():
                    participant.suspects(message)
                case m.Probe():
                    participant.probe(message)
                case m.Outcome() if participant.offer is None and not _ends(message, start):
                    link.rounds.outcome = None
                    log.info("late: the end of an earlier call, of version %s", message.version)
                case m.Outcome():
                    return message
                case m.TaskOffer() if participant.offer is None:
                    take_part(self._context, message)
                case _ if not self._context.aside.take(message):
                    log.info("late: %s", type(message).__name__)  # as the answer to a poll that was given up

    def _missed(self, offer: m.Offer) -> m.Outcome | None:
        """How a round has ended that was over before this rank looked: its engine is told of nothing."""
        behind: list[FromHub] = []
        while (message := self._link.receive(0)) is not None:
            if isinstance(message, m.Outcome):
                self._context.enter_epoch(offer)
                behind = [one for one in behind if isinstance(one, m.Farewell | m.Waited)]
                break
            behind.append(message)
        for one in reversed(behind):
            self._link.push_back(one)
        return message

    # -- ends --------------------------------------------------------------------------------------

    def _end(self, outcome: m.Outcome) -> None:
        """Of every exit: the one place where the participant is told."""
        participant, offer = self._participant, self._participant.offer
        if outcome.ok and offer is not None and offer.kind != "check":
            self._standing.committed(offer.version, participant.seed, outcome)
        participant.ended(outcome)

    def _give_up(self, reason: str) -> m.Outcome | None:
        heard = False
        try:
            outcome = give_up(self._link, self._context.aside, reason)
            heard = outcome is not None
        finally:
            if self._participant.offer is None and not heard:
                self._link.forsake(f"this rank has given up a call: {reason}")
        return outcome

    def _orphaned(self) -> m.Outcome | None:
        """The outcome of an update in which the hub was lost; None if it has failed.

        It may have been committed: where this rank has done its part, a new hub is asked, which learns it
        from any rank that has heard. Otherwise it has failed, and what was written is a mixture.
        """
        participant, offer = self._participant, self._participant.offer
        if not participant.finished or participant.seed is None or offer is None or offer.kind != "update":
            return None  # a catch-up's seed is another update's, of which a commit proves nothing here
        self._standing.unheard, self._link.rounds.orphaned = participant.seed, True
        try:
            return self._await_outcome(time.monotonic() + UNHEARD_S)
        except HubError as error:
            log.warning("%s", error)
            return None
        finally:
            self._standing.unheard, self._link.rounds.orphaned = None, False

    def _await_outcome(self, deadline: float) -> m.Outcome | None:
        while (left := deadline - time.monotonic()) > 0:
            try:
                if not self._link.rejoin(min(left, 1.0)):
                    continue
                message = self._link.receive(min(left, 0.5))
            except HubLost:
                continue
            if isinstance(message, m.Outcome):
                return message
            if message is not None:
                # The others have gone on to another update.
                self._link.rounds.opener = None
                self._link.push_back(message)
                return None
        return None


def _is_of(offer: m.Offer, enter: m.Enter) -> bool:
    """Whether a call is answered by this offer; an earlier one may have been given up before it was. Where the
    hub gives the number only joining again tells that."""
    same = enter.follows or offer.version == enter.version
    return same and (offer.kind, offer.modules) == (enter.kind, enter.modules)


def _ends(outcome: m.Outcome, start: m.Enter | m.Offer) -> bool:
    """Whether a call ends by this outcome, before it was offered anything."""
    follows = isinstance(start, m.Enter) and start.follows
    return not outcome.ok and (follows or outcome.version in (None, start.version))
