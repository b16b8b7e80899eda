"""A server rank waits for a version, in rounds meanwhile; the hub sees to one end for its whole replica."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from weightbus.control import messages as m
from weightbus.control.wire import FromHub
from weightbus.errors import TornError, UpdateError, WeightbusError
from weightbus.session.hearing import SLACK_S
from weightbus.session.results import reasons_of
from weightbus.session.session import Session

SLICE_S = 0.5


def wait_for(
    session: Session, version: int, timeout_s: float, take: Callable[[FromHub | None, float], m.Outcome | None]
) -> int:
    """The version that is committed here, ``version`` or a later one.

    take: acts upon whatever is heard, until a time; the outcome, if it was an update or check.
    Raises UpdateError, TornError or HubError, alike on all ranks of the replica.
    """
    number, told, context = session.draw_wait(), "", session.context
    deadline = time.monotonic() + timeout_s
    while True:
        end = context.aside.waited
        if end is not None and end.number == number:  # heard before a round's outcome
            _raise_unless(end.ok, end.moved, version, end.failures)
            return _held(session)
        left = deadline - time.monotonic()
        if session.link.peer != told and not session.link.lost:
            told = session.link.peer  # of this hub, which knows of no wait at another
            holds, of = session.standing.served(), session.standing.incarnation
            session.link.send(
                m.Await(peer=told, number=number, version=version, wait_s=max(0.0, left), holds=holds, of=of)
            )
        message = session.receive(min(SLICE_S, max(0.0, left + SLACK_S)))
        match message:
            case m.Waited():
                context.aside.take(message)
            case m.Offer() if message.kind in m.MOVES and message.version >= version:
                outcome = take(message, deadline)
                goes_on = outcome is None or (not outcome.ok and (outcome.again or message.kind == "catch_up"))
                if outcome is None or goes_on or context.aside.waited is not None:
                    continue
                _raise_unless(outcome.ok, outcome.moved, message.version, outcome.failures)
                return _held(session)
            case None if left < -SLACK_S:
                raise UpdateError(f"wait for version {version}: the hub has not said how it ends")
            case _:
                take(message, deadline)


def wait_for_check(
    session: Session, timeout_s: float, take: Callable[[FromHub | None, float], m.Outcome | None]
) -> m.Word:
    """The word of the next check that ends here. take: as of ``wait_for``.

    Raises TornError where this rank was found to hold other bytes, or it is not known which rank does;
    UpdateError where the check has failed, or none has ended in ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        message = session.receive(min(SLICE_S, left))
        outcome = take(message, deadline)
        if isinstance(message, m.Farewell):
            raise UpdateError("check: the trainer has left the hub")
        if not (isinstance(message, m.Offer) and message.kind == "check") or outcome is None:
            continue
        if outcome.put_off or outcome.again:
            continue
        if outcome.verdict == "failed":
            raise UpdateError("check:" + reasons_of(outcome.failures))
        if outcome.verdict == "mismatch" and session.context.place not in outcome.right:
            reasons = reasons_of(outcome.failures)
            raise TornError(f"check: this rank does not hold the bytes that were committed:{reasons}")
        return outcome.verdict
    raise UpdateError(f"check: expected one within {timeout_s:g} s, got none")


def _held(session: Session) -> int:
    """Raises the reason why what is in place can't be served, if it can't."""
    destination = session.context.destination
    if destination is not None and destination.state != "ready" and destination.error is not None:
        raise destination.error
    holds = session.standing.served()
    assert holds is not None, "it was committed"  # noqa: S101 - for mypy
    return holds


def _raise_unless(ok: bool, moved: bool, version: int, failures: Iterable[m.Failure]) -> None:
    if ok:
        return
    kind: type[WeightbusError] = TornError if moved else UpdateError
    held = "servers may hold a mixture" if moved else "nothing was written"
    raise kind(f"wait for version {version}: it was not committed, {held}:{reasons_of(failures)}")
