"""The demo: two jobs, a real model, and a judge that believes neither of them.

A trainer job (FSDP2) trains a pretrained sentence encoder and updates a server job (tensor parallelism,
random weights at first) after each step. This process compares what both then hold, bit for bit, without
weightbus, prints a table, and exits with 0 only if every step was verified.

    python examples/demo/run.py [--steps 5] [--timeout 240]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import job
import snapshot
import torch
from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.live import Live
from rich.table import Table

HERE = Path(__file__).parent
MAX_DIFFERENCE = 1e-5
AFTERMATH_S = 10.0
LEGEND = """\
step 0       before the first update
changed      weights that training changed since the step before
bit-equal    weights with the same bytes on trainer and servers
embeddings   largest difference between theirs and the trainer's
check        a second proof, of what servers hold live: time to digest it"""


class DemoError(Exception):
    """A step that was not verified, or a job that did not get that far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One step, as judged."""

    step: int
    facts: dict[str, str]
    weights: int
    changed: int | None
    equal: int
    difference: float

    @property
    def nbytes(self) -> int:
        return int(self.facts["nbytes"])

    def faults(self) -> list[str]:
        faults = []
        if self.step == 0:
            if self.equal:
                faults.append(f"before the first update: expected 0 equal weights, got {self.equal}")
            return faults
        if not self.facts["update"].startswith("verified"):
            faults.append(self.facts["update"])
        if not self.facts["check"].startswith("verified"):
            faults.append(f"check: {self.facts['check']}")
        if self.equal != self.weights:
            faults.append(f"expected {self.weights} bit-equal weights, got {self.equal}")
        if not self.difference <= MAX_DIFFERENCE:
            faults.append(f"embeddings: expected within {MAX_DIFFERENCE:g}, got {self.difference:.1e}")
        if not self.changed:
            faults.append("expected weights that training had changed, got none")
        return [f"step {self.step}: {fault}" for fault in faults]

    def cells(self) -> list[str]:
        equal = f"{self.equal} / {self.weights}"
        if self.step == 0:
            return ["0", "", "", "", "", equal, f"{self.difference:.1e}", "", ""]
        seconds = float(self.facts["seconds"])
        return [
            str(self.step),
            f"{float(self.facts['loss']):.3f}",
            str(self.changed),
            f"{seconds * 1e3:.0f} ms",
            f"{self.nbytes / seconds / 1e9:.2f}",
            equal,
            f"{self.difference:.1e}",
            f"{float(self.facts['check_seconds']) * 1e3:.0f} ms"
            if self.facts["check"].startswith("verified")
            else "[red]failed[/]",
            "[red]FAILED[/]" if self.faults() else "[green]verified[/]",
        ]


def table(rows: list[Row], caption: str) -> Table:
    view = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAVY, padding=(0, 1, 0, 0))
    for name, right in [
        ("step", True),
        ("loss", True),
        ("changed", True),
        ("update", True),
        ("GB/s", True),
        ("bit-equal", True),
        ("embeddings", True),
        ("check", True),
        ("verdict", False),
    ]:
        view.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        view.add_row(*row.cells())
    return view


def judge(folder: Path, step: int, before: snapshot.Snapshot | None) -> tuple[Row, snapshot.Snapshot]:
    trainer = snapshot.read(snapshot.path(folder, "trainer", step))
    servers = snapshot.read(snapshot.path(folder, "servers", step))
    changed = None if before is None else len(trainer.weights) - snapshot.count_equal(trainer, before)
    row = Row(
        step=step,
        facts=trainer.facts,
        weights=len(trainer.weights.keys() | servers.weights.keys()),
        changed=changed,
        equal=snapshot.count_equal(trainer, servers),
        difference=(trainer.embeddings - servers.embeddings).abs().max().item(),
    )
    return row, trainer


def ended(jobs: list[job.Job]) -> str:
    """How the jobs ended. One that fails takes the other with it, so both get a moment to end."""
    for one in jobs:
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(AFTERMATH_S)
    states = {one.name: one.process.poll() for one in jobs}
    return ", ".join(
        f"the {name} job " + ("still runs" if status is None else f"ended with exit status {status}")
        for name, status in states.items()
    )


def wait_for(files: list[Path], jobs: list[job.Job], deadline: float) -> None:
    while not all(file.exists() for file in files):
        if any(one.process.poll() is not None for one in jobs):
            raise DemoError(ended(jobs))
        if time.monotonic() > deadline:
            missing = ", ".join(file.stem for file in files if not file.exists())
            raise DemoError(f"no {missing} in time")
        time.sleep(0.02)


def wait_for_end(jobs: list[job.Job], deadline: float) -> None:
    while any(one.process.poll() is None for one in jobs):
        if any(one.process.poll() for one in jobs) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    if any(one.process.poll() != 0 for one in jobs):
        raise DemoError(ended(jobs))


def gpus_of_jobs() -> tuple[list[str], list[str]]:
    """The trainer's and the servers' GPUs, min(2, G/2) each; none where there are fewer than two."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    names = visible.split(",")[:count] if visible else [str(gpu) for gpu in range(count)]
    each = min(2, count // 2)
    return names[:each], names[each : 2 * each]


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def run(steps: int, timeout_s: float, folder: Path, rows: list[Row], console: Console) -> None:
    """Start both jobs and judge each step into ``rows``; raises DemoError at the first that fails."""
    deadline = time.monotonic() + timeout_s
    trainer_gpus, server_gpus = gpus_of_jobs()
    ranks = len(trainer_gpus) or 2
    where = "GPUs, NCCL" if trainer_gpus else "CPU, gloo"
    console.print(f"MiniLM: a trainer of {ranks} ranks (FSDP2), servers of {ranks} (tensor parallel); {where}")
    # A rank that hangs says where it hangs and ends, a little before this process gives up.
    common = ["--address", free_address(), "--folder", str(folder), "--deadline", str(0.9 * timeout_s)]
    jobs: list[job.Job] = []
    try:
        for name, gpus, more in [
            ("trainer", trainer_gpus, ["--steps", str(steps)]),
            ("server", server_gpus, []),
        ]:
            script = HERE / f"{name}.py"
            jobs.append(job.start(name, script, ranks=ranks, gpus=gpus, folder=folder, args=common + more))
        before = None
        with Live(table(rows, "starting"), console=console, transient=True) as live:
            for step in range(steps + 1):
                files = [snapshot.path(folder, name, step) for name in ("trainer", "servers")]
                wait_for(files, jobs, deadline)
                row, before = judge(folder, step, before)
                rows.append(row)
                for file in reversed(files):  # the trainer goes on when its own is gone
                    file.unlink()
                live.update(table(rows, f"training, step {step + 1} of {steps}" if step < steps else ""))
                if faults := row.faults():
                    raise DemoError("; ".join(faults))
            wait_for_end(jobs, deadline)
    except BaseException:
        for one in jobs:  # before they are stopped: torchrun would have the last word
            console.rule(f"the last lines of the {one.name} job")
            console.print(one.tail(), markup=False, highlight=False, soft_wrap=True)
        raise
    finally:
        job.stop(jobs)
        console.print(table(rows, LEGEND))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="training steps (default: 5)")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for everything (default: 240)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps: expected 1 or more, got {args.steps}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory(prefix="weightbus-demo-") as folder:
            run(args.steps, args.timeout, Path(folder), rows, Console())
    except KeyboardInterrupt:
        print("FAILED: interrupted", flush=True)
        return 130
    except Exception as error:
        if not isinstance(error, DemoError):
            traceback.print_exc()
        print(f"FAILED: {error}", flush=True)
        return 1
    last = rows[-1]
    worst = max(row.difference for row in rows[1:])
    print(
        f"verified {len(rows) - 1} updates of {last.weights} weights ({last.nbytes / 1e6:.1f} MB): "
        f"bit-equal on trainer and servers, embeddings within {worst:.1e}",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
