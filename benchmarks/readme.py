"""Writes the figures of README.md and docs/performance.md from benchmarks/results/, between their two marks,
and draws docs/colocated.svg.

python benchmarks/readme.py
python benchmarks/readme.py --check          # only compares
python benchmarks/readme.py --plot benchmarks/results/update-h100.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bars import bars

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RAW = "raw broadcast of one buffer"
PICTURE = ROOT / "docs" / "colocated.svg"
BEGIN, END = "<!-- figures: benchmarks/readme.py -->\n", "<!-- end of figures -->\n"


def rows_of(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def find(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def timed(what: str, row: dict[str, Any] | None, raw: dict[str, Any] | None) -> Iterator[str]:
    if row:
        ratio = f"{row['p50_s'] / raw['p50_s']:.2f}" if raw else ""
        yield f"| {what} | {row['p50_s'] * 1e3:.1f} | {row['nbytes'] / row['p50_s'] / 1e9:.0f} | {ratio} |"


def gpus() -> Iterator[str]:
    rows, peer = rows_of("update-h100"), rows_of("peer-h100")
    model = {"model": "qwen3-8b"}
    raw = find(rows, **model, case="bf16", what="raw broadcast of one buffer")
    yield "Two H100 joined by NVLink, Qwen3-8B's shapes (399 tensors, 16.4 GB), one trainer and one server"
    yield "rank; medians of `update()`, from the call to the commit on all ranks"
    yield "([update](benchmarks/results/update-h100.json), [peer](benchmarks/results/peer-h100.json)):"
    yield ""
    yield "| what | ms | GB/s | of the raw broadcast of the same run |"
    yield "|---|---|---|---|"
    for row in rows:
        if row["model"] == "qwen3-8b" and row["case"] == "bf16":
            name = row["what"].replace("weightbus", "weightbus, broadcast route")
            yield from timed(name, row, raw)
    for what in ("weightbus", "weightbus, verified"):
        row = find(rows, **model, case="fp32 masters to bf16", what=what)
        base = find(rows, **model, case="fp32 masters to bf16", what="raw broadcast of one buffer")
        yield from timed(f"fp32 masters to bf16: {what}", row, base)
    base = find(peer, **model, case="GPU 0 to 1", what="raw broadcast of one buffer")
    for what in ("update", "update, verified"):
        row = find(peer, **model, case="GPU 0 to 1", what=what)
        yield from timed(what.replace("update", "weightbus, peer route (CUDA IPC)"), row, base)
    released = rows_of("released-h100")
    base = find(released, **model, what="raw broadcast of one buffer")
    for row in released:
        if row["model"] == "qwen3-8b" and row["what"].startswith("checkpoint-engine"):
            yield from timed(row["what"], row, base)
    yield ""
    yield "checkpoint-engine 0.4.2 from PyPI, in a run of its own beside weightbus"
    yield "([result](benchmarks/results/released-h100.json), `benchmarks/released.py` says what is timed)."
    yield ""
    yield from other_models()
    check = find(rows, **model, case="check", what="publisher.check()")
    hashed = find(rows, **model, case="check", what=".cpu() and hashlib's SHA-256, a piece of the model")
    if check and hashed:
        yield (
            f"`publisher.check()` of both ends takes {check['p50_s'] * 1e3:.1f} ms; copying to the host and "
            f"SHA-256 there runs at {hashed['nbytes'] / hashed['p50_s'] / 1e9:.2f} GB/s in the same run."
        )
        yield ""


def other_models() -> Iterator[str]:
    rows = rows_of("update-h100-models")
    yield "Other models by the broadcast route ([result](benchmarks/results/update-h100-models.json),"
    yield "[plot](benchmarks/results/update-h100.png)):"
    yield ""
    yield "| model | tensors | GB | raw broadcast, ms | update, ms | verified, ms |"
    yield "|---|---|---|---|---|---|"
    for model in dict.fromkeys(row["model"] for row in rows):
        names = "raw broadcast of one buffer", "weightbus", "weightbus, verified"
        found = [find(rows, model=model, case="bf16", what=name) for name in names]
        if raw := found[0]:
            figures = " | ".join(f"{row['p50_s'] * 1e3:.1f}" if row else "" for row in found)
            yield f"| {model} | {raw['tensors']} | {raw['nbytes'] / 1e9:.1f} | {figures} |"
    yield ""


def digests() -> Iterator[str]:
    yield "| digest | of a kernel that only reads | GB/s |"
    yield "|---|---|---|"
    for row in rows_of("digest-h100"):
        if row.get("of_baseline") and row["what"] != "only reading (ceiling)":
            yield f"| {row['what']} (one H100) | {row['of_baseline'] * 100:.0f} % | {row['GB/s']:.0f} |"
    yield ""


def cpu() -> Iterator[str]:
    rows, digest = rows_of("update-cpu"), rows_of("digest-cpu")
    raw = find(rows, case="bf16", what="raw broadcast of one buffer")
    if raw:
        yield f"Two CPU cores, gloo, {raw['model']} ({raw['nbytes'] / 1e9:.2f} GB):"
        yield ""
        yield "| what | ms | GB/s | of the raw broadcast |"
        yield "|---|---|---|---|"
        for row in rows:
            if row["case"] == "bf16":
                p50 = row["p50_s"]
                figures = f"{p50 * 1e3:.0f} | {row['nbytes'] / p50 / 1e9:.2f} | {p50 / raw['p50_s']:.2f}"
                yield f"| {row['what']} | {figures} |"
        yield ""
    speeds = ", ".join(f"{row['what']} {row['GB/s']:.1f}" for row in digest)
    yield f"Digests on the CPU, in GB/s: {speeds}."
    yield ""


COLOCATED = {
    ("bf16", "update"): "weightbus",
    ("bf16", "update, verified"): "weightbus, verified",
    ("bf16", "gather"): "all-gather of each tensor, then a copy",
    ("fp32", "update"): "weightbus, fp32 masters",
    ("fp32", "update, verified"): "weightbus, fp32 masters, verified",
    ("fp32", "gather"): "all-gather, then a copy, fp32 masters",
}


def colocated() -> str:
    """The picture of updates over the same ranks."""
    result = json.loads((RESULTS / "colocated-h200.json").read_text())
    gpus = result["hardware"]["gpus"]
    rows = []
    for (masters, what), label in COLOCATED.items():
        row = find(result["rows"], layout="in order", masters=masters, what=what)
        if row:
            rows.append((label, row["p50_s"] * 1e3, what != "gather"))
    return bars(
        "FSDP2 to tensor-parallel over the same ranks",
        f"Qwen3-8B's shapes in bf16, 16.4 GB, {len(gpus)} {gpus[0]}; medians, {result['date']}",
        rows,
        "ms",
    )


def same_ranks() -> Iterator[str]:
    yield "Colocated, each rank both ends: FSDP2's rows to tensor-parallel rows and columns, Qwen3-8B's shapes,"
    yield "H200 ([two](benchmarks/results/colocated-h200.json),"
    yield "[one](benchmarks/results/colocated-h200-one.json)). In the layout `reversed` hardly anything stays"
    yield "on its rank. `memcpy` copies as many bytes as a rank's target has, within its device; `exchange`"
    yield "sends the bf16 bytes that must move, and no more:"
    yield ""
    yield "| GPUs | layout | masters | what | ms | of memcpy |"
    yield "|---|---|---|---|---|---|"
    for name, gpus in (("colocated-h200-one", 1), ("colocated-h200", 2)):
        for row in rows_of(name):
            figures = f"{row['p50_s'] * 1e3:.1f} | {row['of_memcpy']:.2f}"
            yield f"| {gpus} | {row['layout']} | {row['masters']} | {row['what']} | {figures} |"
    yield ""


def few() -> Iterator[str]:
    """What a newcomer asks first."""
    rows, peer = rows_of("update-h100"), rows_of("peer-h100")
    yield "Qwen3-8B's shapes (399 tensors, 16.4 GB) from one H100 to another, from the call of `update()` to"
    yield "the commit on all ranks, 25 November 2026 ([update](benchmarks/results/update-h100.json),"
    yield "[peer](benchmarks/results/peer-h100.json), [others](benchmarks/results/released-h100.json)):"
    yield ""
    yield "| what | ms | GB/s | of the raw broadcast of the same run |"
    yield "|---|---|---|---|"
    wanted = [
        (rows, "bf16", "raw broadcast of one buffer", "raw broadcast of one buffer"),
        (rows, "bf16", "a broadcast for each tensor, then a copy", "a broadcast for each tensor, then a copy"),
        (
            rows_of("released-h100"),
            None,
            "checkpoint-engine, 1 GiB, registered before",
            "checkpoint-engine 0.4.2",
        ),
        (rows, "bf16", "weightbus, verified", "weightbus, broadcast route, verified"),
        (rows, "fp32 masters to bf16", "weightbus, verified", "weightbus, fp32 masters to bf16, verified"),
        (peer, "GPU 0 to 1", "update, verified", "weightbus, peer route (CUDA IPC), verified"),
    ]
    for results, case, what, name in wanted:
        here = {"model": "qwen3-8b"} | ({"case": case} if case else {})
        yield from timed(name, find(results, **here, what=what), find(results, **here, what=RAW))
    yield ""


def figures() -> dict[Path, str]:
    everything = "\n".join([*gpus(), *same_ranks(), *digests(), *cpu()])
    everything = everything.replace("(benchmarks/results/", "(../benchmarks/results/")
    return {ROOT / "README.md": "\n".join(few()), ROOT / "docs" / "performance.md": everything}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a page says something else")
    parser.add_argument("--plot", metavar="FILE", help="draw all models' updates on GPUs instead (matplotlib)")
    options = parser.parse_args()
    if options.plot:
        from update import plot  # which needs torch

        released = [row for row in rows_of("released-h100") if row["what"].startswith("checkpoint-engine")]
        plot(options.plot, [*rows_of("update-h100"), *rows_of("update-h100-models"), *released])
        return 0
    wrong = False
    for page, text in figures().items():
        before, rest = page.read_text().split(BEGIN)
        new = f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"
        wrong |= new != page.read_text()
        if not options.check:
            page.write_text(new)
    drawn = colocated()
    wrong |= not PICTURE.exists() or PICTURE.read_text() != drawn
    if not options.check:
        PICTURE.write_text(drawn)
    return int(wrong and options.check)


if __name__ == "__main__":
    raise SystemExit(main())
