"""A fault after each step of an update, on each role: python crash_points.py [--every N] [--out result.json]

The processes are those of ``chaos.py``, and so is what must hold (``chaos_judge.py``). A rank hurts itself once
it has sent or heard a message, or in a callback; the hub as it enters a phase, or has told one rank of the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chaos_ranks as ranks
from chaos import Chaos, machine
from chaos_faults import HUB_SILENT_S, LONG_S, UNHEARD_S, Fault, Strike
from chaos_world import Rank, World, world
from processes import start_python

from weightbus.control.start import listens

STEPS = {
    "trainer": (
        "sent enter", "heard offer", "sent facts", "heard sources", "heard wants", "sent ready", "heard go",
        "progress", "sent done", "heard outcome",
    ),
    "server": (
        "heard offer", "on_update", "heard sources", "sent facts", "heard wants", "sent ready", "heard go",
        "hook", "sent done", "heard outcome", "on_commit",
    ),
    "hub": ("ENTER", "SOURCES", "WANTS", "READY", "RUN", "COMMIT", "LAST"),
}  # fmt: skip
FAULTS: dict[str, int | str] = {
    "kill": int(signal.SIGKILL),
    "stop": int(signal.SIGSTOP),
    "raise": "raise",
    "interrupt": int(signal.SIGINT),
}
VICTIMS = {"trainer": 1, "server": 3}  # trainer rank 1; rank 1 of replica 1
DYING_HUB = Path(__file__).with_name("dying_hub.py")


@dataclass(frozen=True, kw_only=True)
class Point:
    role: str
    step: str
    fault: str


def points() -> list[Point]:
    return [
        Point(role=role, step=step, fault=fault)
        for role, steps in STEPS.items()
        for step in steps
        for fault in FAULTS
        # At LAST it has kept an outcome to itself, as only one can that does not go on.
        if role != "hub" or fault == "kill" or (fault == "stop" and step != "LAST")
    ]


def strike_of(point: Point, victim: Rank | None, go_on: Callable[[], None] | None = None) -> Strike:
    """What the driver does for it: tell the victim beforehand, and let one that was stopped go on afterwards.

    go_on: for a hub of the driver's own.
    """
    do, stops = FAULTS[point.fault], point.fault == "stop"

    def begin(world: World, victim: Rank | None) -> None:
        if victim is not None:
            victim.fired.clear()
            victim.tell("plan", {"at": point.step, "do": do})
            victim.stopped = stops

    def end(world: World, victim: Rank | None) -> None:
        if victim is not None:
            victim.signal(signal.SIGCONT)
            victim.tell("plan", {})
        elif go_on is not None:
            go_on()

    trainer = ranks.DEAD_AFTER_S if point.fault in ("raise", "interrupt") else ranks.JOIN_S
    answer_s = {"trainer": trainer, "server": ranks.DEAD_AFTER_S, "hub": UNHEARD_S}[point.role]
    fault = Fault(
        name=f"{point.fault} after {point.step}",
        of=point.role,  # type: ignore[arg-type]
        answer_s=answer_s,
        begin=begin,
        end=end,
        lasts_s=LONG_S if stops else 0.0,
        own_s=None if stops else UNHEARD_S,
    )
    return Strike(fault=fault, victim=victim, delay_s=-0.05)


def row_of(chaos: Chaos, point: Point, strike: Strike, broken: int) -> dict[str, Any]:
    """Of one point: how it ended for all others, when, and for the victim."""
    call, victim = chaos.judge.call, strike.victim
    assert call is not None, "it has been made"
    others = [answer for name, answer in call.answers.items() if victim is None or name != victim.name]
    told = call.report
    served = [r.seen.get("state", "") for r in chaos.world.servers if r.alive and r is not victim]
    own = victim.seen.get("state") or call.answers.get(victim.name, {}).get("kind") if victim else None
    return {
        "role": point.role,
        "step": point.step,
        "fault": point.fault,
        "update": "ok" if call.ok else next((answer["kind"] for answer in others), "none"),
        "replicas": told.get("replicas", []),
        "answer_s": round(max((a["ended"] - call.began for a in others), default=0.0), 3),
        "others": sorted(set(served)),
        "victim": (own or "") if victim and victim.alive else "ended" if victim else "",
        "broken": chaos.judge.broken[broken:],
    }


def take(chaos: Chaos, point: Point) -> dict[str, Any]:
    """One point of a rank's, and the calm update after it, which is part of what must hold."""
    members = {"trainer": chaos.world.trainers, "server": chaos.world.servers}[point.role]
    victim = members[VICTIMS[point.role]]
    strike, broken = strike_of(point, victim), len(chaos.judge.broken)
    chaos.call("update", [strike], all={"replan": True})
    if point.step not in victim.fired:
        chaos.judge.breaks(f"{point}: it has not fired")
    row = row_of(chaos, point, strike, broken)
    chaos.mend([strike])
    return row | after(chaos, broken)


