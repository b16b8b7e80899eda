"""What a chaos run does to its processes, hub and link: a table of faults, each with how it begins and ends."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import chaos_ranks as ranks
from chaos_world import Rank, World

Whose = Literal["server", "trainer", "hub", "link", "job"]

# Seconds after which a rank takes its hub for lost, and for which it then waits for an outcome.
HUB_SILENT_S, UNHEARD_S = 10.0, 20.0
SHORT_S = 0.6
FLAP_S = 2.0
LONG_S = ranks.DEAD_AFTER_S + ranks.TRANSFER_S
HANG_S = ranks.TRANSFER_S + 3.0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """begin: at the drawn moment. end: ``lasts_s`` later, and where that is 0, once all calls have ended.

    answer_s: of the deadline that bounds the calls of others while it lasts. armed: it is told to the victim
    before the update, and fires in it. own_s: of the deadline that bounds the victim's own calls; None where
    these do not go on. ends: the victim's process ends by it.
    """

    name: str
    of: Whose
    answer_s: float
    begin: Callable[[World, Rank | None], None]
    end: Callable[[World, Rank | None], None] = lambda world, victim: None
    lasts_s: float = 0.0
    armed: bool = False
    own_s: float | None = None
    ends: bool = False
    weight: int = 2


@dataclass(kw_only=True)
class Strike:
    """One fault as it was drawn: on whom, and when after the call; negative: so long before it."""

    fault: Fault
    victim: Rank | None
    delay_s: float
    began: float = 0.0
    done: bool = False
    ended: bool = False
    text: str = field(init=False)

    def __post_init__(self) -> None:
        where = self.victim.name if self.victim else self.fault.of
        self.text = f"{self.fault.name}: {where} at {self.delay_s:+.3f} s"

    def begin(self, world: World) -> None:
        self.began, self.done = time.monotonic(), True
        self.fault.begin(world, self.victim)

    @property
    def left_s(self) -> float:
        """Until it may end."""
        return max(0.0, self.began + self.fault.lasts_s - time.monotonic())

    def end(self, world: World) -> None:
        """What lasts a time of its own ends with it; the rest once all calls have."""
        if not self.ended:
            self.ended = True
            self.fault.end(world, self.victim)


def _send(number: int) -> Callable[[World, Rank | None], None]:
    return lambda world, victim: victim.signal(number) if victim else world.signal_hub(number)


def _plan(at: str, do: str, after: int = 0) -> Callable[[World, Rank | None], None]:
    def tell(world: World, victim: Rank | None) -> None:
        assert victim is not None, "hooks are a rank's"
        victim.tell("plan", {"at": at, "do": do, "for": HANG_S, "after": after})

    return tell


def _unplan(world: World, victim: Rank | None) -> None:
    """A hook that was not called this time does nothing the next."""
    if victim is not None and victim.alive:
        victim.tell("plan", {})


def _fork(world: World, victim: Rank | None) -> None:
    assert victim is not None, "a rank forks"
    victim.tell("fork", 4.0)


def _fork_and_kill(world: World, victim: Rank | None) -> None:
    _fork(world, victim)
    world.hear(0.3)
    _send(signal.SIGKILL)(world, victim)


def _flap(world: World, victim: Rank | None) -> None:
    """A link that loses what comes in many short times, for ``FLAP_S``."""
    rng = random.Random(world.rng.random())  # noqa: S311 - drawn again from its seed

    def flap() -> None:
        until = time.monotonic() + FLAP_S
        while time.monotonic() < until:
            world.link(up=False)
            time.sleep(rng.uniform(0.0, 0.1))
            world.link(up=True)
            time.sleep(rng.uniform(0.0, 0.2))

    threading.Thread(target=flap, daemon=True).start()


def _second_job(world: World, victim: Rank | None) -> None:
    host = world.hosts[0]
    world.others += [
        world.start(f"other job's {role}", ranks.other_job, host, role, 2) for role in ("trainer", "server")
    ]


def _intruder(world: World, victim: Rank | None) -> None:
    world.others.append(world.start("intruder", ranks.intruder, world.hosts[0]))


def _table() -> list[Fault]:
    kill, stop, go_on = _send(signal.SIGKILL), _send(signal.SIGSTOP), _send(signal.SIGCONT)
    dead, ready, transfer, join = ranks.DEAD_AFTER_S, ranks.READY_S, ranks.TRANSFER_S, ranks.JOIN_S
    server: dict[str, Any] = {"of": "server"}
    # Without a trainer rank, the other one's call waits for it to come.
    trainer: dict[str, Any] = {"of": "trainer", "answer_s": join}
    hub: dict[str, Any] = {"of": "hub", "own_s": UNHEARD_S + HUB_SILENT_S}
    link: dict[str, Any] = {"of": "link", "answer_s": dead, "own_s": UNHEARD_S + HUB_SILENT_S}
    rows: list[Any] = []
    for role in (server, trainer):
        rows += [
            Fault(name="kill", begin=kill, ends=True, weight=4, **{"answer_s": dead, **role}),
            Fault(name="terminate", begin=_send(signal.SIGTERM), ends=True, **{"answer_s": dead, **role}),
            Fault(name="interrupt", begin=_send(signal.SIGINT), own_s=dead, weight=4,
                  **{"answer_s": dead, **role}),
            Fault(name="stop, short", begin=stop, end=go_on, lasts_s=SHORT_S, **{"answer_s": dead, **role}),
            Fault(name="stop, long", begin=stop, end=go_on, lasts_s=LONG_S, **{"answer_s": dead, **role}),
            Fault(name="fork", begin=_fork, own_s=dead, weight=1, **{"answer_s": dead, **role}),
            Fault(name="fork, kill", begin=_fork_and_kill, ends=True, weight=1, **{"answer_s": dead, **role}),
        ]  # fmt: skip
    for at, answer_s, after in (("on_update", ready, 0), ("hook", transfer, 3), ("on_commit", ready, 0)):
        more: dict[str, Any] = {"armed": True, "own_s": HUB_SILENT_S, "end": _unplan, **server}
        rows += [
            Fault(name=f"{at} raises", begin=_plan(at, "raise", after), answer_s=dead, **more),
            Fault(name=f"{at} hangs", begin=_plan(at, "hang", after), answer_s=answer_s, lasts_s=HANG_S,
                  weight=1, **more),
        ]  # fmt: skip
    more = {"armed": True, "own_s": HUB_SILENT_S, "end": _unplan, **trainer}
    return [
        *rows,
        Fault(name="progress raises", begin=_plan("progress", "raise", 3), **more),
        Fault(name="progress hangs", begin=_plan("progress", "hang", 3), lasts_s=HANG_S, weight=1, **more),
        Fault(name="kill", begin=kill, answer_s=UNHEARD_S, weight=6, **hub),
        Fault(name="stop, short", begin=stop, end=go_on, lasts_s=SHORT_S, answer_s=dead, **hub),
        Fault(name="stop, long", begin=stop, end=go_on, lasts_s=HUB_SILENT_S + 3.0,
              answer_s=HUB_SILENT_S + UNHEARD_S, weight=1, **hub),
        Fault(name="cut", begin=lambda world, _: world.link(up=False), lasts_s=LONG_S,
              end=lambda world, _: world.link(up=True), weight=4, **link),
        Fault(name="cut, long", begin=lambda world, _: world.link(up=False), lasts_s=HUB_SILENT_S + 3.0,
              end=lambda world, _: world.link(up=True), weight=1, **link),
        Fault(name="lossy", begin=_flap, lasts_s=FLAP_S + 0.5, weight=4, **{**link, "answer_s": FLAP_S + dead}),
        Fault(name="a named job beside", of="job", begin=_second_job, answer_s=dead),
        Fault(name="a trainer in a taken place", of="job", begin=_intruder, answer_s=dead),
    ]  # fmt: skip


TABLE = _table()


def draw(world: World, usual_s: float, *, links: bool) -> Strike:
    """One fault, its victim, and its moment: most often while an update goes on."""
    rng = world.rng
    table = [fault for fault in TABLE if links or fault.of != "link"]
    (fault,) = rng.choices(table, [fault.weight for fault in table])
    pool = {"server": world.servers, "trainer": world.trainers}.get(fault.of, [])
    victim = rng.choice(pool) if pool else None
    delay_s = rng.uniform(0.0, 1.3 * usual_s) if rng.random() < 0.8 else -rng.uniform(0.05, 1.0)
    return Strike(fault=fault, victim=victim, delay_s=-0.05 if fault.armed else delay_s)
