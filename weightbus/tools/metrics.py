"""The hub's state as Prometheus metrics: text once, or served over HTTP on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import ThreadingHTTPServer

from prometheus_client import CollectorRegistry, MetricsHandler, generate_latest
from prometheus_client.core import Metric

from weightbus.control import client_messages as a
from weightbus.errors import WeightbusError

STATES = ("empty", "ready", "updating", "torn")

# All who ask within so long are told the same, so that the hub is not asked more often.
FRESH_S = 0.5

# Of a connection that neither sends nor reads.
SILENT_S = 5.0


class _Collector:
    def __init__(self, status: a.Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status
        servers = [peer for peer in status.peers if peer.replica is not None]
        states = [({"state": state}, sum(peer.state == state for peer in servers)) for state in STATES]
        versions = [({"rank": peer.rank}, peer.version) for peer in servers if peer.version is not None]
        yield _metric("up_seconds", "Seconds since the hub started.", status.up_s)
        yield _metric("epoch", "Epoch of the process group.", status.epoch)
        if status.version is not None:
            yield _metric("version", "Last committed version.", status.version)
        yield _metric("paused", "1 while updates are held back by a request.", status.paused_s > 0)
        yield _metric("requests_waiting", "Requests that wait for the trainer.", status.requests)
        yield _metric("ranks", "Ranks that have joined.", len(status.peers))
        yield _metric("replicas_incomplete", "Replicas that miss ranks.", len(status.incomplete))
        yield _metric("server_ranks", "Server ranks by state.", *states)
        yield _metric("server_version", "Version of each server rank.", *versions)
        counts = [({"what": what}, count) for what, count in sorted(status.counts.items())]
        yield _metric("hub_total", "What the hub has counted: messages, refused ones, and so on.", *counts)
        for past in status.past[-1:]:
            labels: dict[str, str] = {"kind": past.kind, "verdict": past.verdict}
            yield _metric("last_seconds", "Seconds that the last update or check took.", (labels, past.seconds))
            yield _metric("last_bytes", "Bytes of the last update.", (labels, past.nbytes))
            yield _metric("last_began", "Unix time at which it began.", (labels, past.began))


def _metric(name: str, text: str, *samples: float | tuple[Mapping[str, str], float]) -> Metric:
    base = name.removesuffix("_total")
    metric = Metric(f"weightbus_{base}", text, "gauge" if base == name else "counter")
    for sample in samples:
        labels, value = sample if isinstance(sample, tuple) else ({}, sample)
        metric.add_sample(f"weightbus_{name}", dict(labels), float(value))
    return metric


def registry_of(status: a.Status) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Collector(status))
    return registry


def prometheus_text(status: a.Status) -> str:
    """Prometheus' text exposition format, version 0.0.4."""
    return generate_latest(registry_of(status)).decode()


def serve_metrics(status: Callable[[], a.Status], port: int) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 that asks for the status; call its ``serve_forever``.

    A process of its own beside the hub, so that nothing that HTTP brings reaches the hub. No connection waits
    for another; ``status`` is called by one thread at a time.
    """
    lock = threading.Lock()
    told: list[tuple[float, a.Status]] = []

    def ask() -> a.Status:
        with lock:
            if not told or time.monotonic() - told[-1][0] > FRESH_S:
                told[:] = [(time.monotonic(), status())]
            return told[-1][1]

    class Handler(MetricsHandler):
        timeout = SILENT_S

        def do_GET(self) -> None:
            try:
                self.registry = registry_of(ask())
            except WeightbusError as error:
                self.send_error(503, explain=str(error))
                return
            super().do_GET()

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)
