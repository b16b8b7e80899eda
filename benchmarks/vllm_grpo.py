"""``examples/vllm_grpo.py`` with several seeds: what is rewarded, and what updates and pauses take of a step.

    python benchmarks/vllm_grpo.py --json benchmarks/results/vllm-grpo-cpu.json
    python benchmarks/vllm_grpo.py --json benchmarks/results/vllm-grpo-cpu.json --plot docs/vllm-grpo.svg

The second one runs nothing and draws what the first has written; it needs matplotlib. Runs are one after the
other, each with a vLLM of its own. Exits with 1 if an update was not verified, a token was sampled with another
version than the one just committed, or a seed's reward has not risen; with 77 if there is no vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path
from typing import Any

import record
from rich.console import Console
from rich.table import Table

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "vllm_grpo.py"
TIMES = ("update_s", "pause_s", "rollout_s", "train_s", "step_s")


def run(seed: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "steps.json")
        command = [sys.executable, EXAMPLE, "--seed", str(seed), "--steps", str(steps), "--json", path]
        ended = subprocess.run(command, check=False)  # noqa: S603 - the example
        rows = json.loads(path.read_text()) if path.exists() else []
    rewards = [row["reward"] for row in rows]
    return {
        "seed": seed,
        "right": ended.returncode == 0,
        "steps": len(rows),
        "verified": sum(row["word"] == "verified" for row in rows),
        "reward_first_ten": statistics.fmean(rewards[:10]) if rows else None,
        "reward_last_ten": statistics.fmean(rewards[-10:]) if rows else None,
        **{f"p50_{name}": statistics.median(row[name] for row in rows) if rows else None for name in TIMES},
        "logprobs_apart_most": max((row["logprobs_apart"] for row in rows), default=None),
        "logprobs_moved_p50": statistics.median([row["logprobs_moved"] for row in rows]) if rows else None,
        "rewards": [round(reward, 4) for reward in rewards],
    }


def versions() -> dict[str, str]:
    found = metadata.packages_distributions()
    return {name: metadata.version(found[name][0]) for name in ("transformers", "vllm")}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "seed", "verified", "first ten", "last ten", *(f"{name[:-2]} ms" for name in TIMES), "logprobs apart"
    )
    for row in rows:
        if row["steps"]:
            table.add_row(
                str(row["seed"]),
                f"{row['verified']} / {row['steps']}",
                *(f"{row[f'reward_{ten}_ten']:.3f}" for ten in ("first", "last")),
                *(f"{1000 * row[f'p50_{name}']:.0f}" for name in TIMES),
                f"{row['logprobs_apart_most']:.4f}",
            )
    Console(width=120).print(table)


def plot(path: str, rows: list[dict[str, Any]]) -> None:
    """Mean reward of each step, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "weightbus", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    for row in rows:
        axes.plot(range(1, row["steps"] + 1), row["rewards"], label=f"seed {row['seed']}")
    axes.set(xlabel="step", ylabel="reward", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", metavar="FILE", help="write the result")
    parser.add_argument("--plot", metavar="FILE", help="draw the result that lies in --json, and run nothing")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot, json.loads(Path(args.json).read_text())["rows"])
        return 0
    if util.find_spec("vllm") is None:
        print("vLLM is not installed")
        return 77
    rows, load = [], os.getloadavg()[0]
    for seed in args.seeds:
        rows.append(run(seed, args.steps))
        record.write(args.json, "vllm_grpo", rows, libraries=versions(), load_before=load)
    show(rows)
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
