"""A save as all trainer ranks call it: each writes what it holds."""

from __future__ import annotations

import os
from collections.abc import Callable

from weightbus.control import messages as m
from weightbus.errors import UpdateError
from weightbus.progress import Bar
from weightbus.report import Saved
from weightbus.session.origin import Origin
from weightbus.session.results import reasons_of
from weightbus.session.save import Save
from weightbus.session.session import Session
from weightbus.storage.saved_names import modules_of


def save_source(session: Session, origin: Origin, task: m.SaveTask, *, lead: bool, timeout_s: float) -> Saved:
    """lead: whether this is the rank that asks the hub for it; it shows a bar on its terminal.

    Raises UpdateError with each rank's reason, HubError if the hub is lost.
    """
    bar = Bar(f"saving {os.path.basename(task.path)}") if lead else None
    report = bar or (lambda done, total: None)

    def work(offer: m.TaskOffer, task: m.SaveTask, place: int, look: Callable[[], None]) -> Save:
        modules = modules_of(origin.source)
        return Save(task, place, origin.layout, look=look, progress=report, modules=modules)

    try:
        outcome, participant = session.call_task(task, lead=lead, timeout_s=timeout_s, report=report, save=work)
    finally:
        if bar:
            bar.close()
    if not outcome.ok:
        raise UpdateError(f"save to {task.path} has failed:{reasons_of(outcome.failures)}")
    assert isinstance(participant.work, Save), "a save has ended well"  # noqa: S101 - for mypy
    return Saved(
        path=task.path,
        version=task.version,
        files=participant.work.files,
        tensors=participant.work.tensors,
        nbytes=participant.work.nbytes,
        seconds=outcome.seconds,
    )
