"""What a scrape costs: ``weightbus/tools/metrics.py`` of this checkout beside that of another, in pairs.

    python benchmarks/metrics.py --other ../weightbus-before --json benchmarks/results/metrics-cpu.json

Each serves the same made-up status of 512 ranks over HTTP on loopback, in this process.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import threading
import time
import tracemalloc
import urllib.request
from importlib.metadata import files
from pathlib import Path
from typing import Any

import record

from weightbus.control import client_messages as a


def status(ranks: int) -> a.Status:
    peers = [
        a.PeerStatus(
            rank=f"replica {n // 8} server rank {n % 8}",
            replica=n // 8,
            host=f"host-{n // 8}",
            pid=n,
            device="cuda",
            state="ready",
            version=1234,
            heard_s=0.1,
        )
        for n in range(ranks)
    ]
    counts = {f"count {n}": 1000 * n for n in range(15)}
    return a.Status(
        id="i",
        hub="h",
        weightbus="0",
        up_s=100.5,
        version=1234,
        paused_s=0.0,
        peers=peers,
        incomplete=[],
        phase="",
        missing=[],
        requests=0,
        counts=counts,
        jobs=[],
        past=[],
    )


def side(name: str, checkout: Path, told: a.Status) -> dict[str, Any]:
    path = checkout / "weightbus" / "tools" / "metrics.py"
    spec = importlib.util.spec_from_file_location(f"metrics_of_{name}", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"expected a checkout with {path}")
    module = importlib.util.module_from_spec(spec)
    begun = time.perf_counter()
    spec.loader.exec_module(module)
    imported_s = time.perf_counter() - begun
    tracemalloc.start()
    text = module.prometheus_text(told)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    server = module.serve_metrics(lambda: told, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return {
        "code": name,
        "lines": len(path.read_text().splitlines()),
        "import_ms": imported_s * 1e3,
        "text_bytes": len(text),
        "text_peak_kb": peak / 1e3,
        "url": f"http://127.0.0.1:{server.server_port}/metrics",
        "scrape_s": [],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="what a scrape of metrics costs")
    parser.add_argument("--other", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--json", metavar="FILE", help="write the result")
    args = parser.parse_args()
    told = status(args.ranks)
    checkouts = {"other": args.other.resolve(), "this": Path(__file__).parents[1]}
    rows = [side(name, checkout, told) for name, checkout in checkouts.items()]
    for _ in range(args.pairs):
        for row in rows:
            begun = time.perf_counter()
            with urllib.request.urlopen(row["url"], timeout=30) as page:  # noqa: S310 - ours, on loopback
                page.read()
            row["scrape_s"].append(time.perf_counter() - begun)
    for row in rows:
        row["scrape_p50_ms"] = statistics.median(row["scrape_s"]) * 1e3
        del row["url"]
        print({key: value for key, value in row.items() if key != "scrape_s"})
    found = [file for file in files("prometheus_client") or [] if file.suffix == ".py"]
    library = {
        "lines": sum(len(Path(file.locate()).read_text().splitlines()) for file in found),
        "kb": sum(Path(file.locate()).stat().st_size for file in found) / 1e3,
    }
    commits = {name: record.commit_of(checkout) for name, checkout in checkouts.items()}
    record.write(args.json, "metrics", rows, ranks=args.ranks, commits=commits, prometheus_client=library)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
