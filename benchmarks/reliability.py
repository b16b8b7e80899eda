"""Writes the figures of docs/reliability.md from benchmarks/results/, between their two marks.

python benchmarks/reliability.py
python benchmarks/reliability.py --check          # only compares
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: benchmarks/reliability.py -->\n", "<!-- end of figures -->\n"


def result_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def origin(found: dict[str, Any], name: str) -> str:
    versions = ", ".join(f"{what} {version}" for what, version in found["versions"].items())
    link = f"[result](../benchmarks/results/{name}.json)"
    return f"{found['machine']}, {versions}, commit {found['commit']} ({link})"


def chaos() -> Iterator[str]:
    found = result_of("chaos-cpu")
    yield "## Random faults"
    yield ""
    where = ", replica 1 in a network namespace of its own" if found["links"] else ""
    yield f"{found['what']}{where}; {origin(found, 'chaos-cpu')}."
    yield ""
    yield (
        f"{found['updates']} updates in {found['seconds'] / 60:.0f} minutes, of which {found['lost']} were lost"
        f" and {sum(found['faults'].values())} had a fault; {len(found['broken'])} broken promises."
    )
    if found["processes_watched_for_growth"]:
        yield (
            f"Memory of the {found['processes_watched_for_growth']} processes that lived for 80 updates or more"
            f" grew by {found['growth_mb_per_100_updates']:.2f} MB in 100 updates at most."
        )
    yield ""
    yield "| fault | calls | answer, median s | longest s |"
    yield "|---|---|---|---|"
    for name, row in found["answers"].items():
        yield f"| {name} | {row['calls']} | {row['median_s']:.2f} | {row['max_s']:.2f} |"
    yield ""
    if found["broken"]:
        yield "| broken | times | first, at |"
        yield "|---|---|---|"
        alike: dict[str, list[str]] = {}
        for line in found["broken"]:
            when, _, what = line.splitlines()[0].partition(", ")
            what = what.partition("): ")[2]
            alike.setdefault(re.sub(r"\d+(\.\d+)?", "#", what)[:60], []).append(f"{when}: {what[:140]}")
        for lines in alike.values():
            when, _, what = lines[0].partition(": ")
            yield f"| {what.replace('|', ' ')} | {len(lines)} | {when} |"
        yield ""


def points() -> Iterator[str]:
    found = result_of("crash-points-cpu")
    limits = ", ".join(
        f"{what.replace('_', ' ')} {seconds:g}" for what, seconds in found["deadlines_s"].items()
    )
    yield "## A fault after each step"
    yield ""
    yield f"{found['what']}; {origin(found, 'crash-points-cpu')}. In seconds: {limits}."
    yield ""
    yield "| role | after | fault | update | replicas | answer, s | other servers | the victim | next update |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in found["rows"]:
        replicas = ", ".join(map(str, row["replicas"]))
        mark = " (broken)" if row["broken"] else ""
        yield (
            f"| {row['role']} | {row['step']} | {row['fault']} | {row['update']}{mark} | {replicas} "
            f"| {row['answer_s']:.2f} | {', '.join(row['others'])} | {row['victim']} | {row['next']} |"
        )
    yield ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the page says something else")
    options = parser.parse_args()
    before, rest = PAGE.read_text().split(BEGIN)
    text = "\n".join([*chaos(), *points()])
    new = f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"
    wrong = new != PAGE.read_text()
    if not options.check:
        PAGE.write_text(new)
    return int(wrong and options.check)


if __name__ == "__main__":
    raise SystemExit(main())
