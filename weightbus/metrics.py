"""The hub's state as Prometheus metrics: text once, or served over HTTP on loopback."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer

from weightbus import asks as a
from weightbus.errors import WeightbusError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

STATES = ("empty", "ready", "updating", "torn")


def prometheus_text(status: a.Status) -> str:
    """Prometheus' text exposition format, version 0.0.4."""
    lines: list[str] = []

    def metric(name: str, kind: str, text: str, samples: list[tuple[dict[str, str], float]]) -> None:
        lines.append(f"# HELP weightbus_{name} {text}")
        lines.append(f"# TYPE weightbus_{name} {kind}")
        for labels, value in samples:
            inside = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
            lines.append(
                f"weightbus_{name}{{{inside}}} {value:.17g}" if inside else f"weightbus_{name} {value:.17g}"
            )

    servers = [peer for peer in status.peers if peer.replica is not None]
    metric("up_seconds", "gauge", "Seconds since the hub started.", [({}, status.up_s)])
    metric("epoch", "gauge", "Epoch of the process group.", [({}, status.epoch)])
    if status.version is not None:
        metric("version", "gauge", "Last committed version.", [({}, status.version)])
    metric("paused", "gauge", "1 while updates are held back by a request.", [({}, float(status.paused_s > 0))])
    metric("requests_waiting", "gauge", "Requests that wait for the trainer.", [({}, status.requests)])
    metric("ranks", "gauge", "Ranks that have joined.", [({}, len(status.peers))])
    metric("replicas_incomplete", "gauge", "Replicas that miss ranks.", [({}, len(status.incomplete))])
    metric(
        "server_ranks",
        "gauge",
        "Server ranks by state.",
        [({"state": state}, sum(peer.state == state for peer in servers)) for state in STATES],
    )
    metric(
        "server_version",
        "gauge",
        "Version of each server rank.",
        [({"rank": peer.rank}, peer.version) for peer in servers if peer.version is not None],
    )
    metric(
        "hub_total",
        "counter",
        "What the hub has counted: messages, refused ones, dropped peers, and so on.",
        [({"what": what}, count) for what, count in sorted(status.counts.items())],
    )
    for past in status.past[-1:]:
        labels: dict[str, str] = {"kind": past.kind, "verdict": past.verdict}
        metric("last_seconds", "gauge", "Seconds that the last update or check took.", [(labels, past.seconds)])
        metric("last_bytes", "gauge", "Bytes of the last update.", [(labels, past.nbytes)])
        metric("last_began", "gauge", "Unix time at which it began.", [(labels, past.began)])
    return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def serve_metrics(status: Callable[[], a.Status], port: int) -> HTTPServer:
    """A server on 127.0.0.1 that asks for the status at each request; call its ``serve_forever``.

    A process of its own beside the hub, so that nothing that HTTP brings reaches the hub.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 5.0

        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404, "expected /metrics")
                return
            try:
                code, body = 200, prometheus_text(status())
            except WeightbusError as error:
                code, body = 503, f"{error}\n"
            data = body.encode()
            self.send_response(code)
            self.send_header("Content-Type", CONTENT_TYPE if code == 200 else "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return HTTPServer(("127.0.0.1", port), Handler)
