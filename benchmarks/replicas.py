"""What it costs to compare what trainer ranks hold: updates of a model that two of them hold whole.

    python benchmarks/replicas.py --before CHECKOUT --json benchmarks/results/replicas.json

``--before`` names another checkout of weightbus, with its extensions compiled in place, to compare with. Each
version has a set of processes of its own, with a hub of its own: two trainer ranks that hold the whole model,
and server ranks. Both sets stay up side by side, and one that is not being timed waits in reads.
On the CPU: one server rank, by broadcast (gloo) and by the peer route (shared memory). With two GPUs, by the
peer route: trainer ranks on GPU 0 and 1, and one server rank, on GPU 1, or two halves of a tensor-parallel one,
on GPU 0 and 1. The whole model fits: GPU 1 holds at most four copies of it, 65.5 GB of Qwen3-8B.
The cases that begin with ``one source`` have a single trainer rank: what else has changed since shows there.

Bits first: a replica that differs in one bit is refused with nothing written (of the version before, this is
not asked), then the first update is compared with what was drawn, and the last one again. Rounds are pairs, the
order within them alternates. Timed is from the call of the trainer rank that calls last to the commit. Ratios
are of medians, with the interval that holds 95 % of the ratios of resampled pairs. ``CPU ms`` is what all ranks
of the set took together of all cores, ``others`` how many cores other processes of the machine took meanwhile:
of several runs, the one with the least of it is to be kept.
Exits with 1 if a bit was wrong, or if verified updates surely take over 2 % longer than before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from rich.console import Console
from rich.table import Table
from shapes import MODELS
from timing import timings
from update import free_ports

HERE = Path(__file__).parent
MOST_LONGER = 1.02
WARMUP = 2
UPDATES = {"update": False, "update, verified": True}
DIFFERENT = "trainer ranks hold different bytes"


@dataclass(frozen=True, kw_only=True)
class Case:
    """trainers, servers: the device of each rank."""

    name: str
    route: str
    trainers: tuple[str, ...]
    servers: tuple[str, ...]


def cases() -> list[Case]:
    if torch.cuda.device_count() < 2:
        cpu = ("cpu", "cpu")
        return [
            Case(name="broadcast", route="broadcast", trainers=cpu, servers=("cpu",)),
            Case(name="peer", route="peer", trainers=cpu, servers=("cpu",)),
            Case(name="peer, halves", route="peer", trainers=cpu, servers=cpu),
            Case(name="one source, broadcast", route="broadcast", trainers=cpu[:1], servers=("cpu",)),
            Case(name="one source, peer", route="peer", trainers=cpu[:1], servers=("cpu",)),
        ]
    both = ("cuda:0", "cuda:1")
    return [
        Case(name="peer", route="peer", trainers=both, servers=("cuda:1",)),
        Case(name="peer, halves", route="peer", trainers=both, servers=both),
        Case(name="one source, broadcast", route="broadcast", trainers=both[:1], servers=both[1:]),
        Case(name="one source, peer", route="peer", trainers=both[:1], servers=both[1:]),
    ]


class Process:
    """A replica_rank.py with the ``weightbus`` of a checkout."""

    def __init__(self, checkout: Path, **which: Any) -> None:
        path = os.pathsep.join([str(checkout), str(HERE), os.environ.get("PYTHONPATH", "")])
        # From the folder of benchmarks, which is first on the path then, and has no weightbus.
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import replica_rank; replica_rank.main()"],
            cwd=HERE,
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.tell("be", **which)

    def tell(self, what: str, **arguments: Any) -> None:
        print(json.dumps({"do": what, **arguments}), file=self._process.stdin, flush=True)

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 - opened with one
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a rank has failed, exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        assert self._process.stdin is not None  # noqa: S101 - as above
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Side:
    """The processes of one version in one case."""

    def __init__(self, name: str, checkout: Path, case: Case, model: str, ports: list[int]) -> None:
        self.name, self.checkout, self.case = name, checkout, case
        self.version = 0
        self.seconds: dict[str, list[float]] = {what: [] for what in UPDATES}
        self.cpu_s: dict[str, list[float]] = {what: [] for what in UPDATES}
        self.stages: dict[str, list[dict[str, float]]] = {what: [] for what in UPDATES}
        self._address = f"tcp://127.0.0.1:{ports[0]}"
        store = f"tcp://127.0.0.1:{ports[1]}"
        self.trainers, self.servers = (
            [
                Process(
                    checkout,
                    role=role,
                    rank=rank,
                    size=len(devices),
                    device=device,
                    model=model,
                    store=store,
                )
                for rank, device in enumerate(devices)
            ]
            for role, devices in (("trainer", case.trainers), ("server", case.servers))
        )
        self.all = [*self.trainers, *self.servers]

    def open(self) -> int:
        """Bytes of the model. Its processes have begun before, at once with the other side's."""
        for process in self.all:
            process.hear()
        found = self.ask(self.all, "open", address=self._address, route=self.case.route)
        for answer in found:
            if Path(answer["weightbus"]).resolve() != (self.checkout / "weightbus").resolve():
                raise SystemExit(
                    f"{self.name}: expected weightbus of {self.checkout}, got {answer['weightbus']}"
                )
        return int(found[0]["nbytes"])

    def ask(self, processes: list[Process], what: str, **arguments: Any) -> list[dict[str, Any]]:
        for process in processes:
            process.tell(what, **arguments)
        return [process.hear() for process in processes]

    def update(self, verify: bool) -> list[dict[str, Any]]:
        """What each rank says, trainer ranks first."""
        self.version += 1
        return self.ask(self.all, "update", version=self.version, verify=verify)

    def refuses(self) -> bool:
        """Whether an update of replicas that differ in one bit is refused, with nothing written."""
        self.ask(self.trainers[-1:], "flip")
        told = self.update(True)[: len(self.trainers)]
        self.ask(self.trainers[-1:], "flip")
        refused = all(t.get("error") == "UpdateError" and DIFFERENT in t["text"] for t in told)
        return refused and not sum(answer["written"] for answer in self.ask(self.servers, "compare"))

    def wrong(self) -> int:
        return sum(answer["wrong"] for answer in self.ask(self.servers, "compare"))

    def time(self, what: str, *, keep: bool) -> None:
        everyone = self.update(UPDATES[what])
        told = everyone[: len(self.trainers)]
        expected = ("verified" if UPDATES[what] else "unverified", self.case.route)
        if any((t.get("word"), t.get("route")) != expected for t in told):
            raise SystemExit(f"{self.name}: expected {expected}, got {told}")
        if keep:
            last = min(told, key=lambda t: t["seconds"])
            self.seconds[what].append(last["seconds"])
            self.stages[what].append(last["stages"])
            self.cpu_s[what].append(sum(t["cpu_s"] for t in everyone))

    def end(self) -> None:
        for process in self.all:
            process.end()


