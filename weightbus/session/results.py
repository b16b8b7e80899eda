"""What callers get back: an outcome of the hub's, with what this rank knows of it."""

from __future__ import annotations

from collections.abc import Iterable

from weightbus.control import messages as m
from weightbus.errors import TornError, UpdateError
from weightbus.planning.box import Box
from weightbus.report import Mismatch, Process, Report, Verdict
from weightbus.session.progress import Progress


def reasons_of(failures: Iterable[m.Failure]) -> str:
    """One on each line, below a head."""
    return "\n  ".join(["", *map(str, failures)])


def raise_for(outcome: m.Outcome | m.TaskEnd, what: str) -> None:
    """Raise TornError or UpdateError, with all reasons, unless the task has succeeded."""
    if outcome.ok:
        return
    reasons = reasons_of(outcome.failures)
    if outcome.moved:
        raise TornError(f"{what} has failed, server ranks may hold a mixture:{reasons}")
    raise UpdateError(f"{what} was refused, nothing was written:{reasons}")


def report_of(
    outcome: m.Outcome,
    version: int,
    progress: Progress,
    seconds: float,
    staging_bytes: int,
    processes: tuple[Process, ...],
) -> Report:
    """Of an update that was committed. seconds: of the whole call."""
    return Report(
        word=outcome.verdict,
        version=version,
        job=outcome.job,
        incarnation=outcome.incarnation,
        epoch=outcome.epoch,
        tensors=progress.tensors,
        nbytes=progress.nbytes,
        seconds=seconds,
        stages=progress.stages,
        staging_bytes=staging_bytes,
        trainers=outcome.trainers,
        servers=outcome.servers,
        replicas=tuple(outcome.replicas),
        left_out=outcome.left_out,
        partial=outcome.partial,
        skipped=progress.skipped,
        route=progress.choice.route if progress.choice else "",
        route_reason=progress.choice.reason if progress.choice else "",
        processes=processes,
    )


def verdict_of(outcome: m.Outcome, version: int | None, unproved: Iterable[str], seconds: float) -> Verdict:
    """Of a check that came to an end. unproved: modules of which no verified update counts."""
    partial = dict(outcome.partial)
    partial |= {module: "no verified update of this module counts" for module in unproved}
    word = outcome.verdict if outcome.ok else "mismatch"
    return Verdict(
        word="partial" if partial and word == "verified" else word,
        version=version,
        mismatches=tuple(_mismatch(failure) for failure in outcome.failures),
        partial=partial,
        exempt=outcome.exempt,
        servers=outcome.servers,
        seconds=seconds,
        digest_s=outcome.digest_s,
    )


def _mismatch(failure: m.Failure) -> Mismatch:
    span = failure.box
    return Mismatch(
        rank=failure.rank,
        tensor=failure.tensor,
        reason=failure.reason,
        kind=failure.kind,
        where=failure.where,
        box=Box(tuple(span.offsets), tuple(span.sizes)) if span else None,
    )
