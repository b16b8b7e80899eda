"""What must hold in a chaos run, whatever is done to it; each thing that did not is a line in ``broken``."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import chaos_ranks as ranks
from chaos_faults import HUB_SILENT_S, UNHEARD_S, Strike
from chaos_world import Rank, Stalls, World

MARGIN_S = 2.0 * ranks.SLOW  # beyond a deadline
SETTLE_S = 3.0 * ranks.SLOW  # for an outcome to be heard by all
CLOSINGS = ("commit", "torn", "refused")
LEVELS = ("threads", "fds")
GIVEN_UP_S = ranks.TRANSFER_S + 1.0  # gloo has then given up what could not be made


@dataclass(kw_only=True)
class Call:
    """One call of all trainer ranks. strikes: the faults that hit it."""

    what: str
    version: int
    strikes: list[Strike]
    began: float
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return any(answer["kind"] == "ok" for answer in self.answers.values())

    @property
    def report(self) -> dict[str, Any]:
        return next((a for a in self.answers.values() if a["kind"] == "ok"), {})

    @property
    def last(self) -> float:
        """When its last answer came."""
        return max((answer["ended"] for answer in self.answers.values()), default=self.began)

    def __str__(self) -> str:
        faults = "; ".join(strike.text for strike in self.strikes) or "calm"
        return f"{self.what} {self.version} ({faults})"


class Judge:
    """Of one run. An episode begins with the faults of one call, and goes on through the calm ones after it."""

    def __init__(self, world: World) -> None:
        self.world, self.stalls = world, Stalls()
        self.broken: list[str] = []
        self.call: Call | None = None
        self.version = 0
        self.struck: list[Strike] = []  # of this episode
        self.lost = self.since = 0  # of its calls: that failed; that began after its faults
        self.inside: set[int] = set()  # replicas that have the last version
        self.out: set[int] = set()  # that may be left out, for what has been done to them
        self.torn_before: set[int] = set()
        self.began = time.monotonic()
        self.callbacks: dict[int, str] = {}
        self.levels: dict[int, list[dict[str, int]]] = {}
        self.answers: dict[str, list[float]] = {}
        self.counts: Counter[str] = Counter()

    def breaks(self, what: str) -> None:
        line = f"{time.monotonic() - self.began:.1f} s, {self.call}: {what}"
        self.broken.append(line)
        print(f"BROKEN {line}", flush=True)

    # -- what may be expected ------------------------------------------------------------------------

    @property
    def hurt(self) -> list[Rank]:
        return [strike.victim for strike in self.struck if strike.victim]

    @property
    def hurt_replicas(self) -> set[int]:
        far = {1} if any(strike.fault.of == "link" for strike in self.struck) else set()
        return far | {rank.replica for rank in self.hurt if rank.replica is not None}

    def is_hurt(self, rank: Rank) -> bool:
        return rank in self.hurt or (rank.replica == 1 and 1 in self.hurt_replicas and not self._only_ranks())

    def _only_ranks(self) -> bool:
        return all(strike.fault.of != "link" for strike in self.struck)

    def may_lose_hub(self) -> bool:
        return any(strike.fault.of == "hub" for strike in self.struck)

    def limit_s(self) -> float:
        """Within which calls end, from the last fault or the call, whichever was later."""
        answer_s = max([strike.fault.answer_s for strike in self.struck], default=ranks.DEAD_AFTER_S)
        return answer_s + MARGIN_S

    def names(self) -> tuple[str, ...]:
        """By which an error may begin, for what has been done."""
        by_link = ("replica 1 ",) if 1 in self.hurt_replicas and not self._only_ranks() else ()
        hub = ("hub",) if self.may_lose_hub() else ()
        own = [f"{rank.name}{end}" for rank in self.hurt for end in (":", " (")]
        return (*own, *by_link, *hub)

    def strike(self, strikes: list[Strike]) -> None:
        self.struck, self.lost, self.since = strikes, 0, 0
        self.torn_before = self.torn()
        self.counts.update(strike.fault.of + " " + strike.fault.name for strike in strikes)

    def torn(self) -> set[int]:
        """Replicas of which a rank is torn."""
        ranks_ = [rank for rank in self.world.servers if rank.alive and rank.seen.get("state") == "torn"]
        return {rank.replica for rank in ranks_ if rank.replica is not None}

    # -- as it goes ------------------------------------------------------------------------------------

    def saw(self, rank: Rank, seen: dict[str, Any]) -> None:
        """A server rank has said something."""
        if seen["wrong"]:
            self.breaks(f"{rank.name} is ready at version {seen['version']} with wrong bits: {seen['wrong']}")
        stalled = self.stalls.since(time.monotonic() - seen["took"] - 1.0)
        hurt, own = self.is_hurt(rank), [s.fault.own_s for s in self.struck if s.fault.own_s is not None]
        limit = max(own, default=None) if hurt else self.limit_s() - MARGIN_S
        if limit is not None and seen["took"] > limit + MARGIN_S + stalled:
            took = f"a poll of {rank.name} took {seen['took']:.1f} s"
            self.breaks(f"{took}, expected at most {limit:.1f} + {MARGIN_S:.0f}")
        for name in seen["calls"]:
            before = self.callbacks.get(rank.pid, "")
            if (name == "update") == (before == "update"):
                self.breaks(f"{rank.name}: {name} was called after {before or 'nothing'}")
            self.callbacks[rank.pid] = name

    def judge(self, call: Call) -> None:
        """Once all answers are there, and the server ranks have settled."""
        self.version = call.version
        healthy = [rank for rank in self.world.trainers if not self.is_hurt(rank) and rank.name in call.answers]
        for rank in healthy:
            self._in_time(call, rank)
            self._named(call, call.answers[rank.name])
        words = {call.answers[rank.name]["kind"] for rank in healthy}
        if len(words) > 1:
            self.breaks(f"trainer ranks have heard different ends: {call.answers}")
        if call.what == "update":
            self._states(call)
            self._left_out(call)
        if not call.ok:
            self.lost += 1
            if self.lost > len(self.struck):
                self.breaks(f"{self.lost} calls were lost by {len(self.struck)} faults: {self._texts(call)}")
        if not call.strikes:
            self.since += 1
            for replica in self.torn() - self.hurt_replicas - self.torn_before - self.out:
                if self.since > 1 or call.ok:
                    self.breaks(f"replica {replica}, to which nothing was done, is torn after a calm update")
        if call.ok and call.what == "update":
            self.inside = set(call.report["replicas"])
            self.out = (self.out | self.hurt_replicas) - self.inside
            self._usage()

    def _texts(self, call: Call) -> str:
        return " | ".join(f"{name}: {a['kind']} {a['text']}" for name, a in call.answers.items())

    def _in_time(self, call: Call, rank: Rank) -> None:
        answer = call.answers[rank.name]
        hit = [strike.began for strike in call.strikes if strike.done and strike.fault.answer_s]
        begun = max([answer["began"], *(moment for moment in hit if moment < answer["ended"])])
        took, limit = answer["ended"] - begun, self.limit_s() + self.stalls.since(answer["began"])
        for strike in call.strikes:
            self.answers.setdefault(f"{strike.fault.of} {strike.fault.name}", []).append(max(0.0, took))
        if took > limit:
            text = answer["text"][:500]
            self.breaks(f"{rank.name} had its answer after {took:.1f} s, expected {limit:.1f}: {text}")

    def _named(self, call: Call, answer: dict[str, Any]) -> None:
        if answer["kind"] in ("ok", "interrupted"):
            return
        if answer["kind"] == "HubError" and self.may_lose_hub():
            return
        lines = answer["text"].splitlines()
        first = lines[1].strip() if len(lines) > 1 else answer["text"]
        if not first.startswith(self.names() or ("nobody",)):
            self.breaks(f"expected {self.names() or 'no failure'}, got {answer['kind']}: {answer['text']}")

    def _left_out(self, call: Call) -> None:
        more = {int(replica) for replica in call.report.get("left_out", {})} - self.hurt_replicas - self.out
        if more:
            self.breaks(f"replicas {sorted(more)} are left out by another's fault: {call.report}")

    def _states(self, call: Call) -> None:
        """What the server ranks say of this version, beside what the trainer ranks say."""
        told, version = call.report, call.version
        known = bool(call.answers) and all(a["kind"] != "interrupted" for a in call.answers.values())
        for rank in self.world.servers:
            state, has, error = (rank.seen.get(key) for key in ("state", "version", "error"))
            if not rank.alive or not rank.seen:
                continue
            has_it = state == "ready" and has == version
            listed = rank.replica in told.get("replicas", [])
            if told and listed and not has_it and not self.is_hurt(rank):
                self.breaks(f"false report: {rank.name} should have {version}, is {state} {has}: {error}")
            caught_up = rank.replica in told.get("left_out", {})  # since then
            if has_it and told and not listed and not caught_up:
                self.breaks(f"false report: {rank.name} has {version}, is not in {told}")
            if has_it and known and not told:
                self.breaks(f"false report: {rank.name} has {version}, which failed: {self._texts(call)}")
            kinds = {a["kind"] for a in call.answers.values()}
            tore = state == "torn" and str(error).startswith(f"version {version}:")
            if tore and kinds == {"UpdateError"} and not self.is_hurt(rank):
                self.breaks(f"false report: {rank.name} is torn by {version}: {self._texts(call)}")
            if state == "updating" and not rank.stopped and not self.is_hurt(rank):
                self.breaks(f"{rank.name} is still updating to {version}")

    def settled(self, call: Call) -> bool:
        """Whether each server rank that nothing was done to has heard the end."""
        told = call.report
        for rank in self.world.servers:
            if not rank.alive or self.is_hurt(rank) or not rank.seen:
                continue
            state, has = rank.seen.get("state"), rank.seen.get("version")
            if told and rank.replica in told.get("replicas", []) and (state, has) != ("ready", call.version):
                return False
            if state == "updating":
                return False
        return True

    def settle_s(self) -> float:
        hub = UNHEARD_S + HUB_SILENT_S if self.may_lose_hub() else 0.0
        return SETTLE_S + hub

    # -- levels ----------------------------------------------------------------------------------------

    def _usage(self) -> None:
        """After an update that all replicas have: threads and descriptors as in the process's first ones."""
        if self.inside != set(range(ranks.REPLICAS)) or (self.struck and not self.since):
            return
        used = [(rank.name, rank.pid, rank.usage[-1]) for rank in self.world.members if rank.usage]
        with contextlib.suppress(OSError):
            used += [("hub", pid, ranks.usage(pid)) for pid in self.world.hub_pids()]
        for name, pid, usage in used:
            levels = self.levels.setdefault(pid, [])
            levels.append(usage | {"update": self.version, "second": int(time.monotonic())})
            base = levels[: min(3, len(levels))]
            late = levels[-1]["second"] - GIVEN_UP_S
            for what in LEVELS:
                allowed = max(level[what] for level in base) + 2
                since = next((n for n, level in enumerate(levels[::-1]) if level[what] <= allowed), len(levels))
                if since > 1 and levels[-since]["second"] < late:
                    self.breaks(f"{name} has {levels[-1][what]} {what}, expected at most {allowed}")

    def growth(self) -> list[float]:
        """MB in 100 updates, of each process that has seen 60 of them after its first 20: how far the least of
        the last third of this time is above the least of its first."""
        grown = []
        for levels in self.levels.values():
            later = [level for level in levels if level["update"] >= levels[0]["update"] + 20]
            if not later or (span := later[-1]["update"] - later[0]["update"]) < 60:
                continue
            begun = later[0]["update"]
            first = [level["rss_kib"] for level in later if level["update"] < begun + span / 3]
            last = [level["rss_kib"] for level in later if level["update"] > begun + 2 * span / 3]
            grown.append((min(last) - min(first)) * 1.024e-3 / (2 / 3 * span) * 100)
        return grown
