"""What clients have asked for and the trainer has yet to run: a queue, apart from sockets.

A request runs at the trainer's next ``poll`` or, but for updates, at the end of its next ``update``. An
update that the trainer makes by itself meanwhile answers a request for one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from weightbus.control import client_messages as a
from weightbus.control import messages as m

Request = a.AskUpdate | a.AskCheck | a.AskVersion

MAX_REQUESTS = 64
MAX_OF_ONE = 16

# Answers to polls that are kept for the ranks that come to them later.
MAX_POLLS = 4


@dataclass(slots=True, kw_only=True)
class Waiter:
    """A request in the queue. client: the connection that asked. given: the trainer has it."""

    client: bytes
    id: str
    task: m.Asked
    deadline: float
    given: bool = False


class Requests:
    """The queue. ``outbox``: answers for the connections that asked."""

    def __init__(self) -> None:
        self.outbox: list[tuple[bytes, m.Message]] = []
        self._waiters: dict[str, Waiter] = {}
        self._polls: OrderedDict[int, m.Asked | None] = OrderedDict()
        self._polling: dict[int, tuple[bytes, int]] = {}  # by rank
        self._at: dict[int, int] = {}
        self._drawn = 0
        self.wanted = False  # servers lack the committed version, and only the trainer can give them one

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, client: bytes, ask: Request, now: float) -> m.Message:
        """Take a request in; what to answer at once."""
        if len(self._waiters) >= MAX_REQUESTS:
            return a.Answer(id=ask.id, ok=False, reason=f"expected at most {MAX_REQUESTS} waiting requests")
        if sum(waiter.client == client for waiter in self._waiters.values()) >= MAX_OF_ONE:
            reason = f"expected at most {MAX_OF_ONE} waiting requests of one client"
            return a.Answer(id=ask.id, ok=False, reason=reason)
        self._drawn += 1
        task = m.Asked(task=str(self._drawn), kind="check")
        match ask:
            case a.AskUpdate():
                task = m.Asked(
                    task=task.task, kind="update", version=ask.version, modules=ask.modules, verify=ask.verify
                )
            case a.AskVersion():
                task = m.Asked(task=task.task, kind="label", version=ask.version, verify=False)
        self._waiters[task.task] = Waiter(client=client, id=ask.id, task=task, deadline=now + ask.wait_s)
        return a.Waiting(id=ask.id, reason="waits for the trainer's next poll() or update()")

    def poll(self, client: bytes, rank: int, number: int, size: int, committed: int) -> None:
        """A trainer rank has polled for the ``number``-th time; all ranks get the same answer to that.

        The answer waits for a rank that lags by more than one poll, which one that trains with the others
        never does. size: of the trainer job, 0 if not all of it is here. committed: the last version.
        """
        self._at[rank] = number
        self._polling[rank] = client, number
        slowest = min(self._at.values()) if len(self._at) >= size > 0 else 0
        for of, (client, number) in list(self._polling.items()):
            if size == 0 or slowest >= number - 1:
                del self._polling[of]
                task = self._decide(number, committed) if size else None
                self.outbox.append((client, m.Polled(number=number, task=task)))

    def _decide(self, number: int, committed: int) -> m.Asked | None:
        """Once for each number, by the first rank that comes to it."""
        if number not in self._polls:
            waiter = next((w for w in self._waiters.values() if not w.given), None)
            task = None
            if waiter is not None:
                waiter.given = True
                task = waiter.task
                if task.kind == "update" and task.version is None:
                    task.version = max(committed + 1, 1)
            elif self.wanted and committed >= 0:
                task = m.Asked(task="", kind="update", version=committed + 1)
                self.wanted = False
            self._polls[number] = task
            if len(self._polls) > MAX_POLLS:
                self._polls.popitem(last=False)
        return self._polls[number]

    def forget_polls(self) -> None:
        """A trainer rank is gone: those of another job count anew."""
        self.outbox += [(client, m.Polled(number=number)) for client, number in self._polling.values()]
        self._polling.clear()
        self._polls.clear()
        self._at.clear()

    def after_update(self) -> list[m.Asked]:
        """Checks and the like, to run at the end of an update that was committed."""
        waiters = [w for w in self._waiters.values() if not w.given and w.task.kind != "update"]
        for waiter in waiters:
            waiter.given = True
        return [waiter.task for waiter in waiters]

    def settle(self, enter: m.Enter, outcome: m.Outcome) -> None:
        """A round has ended: answer those who asked for it, or for one like it."""
        for key, waiter in list(self._waiters.items()):
            task = waiter.task
            like = (
                outcome.ok
                and not waiter.given
                and enter.kind == task.kind == "update"
                and enter.modules == task.modules
                and enter.verify >= task.verify
                and (task.version is None or task.version <= enter.version)
            )
            if key == enter.task or like:
                del self._waiters[key]
                answer = a.Answer(
                    id=waiter.id,
                    ok=outcome.ok,
                    verdict=outcome.verdict,
                    version=enter.version,
                    failures=tuple(outcome.failures),
                    partial=tuple(outcome.partial.items()),
                    servers=outcome.servers,
                    seconds=outcome.seconds,
                )
                self.outbox.append((waiter.client, answer))

    def gone(self, client: bytes) -> None:
        """A client has closed its connection: what the trainer has not begun is not done."""
        for key in [key for key, w in self._waiters.items() if w.client == client and not w.given]:
            del self._waiters[key]

    def expire(self, now: float) -> None:
        for key, waiter in list(self._waiters.items()):
            if now >= waiter.deadline:
                del self._waiters[key]
                why = "the trainer took it and has not finished" if waiter.given else "the trainer did not poll"
                answer = a.Answer(id=waiter.id, ok=False, verdict="failed", reason=f"not done in time: {why}")
                self.outbox.append((waiter.client, answer))
