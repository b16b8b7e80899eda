"""Two checkouts beside each other, in turns: small updates, many ranks, and how soon a death is known.

    git worktree add --detach ../other COMMIT
    python benchmarks/transports.py --other ../other --json benchmarks/results/transports-cpu.json

Each pair runs both checkouts, the second one first in every other pair. One run: planned updates of 1 MB on
gloo from one trainer rank to one and to two replicas of one rank; simulated ranks (simulated.py of that
checkout); and a server rank that is killed, until the hub's status does not have it any more. The hub of each
is that of its checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__file__ = str(Path(__file__).resolve())
HERE = Path(__file__).parent


def itself(arguments: Sequence[object]) -> list[str]:
    """A command that runs this file and imports nothing from beside it."""
    begin = f"import sys, runpy; sys.argv[0] = {__file__!r}; runpy.run_path({__file__!r}, run_name='__main__')"
    return [sys.executable, "-c", begin, *map(str, arguments)]


def run(checkout: Path, arguments: list[str]) -> dict[str, Any]:
    """One measurement of ``checkout`` in a process of its own, whose last line is its result."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "benchmarks")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(itself(arguments), cwd=checkout, env=env, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# -- in a process that imports one of the checkouts --------------------------------------------------


def server(address: str, replica: int, numel: int) -> None:
    import torch

    import weightbus

    torch.set_num_threads(1)
    target = [("weight", torch.zeros(numel))]
    with weightbus.Subscriber(target, address=address, rank=0, replica_size=1, replica=replica) as subscriber:
        subscriber.serve()


def start(address: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(itself(["--address", address, *arguments]))


def updates(servers: int, count: int, nbytes: int) -> dict[str, Any]:
    """Seconds of planned updates; then of a death."""
    import torch
    from update import free_ports

    import weightbus

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    source = [("weight", torch.ones(nbytes // 4))]
    ranks = [start(address, "--server", replica, "--nbytes", nbytes) for replica in range(servers)]
    seconds = []
    try:
        with weightbus.Publisher(source, address=address, rank=0, size=1, min_replicas=servers) as publisher:
            for version in range(count + 5):
                report = publisher.update(version, verify=False)
                if version >= 5:
                    seconds.append(report.seconds)
            with weightbus.Client(address) as client:
                here = len(client.status(0).peers)
                begun = time.perf_counter()
                os.kill(ranks[0].pid, signal.SIGKILL)
                while len(client.status(0).peers) == here:
                    time.sleep(0.005)
                death = time.perf_counter() - begun
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(20)
    return {"update_p50_ms": statistics.median(seconds) * 1e3, "death_known_s": death}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for servers in (1, 2):
        for name, value in updates(servers, args.updates, args.nbytes).items():
            found[f"1+{servers} {name}"] = value
    if args.ranks:
        from control import many_ranks

        found[f"{args.ranks} ranks planned_p50_ms"] = many_ranks(args.ranks, 5)["planned_p50_s"] * 1e3
    return found


# -- all of it -------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="two checkouts beside each other")
    parser.add_argument("--other", type=Path, help="the checkout to compare with")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--nbytes", type=int, default=1 << 20)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--server", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.server is not None:
        server(args.address, args.server, args.nbytes // 4)
        return 0
    if args.measure:
        print(json.dumps(measure(args)))
        return 0
    if args.other is None:
        parser.error("--other is needed")
    own = [
        "--measure",
        "--updates",
        str(args.updates),
        "--nbytes",
        str(args.nbytes),
        "--ranks",
        str(args.ranks),
    ]
    checkouts = {"this": HERE.parent, "other": args.other.resolve()}
    pairs: list[dict[str, Any]] = []
    for number in range(args.pairs):
        order = list(checkouts.items())[:: -1 if number % 2 else 1]
        pairs.append({name: run(checkout, own) for name, checkout in order})
        print(pairs[-1], flush=True)
    rows = []
    for what in pairs[0]["this"]:
        row: dict[str, Any] = {"what": what}
        for name in checkouts:
            row[f"{name}_p50"] = statistics.median(pair[name][what] for pair in pairs)
            row[f"{name}_max"] = max(pair[name][what] for pair in pairs)
        row["difference_p50"] = statistics.median(pair["this"][what] - pair["other"][what] for pair in pairs)
        rows.append(row)
        print(row)
    import record

    commits = {
        name: subprocess.run(
            ["git", "-C", str(path), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        for name, path in checkouts.items()
    }
    record.write(args.json, "transports", rows, pairs=pairs, commits=commits)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
