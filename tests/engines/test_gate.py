"""A torn engine runs no step and takes no request until the next good update; others are left alone."""

from __future__ import annotations

import asyncio
import enum
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from weightbus.engines.vllm import gate
from weightbus.errors import TornError, UpdateError


class PauseState(enum.Enum):
    UNPAUSED = 0
    PAUSED_NEW = 1
    PAUSED_ALL = 2


class Scheduler:
    def __init__(self):
        self.pause_state = PauseState.UNPAUSED

    def set_pause_state(self, state):
        self.pause_state = state


class Worker:
    def __init__(self, rank, fails=""):
        self.rank, self.fails, self._weight_update_active = rank, fails, False
        self.weight_transfer_engine = SimpleNamespace(state="ready", reset_weight_update_target=lambda: None)

    def start_weight_update(self):
        if self._weight_update_active:
            raise RuntimeError("active")
        if self.fails == "start":
            raise RuntimeError("planted, start")
        self._weight_update_active = True
        return "started"

    def update_weights(self, update_info):
        if self.fails:
            self.weight_transfer_engine.state = self.fails
            raise RuntimeError(f"planted, {update_info}")
        self.weight_transfer_engine.state = "ready"

    def finish_weight_update(self):
        self.update_weights("finish")
        self._weight_update_active = False

    def look(self):
        return self.rank


class Wrapper:
    """As vLLM's executors have it around each worker."""

    def __init__(self, worker):
        self.worker = worker

    def __getattr__(self, name):
        return getattr(self.worker, name)


class Core:
    def __init__(self, *workers, backend="weightbus"):
        self.workers, self.scheduler = workers, Scheduler()
        self.model_executor = SimpleNamespace(sleeping_tags=set())
        self.vllm_config = SimpleNamespace(weight_transfer_config=SimpleNamespace(backend=backend))

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        call = getattr(type(self.workers[0]), method) if isinstance(method, str) else method
        return [call(Wrapper(worker), *args, **kwargs or {}) for worker in self.workers]

    def sleep(self, level=1, mode="abort"):
        self.scheduler.set_pause_state(PauseState.PAUSED_NEW)
        if level:
            self.model_executor.sleeping_tags |= {"weights", "kv_cache"}
        return self.ends  # None, or what is done once requests in flight have ended

    ends = None

    def wake_up(self, *tags):
        self.model_executor.sleeping_tags -= set(tags or ("weights", "kv_cache"))
        if not self.model_executor.sleeping_tags:
            self.scheduler.set_pause_state(PauseState.UNPAUSED)


rpc = gate.guard(Core.collective_rpc)
sleep = gate.lose(Core.sleep)


def update(core):
    rpc(core, "start_weight_update")
    rpc(core, "update_weights", kwargs={"update_info": 1})
    return rpc(core, "finish_weight_update")


def test_a_torn_engine_is_held_until_a_good_update():
    core = Core(Worker(0), Worker(1, fails="torn"))
    with pytest.raises(TornError, match=r"weightbus: torn: .*rank 1: RuntimeError: planted, 1"):
        update(core)
    assert core.scheduler.pause_state is PauseState.PAUSED_ALL
    with pytest.raises(TornError, match="expected an update before requests are resumed"):
        core.scheduler.set_pause_state(PauseState.UNPAUSED)
    with pytest.raises(TornError):
        update(core)
    core.workers[1].fails = ""
    update(core)
    assert core.scheduler.pause_state is PauseState.UNPAUSED
    core.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    core.scheduler.set_pause_state(PauseState.UNPAUSED)


def test_a_pause_that_was_asked_for_outlasts_the_mending():
    core = Core(Worker(0, fails="torn"))
    core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    with pytest.raises(TornError):
        update(core)
    core.workers[0].fails = ""
    update(core)
    assert core.scheduler.pause_state is PauseState.PAUSED_ALL
    core.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert core.scheduler.pause_state is PauseState.UNPAUSED


def test_a_refusal_holds_nothing_and_names_each_rank():
    core = Core(Worker(0, fails="ready"), Worker(1, fails="ready"))
    with pytest.raises(UpdateError, match="rank 0: RuntimeError: planted, 1; rank 1: RuntimeError") as error:
        update(core)
    assert not isinstance(error.value, TornError)
    assert core.scheduler.pause_state is PauseState.UNPAUSED