def after(chaos: Chaos, broken: int) -> dict[str, Any]:
    """The next update, and then as many as it takes until all replicas are in again: a few seconds."""
    following = chaos.calm()
    until = time.monotonic() + 20.0
    while chaos.judge.inside != {0, 1} and time.monotonic() < until:
        chaos.calm()
        time.sleep(0.5)
    if chaos.judge.inside != {0, 1}:
        chaos.judge.breaks(f"still left out after 20 s: {chaos.judge.out}")
    return {"next": "ok" if following.ok else "lost", "broken": chaos.judge.broken[broken:]}


class HubOfItsOwn:
    """A hub that hurts itself, in place of one that the trainer starts."""

    def __init__(self, address: str, point: Point, version: int) -> None:
        self.process: subprocess.Popen[Any] = start_python(
            DYING_HUB, address, version, point.step, int(FAULTS[point.fault]), env=dict(os.environ)
        )
        while not listens(address):
            time.sleep(0.05)

    def go_on(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)


def take_hub(rng: random.Random, point: Point) -> tuple[dict[str, Any], Chaos]:
    """One point of the hub's, in a world of its own."""
    made = World(rng, links=False)
    hub = HubOfItsOwn(made.address, point, version=2)
    try:
        made.start_trainers()
        made.start_servers()
        chaos = Chaos(made, rng, links=False)
        if late := made.mend():
            chaos.judge.breaks(late)
        chaos.call()
        strike = strike_of(point, None, hub.go_on)
        chaos.call("update", [strike], all={"replan": True})
        row = row_of(chaos, point, strike, 0)
        chaos.mend([strike])
        row |= after(chaos, 0)
        chaos.judge.stalls.close()
        return row, chaos
    finally:
        made.close()
        hub.end()


def run(chosen: list[Point], seed: int = 1) -> list[dict[str, Any]]:
    rng = random.Random(seed)  # noqa: S311 - drawn again from its seed
    rows = []

    def told(row: dict[str, Any]) -> None:
        rows.append(row)
        print({key: value for key, value in row.items() if key != "broken" or value}, flush=True)

    of_ranks = [point for point in chosen if point.role != "hub"]
    if of_ranks:
        with world(rng, links=False) as made:
            chaos = Chaos(made, rng, links=False)
            if late := made.mend():
                chaos.judge.breaks(late)
            for _ in range(2):
                chaos.calm()
            for point in of_ranks:
                before = len(chaos.judge.broken)
                told(take(chaos, point))
                if len(chaos.judge.broken) > before:
                    chaos.trail()
            chaos.judge.stalls.close()
    for point in chosen:
        if point.role == "hub":
            row, chaos = take_hub(rng, point)
            told(row)
            if row["broken"]:
                chaos.trail()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only each N-th point")
    parser.add_argument("--only", default="", help="only points of which this is a part: 'hub RUN kill'")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chosen = [p for p in points() if options.only in f"{p.role} {p.step} {p.fault}"][:: options.every]
    begun = time.monotonic()
    rows = run(chosen)
    broken = [line for row in rows for line in row["broken"]]
    if options.out:
        found = {
            "what": "a fault after each step of an update, over gloo: 2 trainer ranks, 2 replicas of 2 ranks",
            **machine(),
            "deadlines_s": {
                "join": ranks.JOIN_S, "ready": ranks.READY_S, "transfer": ranks.TRANSFER_S,
                "dead_after": ranks.DEAD_AFTER_S, "hub_silent": HUB_SILENT_S, "unheard": UNHEARD_S,
                "stopped_for": LONG_S,
            },
            "seconds": round(time.monotonic() - begun, 1),
            "rows": rows,
        }  # fmt: skip
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(rows)} points, {len(broken)} broken promises")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
