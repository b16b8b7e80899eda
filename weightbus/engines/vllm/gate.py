"""An engine whose weights are a mixture serves nobody until the next good update.

In vLLM's engine process (``guard``): calls of the weight transfer bring each worker's failure back as an
answer, since vLLM's own way leaves the answers of other workers unread, for the next call to take for its own.
Where a worker is torn the scheduler is held: no step runs, and requests in flight wait. So it is where sleep
has discarded the weights (``lose``). In its front end (``Door``), where it is torn: new requests are refused,
and health says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from weightbus.engines.vllm.plugin import NAME
from weightbus.errors import TornError, UpdateError, WeightbusError

log = logging.getLogger("weightbus")

CALLS = (
    "init_weight_transfer_engine",
    "start_weight_update",
    "start_draft_weight_update",
    "update_weights",
    "finish_weight_update",
    "shutdown_weight_transfer_engine",
)
"""Workers' methods of the weight transfer."""

WRITES = ("start_weight_update", "start_draft_weight_update", "update_weights")
"""Those that need the weights to be in memory."""

LAST = "finish_weight_update"

LEVEL = 2
"""Of sleep, from which on weights are discarded."""

TORN = "weightbus: torn"
"""Begins what a torn engine says; over vLLM's processes an error is only a text."""

EMPTY = f"weightbus: empty: sleep level {LEVEL} has discarded the weights"
"""Begins what an engine says that has none."""


def asked(vllm_config: Any) -> bool:
    """Whether an engine of this configuration uses the backend."""
    transfer = getattr(vllm_config, "weight_transfer_config", None)
    return transfer is not None and transfer.backend == NAME


@dataclass(frozen=True, slots=True)
class Answer:
    """A worker's: what its method gave, or why it failed; and what its weights are."""

    result: Any
    failure: str
    state: str


@dataclass(frozen=True, slots=True)
class Call:
    """A worker's method, called so that a failure is an answer too. Runs on the worker."""

    method: str

    def __call__(self, worker: Any, *args: Any, **kwargs: Any) -> Answer:
        try:
            result, failure = getattr(worker, self.method)(*args, **kwargs), ""
        except Exception as error:
            log.exception("%s", self.method)
            result, failure = None, f"rank {worker.rank}: {type(error).__name__}: {error}"
        return Answer(result, failure, getattr(worker.weight_transfer_engine, "state", "empty"))


def abandon(worker: Any) -> None:
    """An update has failed on some worker: it ends on all, so that the next may start. Runs on the worker."""
    worker = vars(worker).get("worker", worker)  # vLLM's wrapper reads through, but does not write through
    worker._weight_update_active = False
    worker.weight_transfer_engine.reset_weight_update_target()


def guard(collective_rpc: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineCore.collective_rpc`` with the calls of the weight transfer guarded."""

    def guarded(
        core: Any,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if method not in CALLS or not asked(core.vllm_config):
            return collective_rpc(core, method, timeout, args, kwargs)
        if method in WRITES and "weights" in core.model_executor.sleeping_tags:
            raise UpdateError(
                f"{method}: expected the weights in memory, got an engine that sleeps; wake it up first, with "
                f"the tag 'weights'"
            )
        answers = collective_rpc(core, Call(method), timeout, args, kwargs)
        failures = "; ".join(answer.failure for answer in answers if answer.failure)
        torn = any(answer.state == "torn" for answer in answers)
        if torn:
            hold(core.scheduler, TornError(TORN))
        if failures and method in (*WRITES, LAST):
            collective_rpc(core, abandon, timeout)
        if failures and torn:
            raise TornError(f"{TORN}: no request is served until the next update: {failures}")
        if failures:
            raise UpdateError(failures)
        if torn and method == LAST:
            raise TornError(f"{TORN}: no request is served until the next update")
        if method == LAST:
            release(core.scheduler)
        return [answer.result for answer in answers]

    return guarded


def lose(sleep: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineCore.sleep``: once it has discarded the weights, no step runs until the next update."""

    def losing(core: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        future = sleep(core, level, *args, **kwargs)
        if level < LEVEL or not asked(core.vllm_config):
            return future
        if future is None:
            hold(core.scheduler, UpdateError(EMPTY))
        else:  # requests in flight end first
            future.add_done_callback(lambda _: hold(core.scheduler, UpdateError(EMPTY)))
        return future

    return losing


class _Held:
    """Stands for a scheduler's ``set_pause_state``: it stays paused, and whoever resumes it is told why."""

    def __init__(self, scheduler: Any, why: WeightbusError) -> None:
        self._scheduler, self.before, self._why = scheduler, scheduler.pause_state, why
        self._set = scheduler.set_pause_state
        self._paused = type(self.before).PAUSED_ALL
        self._set(self._paused)

    def __call__(self, state: Any) -> None:
        if state.name == "UNPAUSED":
            raise type(self._why)(f"{self._why}: expected an update before requests are resumed")
        self.before = state

    def release(self) -> None:
        del self._scheduler.set_pause_state
        self._set(self.before)


def hold(scheduler: Any, why: WeightbusError) -> None:
    """No step runs, and nobody can resume, until ``release``."""
    if not isinstance(scheduler.__dict__.get("set_pause_state"), _Held):
        scheduler.set_pause_state = _Held(scheduler, why)


def release(scheduler: Any) -> None:
    """The scheduler is as paused as it was, or was asked to be meanwhile."""
    held = scheduler.__dict__.get("set_pause_state")
    if isinstance(held, _Held):
        held.release()


class Door:
    """The front end's knowledge of whether its engine is torn, from calls that go through it."""

    ATTRIBUTE = "weightbus_torn"

    @classmethod
    def reason(cls, client: Any) -> str:
        """Why requests are refused; empty if they are not."""
        return str(getattr(client, cls.ATTRIBUTE, ""))

    @classmethod
    def note(cls, client: Any, method: Any, error: BaseException | None) -> None:
        """What became of a call of the weight transfer."""
        if error is not None and TORN in str(error):
            setattr(client, cls.ATTRIBUTE, str(error)[str(error).index(TORN) :])
        elif error is None and method == LAST:
            setattr(client, cls.ATTRIBUTE, "")

    @classmethod
    def watch(cls, collective_rpc: Callable[..., Any]) -> Callable[..., Any]:
        """``LLMEngine.collective_rpc``, noted."""

        def watched(client: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                result = collective_rpc(client, method, *args, **kwargs)
            except Exception as error:
                cls.note(client, method, error)
                raise
            cls.note(client, method, None)
            return result

        return watched

    @classmethod
    def watch_async(cls, collective_rpc: Callable[..., Any]) -> Callable[..., Any]:
        """``AsyncLLM.collective_rpc``, noted."""

        async def watched(client: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                result = await collective_rpc(client, method, *args, **kwargs)
            except Exception as error:
                cls.note(client, method, error)
                raise
            cls.note(client, method, None)
            return result

        return watched

    @classmethod
    def refuse(cls, function: Callable[..., Any], refusal: Callable[[str], Exception]) -> Callable[..., Any]:
        """A method that takes a request, refused while the engine is torn."""

        def refusing(client: Any, *args: Any, **kwargs: Any) -> Any:
            if reason := cls.reason(client):
                raise refusal(reason)
            return function(client, *args, **kwargs)

        return refusing