@pytest.mark.parametrize("step", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_an_update_that_fails_on_one_worker_can_be_begun_again(step):
    core = Core(Worker(0), Worker(1))
    for one in ("start_weight_update", "update_weights", "finish_weight_update"):
        core.workers[1].fails = ("start" if "start" in step else "ready") if one == step else ""
        kwargs = {"update_info": 1} if one == "update_weights" else None
        if one == step:
            with pytest.raises(UpdateError, match="rank 1: RuntimeError: planted"):
                rpc(core, one, kwargs=kwargs)
            break
        rpc(core, one, kwargs=kwargs)
    core.workers[1].fails = ""
    update(core)


def test_the_end_of_an_update_frees_no_engine_of_which_a_worker_is_torn():
    core = Core(Worker(0), Worker(1))
    rpc(core, "start_weight_update")
    finish, Worker.finish_weight_update = Worker.finish_weight_update, lambda worker: None
    try:
        core.workers[1].weight_transfer_engine.state = "torn"  # as a check has found
        with pytest.raises(TornError, match="weightbus: torn"):
            rpc(core, "finish_weight_update")
    finally:
        Worker.finish_weight_update = finish
    assert core.scheduler.pause_state is PauseState.PAUSED_ALL


@pytest.mark.parametrize("call", ["start_weight_update", "update_weights"])
def test_weights_that_sleep_are_not_written(call):
    core = Core(Worker(0))
    sleep(core, 1)
    with pytest.raises(UpdateError, match=f"{call}: expected the weights in memory, got an engine that sleeps"):
        rpc(core, call)
    core.wake_up("weights")
    update(core)
    core.wake_up("kv_cache")
    assert core.scheduler.pause_state is PauseState.UNPAUSED


@pytest.mark.parametrize("waits", [False, True], ids=["idle", "with requests in flight"])
def test_weights_that_sleep_has_discarded_are_served_to_nobody(waits):
    core = Core(Worker(0))
    core.ends = Future() if waits else None
    assert sleep(core, level=2) is core.ends
    if waits:
        assert core.scheduler.pause_state is PauseState.PAUSED_NEW, "they end first"
        core.ends.set_result(None)
    assert core.scheduler.pause_state is PauseState.PAUSED_ALL
    with pytest.raises(UpdateError, match=r"discarded the weights: expected an update before requests"):
        core.wake_up()
    assert core.scheduler.pause_state is PauseState.PAUSED_ALL
    update(core)
    core.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert core.scheduler.pause_state is PauseState.UNPAUSED


@pytest.mark.parametrize(("backend", "level"), [("nccl", 2), ("weightbus", 1), ("weightbus", 0)])
def test_other_sleep_is_left_alone(backend, level):
    core = Core(Worker(0), backend=backend)
    sleep(core, level)
    core.wake_up()
    assert core.scheduler.pause_state is PauseState.UNPAUSED


@pytest.mark.parametrize(("backend", "method"), [("nccl", "start_weight_update"), ("weightbus", "look")])
def test_other_backends_and_calls_go_their_own_way(backend, method):
    core = Core(Worker(0), backend=backend)
    assert rpc(core, method) == (["started"] if method != "look" else [0])


class Client:
    """A front end, whose engine gives one answer after another."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def collective_rpc(self, method):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def collective_rpc_async(self, method):
        return self.collective_rpc(method)

    def check(self, request_id):
        return request_id


watched = gate.Door.watch(Client.collective_rpc)
check = gate.Door.refuse(Client.check, TornError)


def watched_async(client, method):
    return asyncio.run(gate.Door.watch_async(Client.collective_rpc_async)(client, method))


@pytest.mark.parametrize("call", [watched, watched_async], ids=["LLMEngine", "AsyncLLM"])
def test_requests_are_refused_with_the_reason_while_it_is_torn(call):
    torn = RuntimeError("Call to collective_rpc method failed: weightbus: torn: because")
    client = Client(RuntimeError("refused"), torn, [None], [None], [None])
    with pytest.raises(RuntimeError, match="refused"):
        call(client, "update_weights")
    assert check(client, "a") == "a"
    with pytest.raises(RuntimeError, match="because"):
        call(client, "update_weights")
    for method in ("start_weight_update", "update_weights"):
        with pytest.raises(TornError, match=r"^weightbus: torn: because$"):
            check(client, "b")
        call(client, method)
    call(client, "finish_weight_update")
    assert check(client, "c") == "c"
