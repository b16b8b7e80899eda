"""From a hello to a role: what a rank and the hub say to each other until the rank is a member."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.control.connection import Connection, NotSent
from weightbus.control.identity import host_name, process_started
from weightbus.control.patience import Patience
from weightbus.errors import HubError

log = logging.getLogger("weightbus")

# A hello may have gone to a hub that was just leaving.
HELLO_AGAIN_S = 3.0


@dataclass(frozen=True, slots=True)
class Joined:
    """The hub has let this rank in. header: of its answer to the first beat."""

    welcome: m.Welcome
    header: m.Header


def hello_of(
    job: str,
    process: str,
    role: m.Role,
    rank: int,
    size: int,
    *,
    replica: int,
    device: str,
    start: str = "",
    model: m.Sketch | None = None,
) -> m.Hello:
    """This process's hello for a role."""
    return m.Hello(
        job=job,
        process=process,
        host=host_name(),
        pid=os.getpid(),
        started=process_started(),
        model=model,
        start=start,
        device=device,  # type: ignore[arg-type]
        role=role,
        rank=rank,
        size=size,
        replica=replica,
    )


def take_role(
    connection: Connection,
    hello: m.Hello,
    deadline: float,
    *,
    state: Callable[[], tuple[m.State, int | None]],
    start_hub: Callable[[], None],
    keep: Callable[[wire.FromHub], None],
) -> Joined | None:
    """Say hello until the hub lets this rank in; None if no hub has answered by ``deadline``.

    state: this rank's state and version, for its first beat. start_hub: called before each hello, to start a
    hub where none listens. keep: takes messages that are no answers to this.

    Raises HubError with the hub's reason.
    """
    first = 0.0
    patience = Patience(time.monotonic())
    while True:
        start_hub()
        limit = min(deadline, time.monotonic() + HELLO_AGAIN_S)
        answer: m.Welcome | m.Alive | m.Refused | None = None
        try:
            connection.send(hello)
            answer = _await_answer(connection, limit, keep)
        except NotSent:
            time.sleep(0.1)
        if isinstance(answer, m.Welcome):
            welcome = answer
            # Who answers the welcome has heard it: only then is the role taken.
            now_state, version = state()
            beat = m.Beat(job=hello.job, peer=welcome.peer, state=now_state, version=version)
            beat.local_socket = connection.expect(welcome.peer)
            connection.send(beat)
            answer = _await_answer(connection, limit, keep, welcome.peer)
            if isinstance(answer, m.Alive) and answer.known:
                return Joined(welcome, answer.header)
        now = time.monotonic()
        if patience.is_over(now):
            why = answer.reason if isinstance(answer, m.Refused) else "none answers"
            waited_s = now - patience.since
            log.warning("waiting for a hub at %s for %.0f s: %s", connection.address, waited_s, why)
        if not isinstance(answer, m.Refused):
            if now > deadline:
                return None
            continue
        first = first or now
        # The place may be held by a process that has died, which the hub learns only with time;
        # unless it has been heard since we first asked.
        alive = answer.silent_s is None or now - answer.silent_s > first + 1.0
        if alive or now + 0.5 > deadline:
            raise HubError(f"the hub at {connection.address} refused: {answer.reason}")
        time.sleep(0.5)


def _await_answer(
    connection: Connection, deadline: float, keep: Callable[[wire.FromHub], None], peer: str = ""
) -> m.Welcome | m.Alive | m.Refused | None:
    """The answer to a hello, or, given ``peer``, to its first beat."""
    while True:
        answer = connection.receive(min(0.5, max(0.0, deadline - time.monotonic())))
        if isinstance(answer, m.Welcome) and not peer:
            return answer
        if isinstance(answer, m.Alive) and peer and answer.peer == peer:
            return answer
        # Refusals of anything else are of messages to an earlier hub.
        if isinstance(answer, m.Refused) and answer.of in ("hello", ""):
            return answer
        if answer is None and time.monotonic() > deadline:
            return None
        if answer is not None and not isinstance(answer, m.Welcome | m.Alive | m.Refused):
            keep(answer)
