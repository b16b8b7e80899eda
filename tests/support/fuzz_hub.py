"""A long run of bad frames against a live hub, with an update loop going on beside it.

    python tests/support/fuzz_hub.py --messages 1000000
    python tests/support/fuzz_hub.py --messages 100000 --coverage

First a session of real ranks and a client is recorded at one hub; then another hub is sent messages, half of
them valid msgpack mutated from that record (or played again), half of them broken in other ways, and every
twentieth is a raw connection: ZMTP of every version by hand, or HTTP, which a ``weightbus http`` beside the hub
gets, too: pipelined, flooded with headers, with wrong lengths, half-open. Meanwhile a trainer and a server
update and check through it without a pause, as they did alone before. Idle, garbage and never-reading
connections are kept open. Exits with 1 if an update or check fails, hub or HTTP server end, take nothing or do
not answer, the hub's memory grows, or updates become slow.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from pathlib import Path

import raw_sockets
import torch
import zmq
from mutations import broken, structured
from processes import free_address, run_python, start_python
from seeded import seeded

import weightbus
from weightbus.control import wire
from weightbus.control.start import listens
from weightbus.hub.server import Hub

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

# One of so many is a connection by hand, and one of so many of these stays open.
RAW_EACH = 20
KEPT_EACH = 10

# How often answers are read, memory is looked at, ``/health`` is asked, and a frame is longer than one may be.
READ_EACH = 64
LOOK_EACH = 1000
HEALTH_EACH = 10_000
LONG_EACH = 5000

# So long may a connection take nothing, and ``/health`` give no answer.
STUCK_S = 20.0

# What the attack may cost: the hub's memory, and the median of an update.
MAX_GROWN_MB = 64
MAX_SLOWER = 3

# A server that has imported torch once and forks.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "weightbus.session"])


def trainer(address, stop, results):
    """Updates, and each fifth time a check, until told to stop; seconds of each, and all failures."""
    torch.set_num_threads(1)
    source = [("a", torch.zeros(256, 256)), ("b", torch.zeros(100))]
    seconds, failures, version = [], [], 0
    with weightbus.Publisher(source, address=address, join_timeout_s=60, ready_timeout_s=30) as publisher:
        while not stop.is_set():
            version += 1
            for _, tensor in source:
                tensor.fill_(version)
            try:
                report = publisher.update(version)
                seconds.append((time.time(), report.seconds))
                if version % 5 == 0 and not publisher.check().ok:
                    failures.append(f"check {version}")
                publisher.poll()
                version = max(version, publisher.version)
            except weightbus.WeightbusError as error:
                failures.append(str(error))
    results.put(("trainer", seconds, failures, publisher.version))


def server(address, results):
    torch.set_num_threads(1)
    target = [("a", torch.zeros(256, 256)), ("b", torch.zeros(100))]
    wrong = []

    def committed(version):
        if any((tensor != version).any() for _, tensor in target):
            wrong.append(version)

    with weightbus.Subscriber(
        target, address=address, rank=0, replica_size=1, on_commit=committed
    ) as subscriber:
        subscriber.serve()
    results.put(("server", [], wrong, subscriber.version))


class Loop:
    """A trainer and a server process that update without a pause."""

    def __init__(self, address):
        self._stop, self._results = _context.Event(), _context.Queue()
        self._processes = [
            _context.Process(target=trainer, args=(address, self._stop, self._results), daemon=True),
            _context.Process(target=server, args=(address, self._results), daemon=True),
        ]
        for process in self._processes:
            process.start()

    def end(self):
        self._stop.set()
        results = [self._results.get(timeout=60) for _ in self._processes]
        for process in self._processes:
            process.join(20)
        return {name: rest for name, *rest in results}


def record():
    """Payloads of all messages that a hub was sent in a short session with every kind of request."""
    payloads = []
    decode = wire.decode_to_hub

    def recorded(frames):
        payloads.append(frames[1])
        return decode(frames)

    wire.decode_to_hub = recorded
    address = free_address()
    hub = Hub(address)
    thread = threading.Thread(target=hub.serve)
    thread.start()
    try:
        loop = Loop(address)
        with weightbus.Client(address, timeout_s=60) as client:
            while not client.status(past=16).version:
                time.sleep(0.2)
            client.check(wait_s=30)
            client.update(wait_s=30)
            client.pause(1)
            client.resume()
            client.set_version(client.status().version + 100, wait_s=30)
        loop.end()
    finally:
        hub.stop()
        thread.join()
        wire.decode_to_hub = decode
    kinds = {}
    for payload in payloads:
        kinds.setdefault(wire.decode_to_hub([wire.HEADER, payload]).__struct_config__.tag, []).append(payload)
    # Of each kind equally many, as beats and rendezvous would be most of it otherwise.
    return [payload for of in kinds.values() for payload in (of * 40)[:40]], sorted(kinds)


def resident(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def nuisances(address):
    """Connections that say nothing, or what is no ZMTP; they are left open."""
    host, port = address.removeprefix("tcp://").split(":")
    opened = []
    for word in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 10, b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03"):
        for _ in range(25):
            connection = socket.create_connection((host, int(port)), timeout=5)
            connection.sendall(word)
            opened.append(connection)
    return opened


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone-s", type=float, default=20.0, help="seconds of updates before")
    parser.add_argument("--coverage", action="store_true", help="branch coverage of the hub's handlers")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rng = seeded(args.seed)
    recorded, kinds = record()
    print(f"recorded {len(kinds)} kinds of messages: {', '.join(kinds)}", flush=True)
    address = free_address()
    http = []
    data = tempfile.mkdtemp()
    command = ["-m", "weightbus.hub", "--address", address]
    if args.coverage:
        command[:0] = ["-m", "coverage", "run", "--branch", f"--data-file={data}/coverage"]
    log = Path(data, "hub.log")
    with log.open("wb") as stderr:
        hub = start_python(*command, cwd=ROOT, stderr=stderr)
    try:
        while not listens(address):
            time.sleep(0.1)
        loop = Loop(address)
        with weightbus.Client(address, timeout_s=60) as client:
            while (client.status().version or 0) < 3:
                time.sleep(0.2)
            time.sleep(args.alone_s)
            begun, before = time.time(), resident(hub.pid)
            port = serve_http(address, http)
            result = attack(address, args.messages, recorded, rng, hub, client, port, http[0].pid)
            ended = time.time()
            done = loop.end()
            result |= summary(done, client.status(), begun, ended)
            result["rss_alone_mb"] = round(before / 1e6, 1)
    finally:
        http_ended = [process.poll() for process in http]
        for process in http:
            process.terminate()
            process.wait(30)
        hub.send_signal(signal.SIGTERM)
        code = hub.wait(30)
        if code:
            print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-20:]), file=sys.stderr)
    result |= {"recorded_kinds": kinds, "hub_exit": code, "seed": args.seed}
    if args.coverage:
        result["coverage"] = branch_coverage(data)
    print(json.dumps(result, indent=2))
    if args.json:
        from record import surroundings

        Path(args.json).write_text(json.dumps(surroundings() | result, indent=2) + "\n")
    failed = result["loop_failures"] or result["wrong_weights"] or result["handler_errors"] or code
    failed = failed or http_ended != [None] or result["health_max_s"] > STUCK_S
    grown = result["rss_max_mb"] - result["rss_alone_mb"]
    slower = result["loop_p50_ms"] / result["alone_p50_ms"]
    return 1 if failed or grown > MAX_GROWN_MB or slower > MAX_SLOWER else 0


class Attack:
    """Messages over several connections, of which some read and some do not, and connections by hand."""

    def __init__(self, address, recorded, rng, hub, http):
        self._address, self._recorded, self._rng, self._hub = address, recorded, rng, hub
        host, port = address.removeprefix("tcp://").split(":")
        self._tcp, self._http = (host, int(port)), ("127.0.0.1", http)
        self._context = zmq.Context()
        self._readers = [self._connected(STUCK_S) for _ in range(6)]
        self._deaf = [self._connected(0.1) for _ in range(2)]
        self._opened = nuisances(address)
        self._kept = deque()
        self.counts = Counter()
        self.rss, self.health_s = [resident(hub.pid)], []

    def _connected(self, patience_s):
        one = self._context.socket(zmq.DEALER)
        one.linger, one.sndtimeo, one.sndhwm, one.rcvhwm = 0, round(patience_s * 1000), 200, 200
        one.connect(self._address)
        return one

    def step(self, number):
        rng = self._rng
        if number % RAW_EACH == 0:
            self._by_hand()
        elif rng.random() < 0.25:
            self._to_deaf(rng.randrange(len(self._deaf)), self._frames(number))
        else:
            self._send(rng.choice(self._readers), self._frames(number))
        if number % LONG_EACH == 0:
            # The connection is cut, and makes itself again; what is just short enough is only refused.
            self._send(rng.choice(self._readers), [wire.HEADER, bytes(1 << 20)])
            self._send(rng.choice(self._readers), [wire.HEADER, b"\x91" * 200_000])
            self.counts["over_long"] += 1
        if number % READ_EACH == 0:
            for one in self._readers:
                while one.poll(0):
                    one.recv_multipart()
        if number % LOOK_EACH == 0:
            self._look(number)
        if number % HEALTH_EACH == 0:
            self.health_s.append(health(self._http))

    def _frames(self, number):
        self.counts["valid_msgpack"] += number % 2
        return (structured if number % 2 else broken)(self._recorded, self._rng)

    def _by_hand(self):
        rng = self._rng
        kind = rng.choice(("hub_zmtp", "hub_zmtp", "hub_http", "http_http"))
        sent = raw_sockets.zmtp(rng, self._recorded) if kind == "hub_zmtp" else raw_sockets.http(rng)
        kept = self._kept if rng.randrange(KEPT_EACH) == 0 else None
        raw_sockets.connect(self._http if kind == "http_http" else self._tcp, sent, kept)
        self.counts[f"raw_{kind}"] += 1

    def _send(self, one, frames):
        try:
            one.send_multipart(frames)
        except zmq.Again:
            self._alive()
            raise SystemExit(f"the hub has taken nothing of a connection that reads for {STUCK_S} s") from None

    def _to_deaf(self, which, frames):
        """The hub cuts those who do not read; theirs can't send any more, and are made again."""
        try:
            self._deaf[which].send_multipart(frames)
        except zmq.Again:
            self._deaf[which].close(0)
            self._deaf[which] = self._connected(0.1)
            self.counts["deaf_and_cut"] += 1

    def _look(self, number):
        self._alive()
        self.rss.append(resident(self._hub.pid))
        if number % 100_000 == 0:
            print(f"{number} messages, {self.rss[-1] / 1e6:.0f} MB", flush=True)

    def _alive(self):
        if self._hub.poll() is not None:
            raise SystemExit(f"the hub has ended with {self._hub.returncode}")

    def close(self):
        for one in self._readers + self._deaf:
            one.close(0)
        self._context.term()
        for connection in [*self._opened, *self._kept]:
            connection.close()


