"""One rank's part in one task: its answer to each of the hub's messages (``tasks`` has the table)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from weightbus import messages as m
from weightbus.errors import SpecError, TornError, UpdateError
from weightbus.giving_up import failed, give_up
from weightbus.link import HubLost
from weightbus.load import Load
from weightbus.probe import Probe
from weightbus.turn import SLACK_S, Ended, explain, look_at

if TYPE_CHECKING:
    from weightbus.session import Session


log = logging.getLogger("weightbus")


class Work(Protocol):
    """A rank's own work in a task, step by step."""

    def prepare(self) -> bytes: ...
    def check(self, gathered: m.Gathered) -> None: ...
    def write(self) -> bytes | None: ...
    def finish(self, gathered: m.Gathered) -> None: ...
    def close(self) -> None: ...


MakeSave = Callable[[m.TaskOffer, m.SaveTask, int, Callable[[], None]], Work]


class TaskTurn:
    """State of this rank from a task's offer to its outcome."""

    def __init__(
        self,
        session: Session,
        offer: m.TaskOffer,
        *,
        report: Callable[[int, int], None] | None = None,
        expected: m.Task | None = None,
        save: MakeSave | None = None,
    ) -> None:
        """expected: what this rank has called for; another task than that is refused. save: makes the work of
        a save, on a rank that has called for one."""
        self.session, self.offer, self._report = session, offer, report
        self._expected, self._save = expected, save
        self._writes = False
        self._farewell: m.Farewell | None = None
        self.work: Work | None = None

    def follow(self) -> m.Outcome:
        """From the offer to the outcome, of which this rank is told once, whatever happens.

        Raises HubLost once it has been told, if the hub is lost.
        """
        rounds, link = self.session.link.rounds, self.session.link
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
                    outcome = give_up(link, reason) or outcome
                raise
            finally:
                if self._farewell is not None:
                    link.push_back(self._farewell)
                try:
                    if self.work is not None:
                        self.work.close()
                finally:
                    if outcome is not None:
                        self._ended(outcome)
        return outcome

    def _follow(self) -> m.Outcome:
        link, offer = self.session.link, self.offer
        self._try(self._prepare)
        limit_s = offer.run_s + SLACK_S
        while True:
            message = link.receive(limit_s)
            match message:
                case None:
                    raise HubLost(f"no word from {link.address} for {limit_s:.0f} s in a task")
                case m.Gathered(of="prepare"):
                    self._try(lambda gathered=message: self._check(gathered))  # type: ignore[misc]
                case m.Go():
                    self._writes = True
                    self._write()
                case m.Gathered(of="write"):
                    self._finish(message)
                case m.Outcome():
                    return message
                case m.Farewell():
                    self._heard_farewell(message)
                case _:
                    log.info("late: %s", type(message).__name__)
        raise AssertionError

    def _try(self, step: Callable[[], m.Message]) -> None:
        """Answer with what ``step`` says, or refuse with what it raises."""
        try:
            answer = step()
        except Ended:
            raise
        except Exception as error:
            answer = m.Refuse(peer=self.session.link.peer, reason=explain(error))
        self.session.link.send(answer)

    def _prepare(self) -> m.Facts:
        self.work = self._make()
        return m.Facts(peer=self.session.link.peer, blob=self.work.prepare())

    def _make(self) -> Work:
        task, destination, peer = self.offer.task, self.session.destination, self.session.link.peer
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
            self.session.forget_plans()
        if isinstance(task, m.LoadTask):
            report = self._report or (lambda done, total: None)
            return Load(self.offer, task, destination, look=self._look(), progress=report)
        return Probe(task, place, len(self.offer.members), destination, destination.cpu_group)

    def _check(self, gathered: m.Gathered) -> m.Ready:
        assert self.work is not None, "the hub gathers what was prepared"
        self.work.check(gathered)
        if isinstance(self.work, Load) and self.session.destination:
            self.session.destination.before(self.work.version)
        return m.Ready(peer=self.session.link.peer)

    def _write(self) -> None:
        assert self.work is not None, "the hub says go to those who are ready"
        try:
            blob = self.work.write()
        except Ended:
            raise
        except Exception as error:
            self._done(explain(error))
            return
        if blob is None:
            self._done()
        else:
            self.session.link.send(m.Facts(peer=self.session.link.peer, blob=blob))

    def _finish(self, gathered: m.Gathered) -> None:
        assert self.work is not None, "it has written"
        try:
            self.work.finish(gathered)
        except Ended:
            raise
        except Exception as error:
            self._done(explain(error))
            return
        self._done()

    def _done(self, error: str = "") -> None:
        done = m.Done(peer=self.session.link.peer, error=error)
        if isinstance(self.work, Load):
            done.partial, done.version, done.verdict = (
                m.cut(self.work.partial),
                self.work.version,
                self.work.word,
            )
        self.session.link.send(done)

    def _ended(self, outcome: m.Outcome) -> None:
        destination, work = self.session.destination, self.work
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
        return look_at(self.session.link, self._heard_farewell)

    def _heard_farewell(self, farewell: m.Farewell) -> None:
        self._farewell = farewell  # a task needs no trainer


def raise_for(outcome: m.Outcome | m.TaskEnd, what: str) -> None:
    """Raise TornError or UpdateError, with all reasons, unless the task has succeeded."""
    if outcome.ok:
        return
    reasons = "\n  ".join(["", *map(str, outcome.failures)])
    if outcome.moved:
        raise TornError(f"{what} has failed, server ranks may hold a mixture:{reasons}")
    raise UpdateError(f"{what} was refused, nothing was written:{reasons}")
