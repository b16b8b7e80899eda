"""When each rank did what in the last updates: a Chrome trace, or a plot."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from weightbus.control import client_messages as a
from weightbus.errors import SpecError

# Stages in the order of an update, and their colours in the plot.
COLOURS = {
    "offer": "#9aa5b1",
    "ready": "#62b6cb",
    "group": "#1b4965",
    "pack": "#f4a259",
    "send": "#5b8e7d",
    "install": "#8cb369",
    "digest": "#bc4b51",
    "verify": "#7d4f50",
    "commit": "#cbc0d3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Seconds from ``start_s`` after the round's beginning. busy_s: work in it, where other stages overlap."""

    rank: str
    stage: str
    start_s: float
    seconds: float
    busy_s: float


def spans(past: a.Past) -> Iterator[Span]:
    """Each rank's stages. A rank's clock is put to the hub's at the offer, so they may be off by a message."""
    offered = min(past.phases.values(), default=0.0)
    for times in past.ranks:
        ends = {
            "offer": (0.0, offered),
            "ready": (offered, times.ready_s),
            "commit": (times.done_s, past.seconds),
        }
        for stage in COLOURS:
            start, end = ends.get(stage, (None, None))
            if start is not None and end is not None and end >= start:
                yield Span(rank=times.rank, stage=stage, start_s=start, seconds=end - start, busy_s=end - start)
            elif stage in times.starts and stage not in ends:
                seconds = times.stages.get(stage, 0.0)
                last = times.starts.get(f"{stage} end", times.starts[stage] + seconds)
                start = times.starts[stage]
                yield Span(rank=times.rank, stage=stage, start_s=start, seconds=last - start, busy_s=seconds)


def chrome_trace(pasts: Sequence[a.Past]) -> dict[str, Any]:
    """For chrome://tracing or Perfetto: one process for each update, one row in it for each rank and stage."""
    events: list[dict[str, Any]] = []
    zero = min((past.began for past in pasts), default=0.0)
    for number, past in enumerate(pasts):
        title = f"{past.kind} {past.version}: {past.verdict}, epoch {past.epoch}"
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": title}})
        rows: dict[str, int] = {}
        for span in spans(past):
            # Overlapping stages of one rank need rows of their own to be drawn.
            overlaps = span.stage in ("pack", "send", "install", "digest")
            name = f"{span.rank} {span.stage}" if overlaps else span.rank
            if name not in rows:
                rows[name] = len(rows)
                labels = {"ph": "M", "pid": number, "tid": rows[name]}
                events.append(labels | {"name": "thread_name", "args": {"name": name}})
            events.append(
                {
                    "ph": "X",
                    "name": span.stage,
                    "cat": past.kind,
                    "pid": number,
                    "tid": rows[name],
                    "ts": (past.began - zero + span.start_s) * 1e6,
                    "dur": span.seconds * 1e6,
                    "args": {"busy_us": span.busy_s * 1e6, "version": past.version},
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def plot(past: a.Past, path: str | os.PathLike[str]) -> None:
    """One update as a PNG (or what ``path`` ends with): a row for each rank. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SpecError("plot: expected matplotlib (pip install 'weightbus[plot]'), got none") from error
    ranks = [times.rank for times in past.ranks]
    figure = Figure(figsize=(10, 1.6 + 0.5 * len(ranks)), layout="constrained")
    axes = figure.add_subplot()
    overlapping = ("pack", "send", "install", "digest")
    seen = set()
    for span in spans(past):
        height, offset = 0.8, 0.0
        if span.stage in overlapping:
            height = 0.2
            offset = -0.3 + 0.2 * overlapping.index(span.stage)
        label = None if span.stage in seen else span.stage
        seen.add(span.stage)
        axes.barh(
            ranks.index(span.rank) + offset,
            span.seconds * 1e3,
            left=span.start_s * 1e3,
            height=height,
            color=COLOURS[span.stage],
            label=label,
        )
    axes.set_yticks(range(len(ranks)), ranks, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("ms since the call")
    axes.set_title(f"{past.kind} of version {past.version}: {past.verdict}, {past.seconds * 1e3:.1f} ms")
    if seen:
        figure.legend(loc="outside lower center", ncols=len(COLOURS), fontsize="small")
    figure.savefig(path, dpi=120)