def busy_s() -> float:
    """Seconds that all cores of this machine have been busy."""
    first = Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, _, _, irq, softirq, *_ = map(int, first.split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(case: Case, sides: list[Side], pairs: int) -> list[dict[str, Any]]:
    (nbytes,) = {side.open() for side in sides}
    facts: dict[str, dict[str, Any]] = {side.name: {} for side in sides}
    if len(case.trainers) > 1:
        facts["now"]["refuses_a_replica_that_differs"] = sides[-1].refuses()
    for side in sides:
        side.update(True)
        facts[side.name]["wrong"] = side.wrong()
        for _ in range(WARMUP):
            for what in UPDATES:
                side.time(what, keep=False)
    began, busy = time.monotonic(), busy_s()
    for pair in range(pairs):
        for what in UPDATES:
            for side in sides if pair % 2 == 0 else sides[::-1]:
                side.time(what, keep=True)
    own = sum(sum(spent) for side in sides for spent in side.cpu_s.values())
    others = (busy_s() - busy - own) / (time.monotonic() - began)
    for side in sides:
        facts[side.name]["wrong"] += side.wrong()
        side.ask(side.all, "close")
    return [
        {"case": case.name, "what": what, "code": side.name, "nbytes": nbytes, **facts[side.name]}
        | {"servers": len(case.servers), "others_cores": others}
        | ratio(timings(side.seconds[what], sides[0].seconds[what]), compared=len(sides) > 1)
        | cpu(side.cpu_s[what], sides[0].cpu_s[what], compared=len(sides) > 1)
        | {"stages_s": medians(side.stages[what]), "seconds": side.seconds[what]}
        for what in UPDATES
        for side in sides
    ]


def ratio(found: dict[str, Any], *, compared: bool) -> dict[str, Any]:
    """With its baseline's name."""
    of, interval = found.pop("of_raw"), found.pop("of_raw_95")
    return found | ({"of_before": of, "of_before_95": interval} if compared else {})


def cpu(spent: list[float], baseline: list[float], *, compared: bool) -> dict[str, Any]:
    """The same of what all ranks took of the cores, on which other processes tell less."""
    found = ratio(timings(spent, baseline), compared=compared)
    del found["rounds"]
    return {f"cpu_{name}": value for name, value in found.items()} | {"cpu_s": spent}


def medians(stages: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(stage.get(name, 0.0) for stage in stages) for name in stages[0]}


def show(model: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{model}, {rows[0]['nbytes'] / 1e9:.2f} GB, {rows[0]['case']}")
    for column in ("case", "what", "code"):
        table.add_column(column)
    for column in ("p50 ms", "p99 ms", "of before", "95 %", "CPU ms", "of before", "95 %", "others", "#wrong"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["case"],
            row["what"],
            row["code"],
            f"{row['p50_s'] * 1e3:.2f}",
            f"{row['p99_s'] * 1e3:.2f}",
            *compared(row, "of_before"),
            f"{row['cpu_p50_s'] * 1e3:.0f}",
            *compared(row, "cpu_of_before"),
            f"{row['others_cores']:.2f}",
            str(row["wrong"]),
        )
    Console(width=150).print(table)
    for row in rows:
        stages = ", ".join(f"{k} {v * 1e3:.2f}" for k, v in row["stages_s"].items())
        print(f"{row['case']}, {row['what']}, {row['code']}: stages, ms: {stages}")


def compared(row: dict[str, Any], of: str) -> tuple[str, str]:
    """A ratio and its interval, for the table; nothing for the baseline itself."""
    if row["code"] == "before" or of not in row:
        return "", ""
    low, high = row[f"{of}_95"]
    return f"{row[of]:.3f}", f"{low:.3f} to {high:.3f}"


def passed(rows: list[dict[str, Any]]) -> bool:
    bits = all(not row["wrong"] and row.get("refuses_a_replica_that_differs", True) for row in rows)
    longer = [r for r in rows if UPDATES[r["what"]] and r.get("of_before_95", (0.0,))[0] > MOST_LONGER]
    return bits and not longer


def main() -> int:
    on_cpu = torch.cuda.device_count() < 2
    names = [case.name for case in cases()]
    parser = argparse.ArgumentParser(description="updates of a model that two trainer ranks hold, and before")
    parser.add_argument("--before", metavar="CHECKOUT", type=Path, help="another checkout, to compare with")
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b" if on_cpu else "qwen3-8b")
    parser.add_argument("--cases", nargs="+", choices=names, default=names[:2])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write the result")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    checkouts = {"now": HERE.parent}
    more: dict[str, Any] = {"model": args.model, "pairs": args.pairs, "load_at_start": os.getloadavg()[0]}
    if args.before:
        checkouts = {"before": args.before.resolve(), **checkouts}
        more["before"] = os.environ.get("WEIGHTBUS_COMMIT_BEFORE") or record.commit_of(args.before)
    rows: list[dict[str, Any]] = []
    for case in cases():
        if case.name not in args.cases:
            continue
        sides = [Side(name, path, case, args.model, free_ports(2)) for name, path in checkouts.items()]
        try:
            found = measure(case, sides, args.pairs)
        finally:
            for side in sides:
                side.end()
        show(args.model, found)
        rows += found
        record.write(args.json, "replicas", rows, **more)  # each time: a later case may be cut off
    return 0 if passed(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