def health(address):
    """Seconds until the HTTP server has answered, among all that it is sent; infinite if it does not."""
    begun = time.monotonic()
    try:
        with socket.create_connection(address, timeout=STUCK_S) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            answered = connection.recv(9) == b"HTTP/1.1 "
    except OSError:
        answered = False
    return time.monotonic() - begun if answered else math.inf


def attack(address, count, recorded, rng, hub, client, http, http_pid):
    """What ``count`` messages and connections cost."""
    before, http_before = client.status().counts, resident(http_pid)
    one = Attack(address, recorded, rng, hub, http)
    begun = time.monotonic()
    for number in range(1, count + 1):
        one.step(number)
    seconds = time.monotonic() - begun
    time.sleep(2)
    after = client.status().counts
    one.close()
    tenth = one.rss[: max(1, len(one.rss) // 10)]
    return {
        "messages": count,
        "of_them": dict(sorted(one.counts.items())),
        "seconds": round(seconds, 1),
        "counts": {key: after[key] - before.get(key, 0) for key in sorted(after)},
        "rss_begin_mb": round(one.rss[0] / 1e6, 1),
        "rss_tenth_mb": round(tenth[-1] / 1e6, 1),
        "rss_max_mb": round(max(one.rss) / 1e6, 1),
        "rss_end_mb": round(resident(hub.pid) / 1e6, 1),
        "http_rss_begin_mb": round(http_before / 1e6, 1),
        "http_rss_end_mb": round(resident(http_pid) / 1e6, 1),
        "health_asked": len(one.health_s),
        "health_max_s": round(max(one.health_s, default=0.0), 3),
    }


def serve_http(address, started):
    """The port of ``weightbus http`` beside the hub."""
    port = int(free_address().rsplit(":", 1)[1])
    command = ("-m", "weightbus", "http", "--hub", address, "--port", port)
    started.append(start_python(*command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    deadline = time.monotonic() + 60
    while not listens(f"tcp://127.0.0.1:{port}"):
        if time.monotonic() > deadline:
            raise SystemExit("weightbus http did not begin")
        time.sleep(0.2)
    return port


def summary(done, status, begun, ended):
    times, failures, version = done["trainer"]
    _, wrong, _ = done["server"]
    ordered = sorted(seconds for at, seconds in times if begun <= at <= ended)
    alone = sorted(seconds for at, seconds in times if at < begun)[2:]
    return {
        "alone_updates": len(alone),
        "alone_p50_ms": round(statistics.median(alone) * 1e3, 2),
        "loop_updates": len(ordered),
        "loop_failures": failures,
        "wrong_weights": wrong,
        "loop_version": version,
        "loop_p50_ms": round(statistics.median(ordered) * 1e3, 2),
        "loop_p99_ms": round(ordered[int(0.99 * len(ordered))] * 1e3, 2),
        "loop_max_ms": round(ordered[-1] * 1e3, 2),
        "handler_errors": status.counts.get("errors", 0),
    }


def branch_coverage(data):
    """Share of lines and branches, by module, in percent."""
    made = ("-m", "coverage", "json", "-q", f"--data-file={data}/coverage", "-o", f"{data}/coverage.json")
    run_python(*made, cwd=ROOT).check_returncode()
    files = json.loads(Path(data, "coverage.json").read_text())["files"]
    found = {}
    for path, entry in files.items():
        if Path(path).parent.name in ("hub", "control"):
            total = entry["summary"]
            found[path] = {
                "lines": f"{total['covered_lines']}/{total['num_statements']}",
                "branches": f"{total['covered_branches']}/{total['num_branches']}",
                "percent": round(total["percent_covered"], 1),
            }
    return found


if __name__ == "__main__":
    raise SystemExit(main())
