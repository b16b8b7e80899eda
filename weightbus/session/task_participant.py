"""One rank's part in one task: its answer to each of the hub's messages (``tasks`` has the table)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol

from weightbus.control import messages as m
from weightbus.control.link import HubLost
from weightbus.errors import SpecError, UpdateError
from weightbus.session.context import Context
from weightbus.session.giving_up import answer, explain, failed, give_up
from weightbus.session.hearing import SLACK_S, Ended, look_at
from weightbus.session.load import Load
from weightbus.session.probe import Probe

log = logging.getLogger("weightbus")


class Work(Protocol):
    """A rank's own work in a task, step by step."""

    def prepare(self) -> bytes: ...
    def check(self, gathered: m.Gathered) -> None: ...
    def write(self) -> bytes | None: ...
    def finish(self, gathered: m.Gathered) -> None: ...
    def close(self) -> None: ...


MakeSave = Callable[[m.TaskOffer, m.SaveTask, int, Callable[[], None]], Work]


class TaskParticipant:
    """State of this rank from a task's offer to its outcome."""

    def __init__(
        self,
        context: Context,
        offer: m.TaskOffer,
        *,
        report: Callable[[int, int], None] | None = None,
        expected: m.Task | None = None,
        save: MakeSave | None = None,
    ) -> None:
        """expected: what this rank has called for; another task than that is refused. save: makes the work of
        a save, on a rank that has called for one."""
        self.context, self.offer, self._report = context, offer, report
        self._expected, self._save = expected, save
        self._writes = False
        self.work: Work | None = None

    def follow(self) -> m.Outcome:
        """From the offer to the outcome, of which this rank is told once, whatever happens.

        Raises HubLost once it has been told, if the hub is lost.
        """
        rounds, link = self.context.link.rounds, self.context.link
        outcome: m.Outcome | None = None
        with rounds.within(self.offer):
            try:
                outcome = self._follow()
            except Ended as ended:
                outcome = ended.outcome
            except BaseException as error:
                reason = explain(error)
                outcome = failed(rounds, "this rank", reason, moved=self._writes)
                if not isinstance(error, HubLost):
                    outcome = give_up(link, self.context.aside, reason) or outcome
                raise
            finally:
                self.context.aside.give_back()
                try:
                    if self.work is not None:
                        self.work.close()
                finally:
                    if outcome is not None:
                        self._ended(outcome)
        return outcome

    def _follow(self) -> m.Outcome:
        link, offer = self.context.link, self.offer
        answer(link, self._prepare)
        limit_s = offer.run_s + SLACK_S
        while True:
            message = link.receive(limit_s)
            match message:
                case None:
                    raise HubLost(f"no word from {link.address} for {limit_s:.0f} s in a task")
                case m.Gathered(of="prepare"):
                    answer(link, partial(self._check, message))
                case m.Go():
                    self._writes = True
                    answer(link, self._write)
                case m.Gathered(of="write"):
                    answer(link, partial(self._finish, message))
                case m.Outcome():
                    return message
                case _ if not self.context.aside.take(message):
                    log.info("late: %s", type(message).__name__)
        raise AssertionError

    def _prepare(self) -> m.Facts:
        self.work = self._make()
        return m.Facts(peer=self.context.link.peer, blob=self.work.prepare())

    def _make(self) -> Work:
        task, destination, peer = self.offer.task, self.context.destination, self.context.link.peer
        own = m.member_id(peer)
        place = next(i for i, member in enumerate(self.offer.members) if member.peer == own)
        if self._expected is not None and task != self._expected:
            raise UpdateError(f"task: expected {self._expected} as called on this rank, got {task}")
        if isinstance(task, m.SaveTask):
            if self._save is None:
                raise UpdateError(f"{task.path}: expected this rank to call save() too, but it has not")
            return self._save(self.offer, task, place, self._look())
        if destination is None:
            raise SpecError("task: expected a server rank, got a trainer rank")
        if destination.refresh(in_place=True):
            self.context.plans.clear()
        if isinstance(task, m.LoadTask):
            report = self._report or (lambda done, total: None)
            return Load(self.offer, task, destination, look=self._look(), progress=report)
        return Probe(task, place, len(self.offer.members), destination, destination.cpu_group)

    def _check(self, gathered: m.Gathered) -> m.Ready:
        assert self.work is not None, "the hub gathers what was prepared"  # noqa: S101 - for mypy
        self.work.check(gathered)
        if isinstance(self.work, Load) and self.context.destination:
            self.context.destination.before(self.work.version)
        return m.Ready(peer=self.context.link.peer)

    def _write(self) -> m.Facts | m.Done:
        assert self.work is not None, "the hub says go to those who are ready"  # noqa: S101 - for mypy
        blob = self.work.write()
        return self._done() if blob is None else m.Facts(peer=self.context.link.peer, blob=blob)

    def _finish(self, gathered: m.Gathered) -> m.Done:
        assert self.work is not None, "it has written"  # noqa: S101 - for mypy
        self.work.finish(gathered)
        return self._done()

    def _done(self) -> m.Done:
        done = m.Done(peer=self.context.link.peer)
        if isinstance(self.work, Load):
            done.partial, done.version, done.verdict = (
                m.cut(self.work.partial),
                self.work.version,
                self.work.word,
            )
        return done

    def _ended(self, outcome: m.Outcome) -> None:
        destination, work = self.context.destination, self.work
        if not isinstance(self.offer.task, m.LoadTask) or destination is None:
            return
        if isinstance(work, Load):
            destination.after_load(
                outcome, work.version, work.modules, work.wrote, what=work.what, complete=work.complete
            )
        else:
            what = self.offer.task.path or "tensors in a request"
            destination.error = UpdateError(f"load of {what} refused: " + "; ".join(map(str, outcome.failures)))

    def _look(self) -> Callable[[], None]:
        return look_at(self.context.link, self.context.aside)


def take_part(context: Context, offer: m.TaskOffer) -> None:
    """In a task that somebody else has asked for; what became of it is said by state and callbacks."""
    try:
        TaskParticipant(context, offer).follow()
    except HubLost as lost:
        log.warning("%s", lost)
