"""Random faults: python chaos.py --seed 1 --seconds 100 [--updates N] [--links] [--out result.json]

Two trainer ranks, two replicas of two ranks, real processes over gloo, and a hub that the trainer starts. Each
episode hurts one or two of them before or in an update, puts right what was hurt, and updates again in calm.
``chaos_faults.py`` is the table of faults, ``chaos_judge.py`` what must hold. Exit status 1 if anything did
not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chaos_ranks as ranks
import namespaces
import torch
from chaos_faults import HANG_S, HUB_SILENT_S, UNHEARD_S, Strike, draw
from chaos_judge import Call, Judge
from chaos_world import Rank, World, world

ROOT = Path(__file__).resolve().parents[2]
HARD_S = 90.0 * ranks.SLOW  # no call is waited for longer, whatever was done
TRAIL = 60


class Chaos:
    def __init__(self, world: World, rng: random.Random, *, links: bool) -> None:
        self.world, self.rng, self.links = world, rng, links
        self.judge = Judge(world)
        world.on_seen = self.judge.saw
        self.version = self.lost = self.updates = 0
        self.usual_s = 0.1

    # -- one call --------------------------------------------------------------------------------------

    def call(self, what: str = "update", strikes: list[Strike] | None = None, **each: Any) -> Call:
        """All trainer ranks call at once, while the strikes fall. each: further arguments by rank's name."""
        strikes = sorted(strikes or [], key=lambda strike: strike.delay_s)
        self.version += 1
        if strikes:
            self.judge.strike(strikes)
        call = Call(what=what, version=self.version, strikes=strikes, began=time.monotonic())
        self.judge.call = call
        for strike in [strike for strike in strikes if strike.delay_s < 0]:
            strike.begin(self.world)
            self._hear_for(-strike.delay_s)
        call.began = time.monotonic()
        for rank in self.world.trainers:
            rank.answers.clear()
            rank.tell(what, {"version": self.version, **each.get(rank.name, {}), **each.get("all", {})})
        self._follow(call, lambda rank: rank.stopped)
        for strike in strikes:
            if not strike.done:
                strike.begin(self.world)
        self._wait(lambda: self._end_due(call) or self.judge.settled(call), self.judge.settle_s())
        for strike in strikes:
            self._hear_for(strike.left_s)
            strike.end(self.world)
        self._follow(call, lambda rank: False)
        self._wait(lambda: self.judge.settled(call), self.judge.settle_s())
        self.judge.judge(call)
        self.updates += what == "update"
        self.lost += what == "update" and not call.ok
        return call

    def _follow(self, call: Call, skips: Callable[[Rank], bool]) -> None:
        """Until each trainer rank has answered, that lives and is not skipped."""
        deadline = time.monotonic() + HARD_S
        while True:
            for strike in call.strikes:
                if not strike.done and time.monotonic() >= call.began + strike.delay_s:
                    strike.begin(self.world)
            self._end_due(call)
            for rank in self.world.trainers:
                if rank.answers:
                    call.answers[rank.name] = rank.answers[-1]
            waiting = [
                rank
                for rank in self.world.trainers
                if rank.alive and not skips(rank) and rank.name not in call.answers
            ]
            if not waiting:
                return
            if time.monotonic() > deadline:
                self.judge.breaks(f"hang: {[rank.name for rank in waiting]} have no answer after {HARD_S} s")
                for rank in waiting:
                    rank.signal(signal.SIGKILL)
                return
            self.world.hear(0.005 if any(not strike.done for strike in call.strikes) else 0.02)

    def _end_due(self, call: Call) -> None:
        """End what lasts a time of its own, once that is over."""
        for strike in call.strikes:
            if strike.done and strike.fault.lasts_s and not strike.left_s:
                strike.end(self.world)

    def _hear_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.world.hear(min(left, 0.02))

    def _wait(self, done: Callable[[], bool], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not done() and time.monotonic() < until:
            self.world.hear(0.02)
        return done()

    # -- one episode -----------------------------------------------------------------------------------

    def episode(self) -> None:
        strikes = [draw(self.world, self.usual_s, links=self.links)]
        if self.rng.random() < 0.12:
            strikes.append(draw(self.world, self.usual_s, links=self.links))
        call = self.call("update", strikes)
        self._others()
        self.mend(strikes)
        print(
            f"{self.updates} {call}: {'ok' if call.ok else 'lost'} {call.last - call.began:.2f} s", flush=True
        )
        for _ in range(self.rng.randint(1, 3)):
            self.calm()
        if self.rng.random() < 0.1:
            self.save(full=self.rng.random() < 0.7)

    def calm(self) -> Call:
        call = self.call()
        self.mend([])
        if call.ok:
            self.usual_s = 0.8 * self.usual_s + 0.2 * min(1.0, call.last - call.began)
        self._hear_for(self.rng.uniform(0.0, 0.3))
        return call

    def mend(self, strikes: list[Strike]) -> None:
        """What was hurt is whole again, and has heard what it has missed."""
        if late := self.world.mend():
            self.judge.breaks(late)
        hurt = [rank for rank in self.world.servers if self.judge.is_hurt(rank)]
        if strikes and not self._wait(
            lambda: all(rank.seen.get("state") != "updating" for rank in hurt if rank.alive),
            UNHEARD_S + HUB_SILENT_S + HANG_S,
        ):
            self.judge.breaks(f"still updating: {[(rank.name, rank.seen) for rank in hurt]}")
        self._wait(lambda: bool(self.world.hub_pids()), 5.0)

    def _others(self) -> None:
        """Other jobs end as they should."""
        for rank in self.world.others:
            self._wait(lambda rank=rank: bool(rank.answers), 30.0)  # type: ignore[misc]
            kind = rank.answers[-1]["kind"] if rank.answers else "no answer"
            text = rank.answers[-1]["text"] if rank.answers else ""
            good = kind in ("HubError", "UpdateError") if rank.name == "intruder" else kind == "ok"
            if not good and not self.judge.may_lose_hub():
                self.judge.breaks(f"{rank.name}: {kind} {text}")
            rank.end()
        self.world.others.clear()

    def save(self, *, full: bool) -> None:
        """A save of all trainer ranks; with a full disk on one, which all are told of by its name."""
        victim = self.rng.choice(self.world.trainers)
        path = os.path.join(self.world.folder, f"saved-{self.version}")
        self.judge.strike([])
        limits = {victim.name: {"limit": 64 << 10 if full else None}}
        call = Call(what="save", version=self.version, strikes=[], began=time.monotonic())
        self.judge.call = call
        for rank in self.world.trainers:
            rank.answers.clear()
            rank.tell("save", {"path": path, "version": self.version, **limits.get(rank.name, {})})
        self._follow(call, lambda rank: False)
        for name, answer in call.answers.items():
            told = victim.name in answer["text"] and "too large" in answer["text"]
            if answer["kind"] != ("UpdateError" if full else "ok") or (full and not told):
                self.judge.breaks(f"save, disk {'full' if full else 'free'}: {name}: {answer}")
            if answer["ended"] - answer["began"] > 5.0 * ranks.SLOW + self.judge.stalls.since(call.began):
                self.judge.breaks(f"save took {answer['ended'] - answer['began']:.1f} s")
        if full and os.path.exists(path):
            self.judge.breaks(f"a save that failed has left {os.listdir(path)}")
        shutil.rmtree(path, ignore_errors=True)
        self.judge.counts["disk full" if full else "disk free"] += 1

    def run(self, seconds: float, updates: int) -> None:
        begun = time.monotonic()
        if late := self.world.mend():
            self.judge.breaks(late)
        for _ in range(3):
            self.calm()
        while time.monotonic() - begun < seconds and self.updates < updates:
            before = len(self.judge.broken)
            self.episode()
            if len(self.judge.broken) > before:
                self.trail()

    def trail(self) -> None:
        """What was heard last, for whoever looks into a broken promise."""
        began = self.judge.began
        for when, name, what, said in self.world.events[-TRAIL:]:
            brief = {key: item for key, item in said.items() if key not in ("usage", "began", "ended") and item}
            print(f"    {when - began:8.3f} {name}: {what} {brief}", flush=True)
        self.world.events.clear()


def machine() -> dict[str, Any]:
    """Where and of what a run was."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603 - as above
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit,
    }


def result(chaos: Chaos, seed: int, seconds: float) -> dict[str, Any]:
    judge = chaos.judge
    times = {
        name: {"calls": len(took), "median_s": round(statistics.median(took), 3), "max_s": round(max(took), 3)}
        for name, took in sorted(judge.answers.items())
    }
    growth = judge.growth()
    return {
        "what": "random faults over gloo: 2 trainer ranks, 2 replicas of 2 ranks",
        **machine(),
        "seed": seed,
        "slow": ranks.SLOW,
        "links": chaos.links,
        "seconds": round(seconds, 1),
        "updates": chaos.updates,
        "lost": chaos.lost,
        "faults": dict(sorted(judge.counts.items())),
        "answers": times,
        "processes_watched_for_growth": len(growth),
        "growth_mb_per_100_updates": round(max(growth, default=0.0), 2),
        "stalled_s": round(judge.stalls.since(0.0), 1),
        "broken": judge.broken,
    }


def run(seed: int, seconds: float, updates: int = 1 << 30, *, links: bool) -> dict[str, Any]:
    rng, begun = random.Random(seed), time.monotonic()  # noqa: S311 - drawn again from its seed
    with world(rng, links=links) as made:
        chaos = Chaos(made, rng, links=links)
        try:
            chaos.run(seconds, updates)
        finally:
            chaos.judge.stalls.close()
        return result(chaos, seed, time.monotonic() - begun)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--updates", type=int, default=1 << 30)
    parser.add_argument("--links", action="store_true", help="replica 1 in a network namespace; needs root")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.links and (why := namespaces.why_not()):
        print(f"without links: {why}")
        options.links = False
    found = run(options.seed, options.seconds, options.updates, links=options.links)
    text = json.dumps(found, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 1 if found["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
