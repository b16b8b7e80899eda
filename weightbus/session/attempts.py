"""One update to its end, repeated without the replicas by whose fault it has failed."""

from __future__ import annotations

import logging
from collections.abc import Callable

from weightbus.control import messages as m
from weightbus.errors import TornError, UpdateError
from weightbus.report import both_ends
from weightbus.session.origin import SourceCopy
from weightbus.session.progress import Progress
from weightbus.session.results import reasons_of
from weightbus.session.session import Session

log = logging.getLogger("weightbus")


def update_with_retries(
    session: Session,
    enter: m.Enter,
    retries: int,
    on_progress: Callable[[int, int], None] | None,
    copied: SourceCopy | None,
) -> tuple[int, m.Outcome, Progress]:
    """The version that is committed, with the outcome and what this rank has done for it.

    retries: how often it is repeated. An update that is put off is repeated without counting.
    Raises UpdateError if nothing was written, TornError if servers may hold a mixture, by any attempt.
    """
    version, moved, earlier = enter.version, False, list[m.Failure]()
    while True:
        progress, enter.repeats = Progress(report=on_progress), retries > 0
        outcome = session.call(enter, progress, copied)
        version = version if outcome.version is None else outcome.version
        if outcome.ok:
            return version, outcome, progress
        moved = moved or outcome.moved
        if not outcome.again:
            break
        reasons = "; ".join(map(str, outcome.failures))
        if outcome.put_off:
            log.info("version %d is put off: %s", version, reasons)
        else:
            log.warning("version %d is tried again without them: %s", version, reasons)
            retries -= 1
            earlier += outcome.failures
    reasons = reasons_of(earlier + outcome.failures)
    if moved:
        raise TornError(f"version {version} was not committed, servers may hold a mixture:{reasons}")
    if outcome.servers and not outcome.job and (ends := both_ends(session.context.processes())):
        reasons += f"\n  unnamed job: {ends}"
    raise UpdateError(f"version {version} was refused, nothing was written:{reasons}")
