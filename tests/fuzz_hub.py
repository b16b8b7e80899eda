"""A long run of bad frames against a live hub, with an update loop going on beside it.

    python tests/fuzz_hub.py --messages 1000000
    python tests/fuzz_hub.py --messages 100000 --coverage

First a session of real ranks and a client is recorded at one hub; then another hub is sent messages, half of
them valid msgpack mutated from that record (or played again), half of them broken in other ways, and every
twentieth is a raw connection: ZMTP of every version by hand, or HTTP, which a ``weightbus http`` beside the hub
gets, too. Meanwhile a trainer and a server update and check through it without a pause, as they did alone
before. Idle, garbage and never-reading connections are kept open. Exits with 1 if an update or check fails, the
hub ends, its memory grows, or updates become slow.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import raw_sockets
import torch
import zmq
from mutations import broken, structured
from processes import free_address

import weightbus
from weightbus import wire
from weightbus.hub import Hub
from weightbus.start import listens

ROOT = Path(__file__).parent.parent
HANDLERS = (
    "hub",
    "wire",
    "protocol",
    "roster",
    "requests",
    "rebuild",
    "rendezvous",
    "overview",
    "guard",
    "unfinished",
    "tasks",
)

# Of eight connections that send, so many read what they are answered.
READERS = 6

# One of so many is a connection by hand.
RAW_EACH = 20

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
    rng = random.Random(args.seed)
    recorded, kinds = record()
    print(f"recorded {len(kinds)} kinds of messages: {', '.join(kinds)}", flush=True)
    address = free_address()
    http = []
    data = tempfile.mkdtemp()
    command = [sys.executable, "-m", "weightbus.hub", "--address", address]
    if args.coverage:
        command[1:1] = ["-m", "coverage", "run", "--branch", f"--data-file={data}/coverage"]
    hub = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while not listens(address):
            time.sleep(0.1)
        loop = Loop(address)
        with weightbus.Client(address, timeout_s=60) as client:
            while (client.status().version or 0) < 3:
                time.sleep(0.2)
            time.sleep(args.alone_s)
            begun, before = time.time(), resident(hub.pid)
            result = attack(address, args.messages, recorded, rng, hub, client, serve_http(address, http))
            ended = time.time()
            done = loop.end()
            result |= summary(done, client.status(), begun, ended)
            result["rss_alone_mb"] = round(before / 1e6, 1)
    finally:
        for process in http:
            process.terminate()
            process.wait(30)
        hub.send_signal(signal.SIGTERM)
        code = hub.wait(30)
    result |= {"recorded_kinds": kinds, "hub_exit": code, "seed": args.seed}
    if args.coverage:
        result["coverage"] = branch_coverage(data)
    print(json.dumps(result, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    failed = result["loop_failures"] or result["wrong_weights"] or result["handler_errors"] or code
    grown = result["rss_max_mb"] - result["rss_alone_mb"]
    slower = result["loop_p50_ms"] / result["alone_p50_ms"]
    return 1 if failed or grown > MAX_GROWN_MB or slower > MAX_SLOWER else 0


def attack(address, count, recorded, rng, hub, client, http):
    """Send ``count`` messages over several connections, of which some read, some do not."""
    context = zmq.Context()

    def connected():
        one = context.socket(zmq.DEALER)
        one.linger, one.sndtimeo, one.sndhwm, one.rcvhwm = 0, 20_000, 200, 200
        one.connect(address)
        return one

    sockets = [connected() for _ in range(8)]
    opened = nuisances(address)
    before = client.status().counts
    rss, begun, valid, cut, deaf = [resident(hub.pid)], time.monotonic(), 0, 0, 0
    tenth = raw = 0
    host, port = address.removeprefix("tcp://").split(":")
    for number in range(count):
        if number % RAW_EACH == 0:
            raw += 1
            to_http = http and rng.random() < 0.3
            sent = raw_sockets.http(rng) if rng.random() < 0.5 or to_http else raw_sockets.zmtp(rng, recorded)
            raw_sockets.connect(("127.0.0.1", http) if to_http else (host, int(port)), sent)
            continue
        make = structured if number % 2 else broken
        valid += number % 2
        which = rng.randrange(len(sockets))
        one = sockets[which]
        if which >= READERS:
            # The hub cuts those who do not read; theirs can't send any more, and are made again.
            one.sndtimeo = 100
        try:
            one.send_multipart(make(recorded, rng))
        except zmq.Again:
            if which < READERS:
                raise
            one.close(0)
            one = sockets[which] = connected()
            deaf += 1
        if number % 64 == 0:
            for reading in sockets[:READERS]:
                while reading.poll(0):
                    reading.recv_multipart()
        if number % 2000 == 0:
            rss.append(resident(hub.pid))
            if hub.poll() is not None:
                raise SystemExit(f"the hub has ended with {hub.returncode} after {number} messages")
        if number % 20_000 == 19_999 and which < READERS:
            # Longer than a frame may be: the connection is cut, and makes itself again.
            one.send_multipart([wire.HEADER, bytes(1 << 20)])
            cut += 1
            sockets[0].send_multipart([wire.HEADER, b"\x91" * 200_000])
        if number == count // 10:
            tenth = resident(hub.pid)
        if number % 100_000 == 99_999:
            print(
                f"{number + 1} messages, {rss[-1] / 1e6:.0f} MB, {time.monotonic() - begun:.0f} s", flush=True
            )
    seconds = time.monotonic() - begun
    time.sleep(2)
    after = client.status().counts
    for one in sockets:
        one.close(0)
    context.term()
    for connection in opened:
        connection.close()
    return {
        "messages": count,
        "of_them_valid_msgpack": valid,
        "of_them_raw_connections": raw,
        "over_long": cut,
        "connections_that_never_read_and_were_cut": deaf,
        "seconds": round(seconds, 1),
        "counts": {key: after[key] - before.get(key, 0) for key in sorted(after)},
        "rss_begin_mb": round(rss[0] / 1e6, 1),
        "rss_tenth_mb": round(tenth / 1e6, 1),
        "rss_max_mb": round(max(rss) / 1e6, 1),
        "rss_end_mb": round(resident(hub.pid) / 1e6, 1),
    }


def serve_http(address, started):
    """The port of ``weightbus http`` beside the hub."""
    port = int(free_address().rsplit(":", 1)[1])
    command = [sys.executable, "-m", "weightbus", "http", "--hub", address, "--port", str(port)]
    started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
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
    subprocess.run(
        [
            sys.executable,
            "-m",
            "coverage",
            "json",
            "-q",
            f"--data-file={data}/coverage",
            "-o",
            f"{data}/coverage.json",
        ],
        check=True,
        cwd=ROOT,
    )
    files = json.loads(Path(data, "coverage.json").read_text())["files"]
    found = {}
    for path, entry in files.items():
        name = Path(path).stem
        if name in HANDLERS and Path(path).parent.name == "weightbus":
            total = entry["summary"]
            found[name] = {
                "lines": f"{total['covered_lines']}/{total['num_statements']}",
                "branches": f"{total['covered_branches']}/{total['num_branches']}",
                "percent": round(total["percent_covered"], 1),
            }
    return found


if __name__ == "__main__":
    raise SystemExit(main())
