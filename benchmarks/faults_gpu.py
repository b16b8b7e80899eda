"""A server that is killed or stopped in mid-update: when the trainer has its answer, and what follows, as JSON.

python benchmarks/faults_gpu.py [--times 5] [--gb 8] [--json FILE]

By the broadcast route (NCCL) a trainer on GPU 0 and one server on GPU 1; by peer a second server beside the
trainer, which is to get the update in the same call. Each time the server on the last GPU is hurt at a random
moment of an update, and started again or let go on. Without GPUs: gloo, and shared memory, to try the program.
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
import time
from multiprocessing.connection import Connection
from typing import Any

import record
import torch

import weightbus

DEAD_AFTER_S = 2.0
TENSORS = 64
ENDS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def tensors_on(device: str, nbytes: float) -> list[tuple[str, torch.Tensor]]:
    rows = max(1, int(nbytes / TENSORS / 2 / 4096))
    return [(f"w{i:02}", torch.zeros(rows, 4096, dtype=torch.bfloat16, device=device)) for i in range(TENSORS)]


def trainer(pipe: Connection, address: str, device: str, route: Any, nbytes: float) -> None:
    source = tensors_on(device, nbytes)
    with weightbus.Publisher(
        source, address=address, rank=0, size=1, route=route, dead_after_s=DEAD_AFTER_S, join_timeout_s=60.0
    ) as publisher:
        while (version := pipe.recv()) is not None:
            for index, (_, tensor) in enumerate(source):
                tensor.fill_((version + index) % 251)
            if device != "cpu":
                torch.cuda.synchronize()
            pipe.send("calling")
            begun = time.monotonic()
            try:
                replicas, word, text = list(publisher.update(version).replicas), "ok", ""
            except weightbus.WeightbusError as error:
                replicas, word, text = [], type(error).__name__, str(error)
            free = torch.cuda.mem_get_info()[0] if device != "cpu" else 0
            fds = len(os.listdir("/proc/self/fd"))
            pipe.send((word, time.monotonic() - begun, replicas, text, {"free": free, "fds": fds}))


def server(pipe: Connection, address: str, device: str, replica: int, nbytes: float) -> None:
    """Says each state and version that it comes to, and whether all bits are right."""
    target = tensors_on(device, nbytes)
    told: Any = None
    with weightbus.Subscriber(target, address=address, replica=replica, rank=0, replica_size=1) as subscriber:
        pipe.send(("up", None, True))
        while not subscriber.left:
            subscriber.poll(0.05)
            state, version = subscriber.state, subscriber.version
            if (state, version) != told:
                told = (state, version)
                right = state != "ready" or all(
                    bool((t == ((version or 0) + i) % 251).all()) for i, (_, t) in enumerate(target)
                )
                pipe.send((state, version, right))


class Run:
    """One route: its processes, and what was seen."""

    def __init__(self, route: str, nbytes: float) -> None:
        self.context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        gpus = torch.cuda.device_count()
        self.places = ["cuda:0", f"cuda:{gpus - 1}"] if gpus else ["cpu", "cpu"]
        self.route, self.nbytes, self.version = route, nbytes, 0
        self.trainer, self.calls = self.start(trainer, self.places[0], route, nbytes)
        self.replicas = [1] if route == "broadcast" else [0, 1]
        self.servers = {replica: self.serve(replica) for replica in self.replicas}

    def start(self, run: Any, *arguments: Any) -> tuple[Any, Connection]:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=run, args=(theirs, self.address, *arguments), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def serve(self, replica: int) -> tuple[Any, Connection]:
        process, pipe = self.start(server, self.places[replica], replica, self.nbytes)
        pipe.recv()  # it is up
        return process, pipe

    def update(self, number: int | None = None, after_s: float = 0.0) -> dict[str, Any]:
        """number: a signal for the last server, so long after the call."""
        self.version += 1
        self.calls.send(self.version)
        self.calls.recv()  # it is about to call
        if number is not None:
            time.sleep(after_s)
            os.kill(self.servers[1][0].pid, number)
        hurt = time.monotonic()
        if not self.calls.poll(120):
            return {"word": "none", "seconds": 120.0, "after_s": 120.0, "replicas": [], "text": "", "used": {}}
        word, seconds, replicas, text, used = self.calls.recv()
        since = time.monotonic() - hurt
        return {
            "word": word,
            "seconds": seconds,
            "after_s": since,
            "replicas": replicas,
            "text": text,
            "used": used,
        }

    def settle(self, replica: int, timeout_s: float = 30.0) -> tuple[float, bool]:
        """Until the server has this version: seconds, and whether all it ever said was right."""
        begun, right = time.monotonic(), True
        while time.monotonic() - begun < timeout_s:
            if self.servers[replica][1].poll(0.05):
                state, version, good = self.servers[replica][1].recv()
                right &= good
                if (state, version) == ("ready", self.version):
                    return time.monotonic() - begun, right
        return timeout_s, False

    def hurt(self, how: str, usual_s: float) -> dict[str, Any]:
        seen = self.update(int(ENDS[how]), random.uniform(0.1, 0.9) * usual_s)  # noqa: S311 - a moment
        process = self.servers[1][0]
        if how == "kill":
            process.join()
            begun = time.monotonic()
            self.servers[1] = self.serve(1)
            seen["up_s"] = time.monotonic() - begun
        else:
            os.kill(process.pid, signal.SIGCONT)
        begun = time.monotonic()
        while True:  # it may be left out for some seconds
            following = self.update()
            if 1 in following["replicas"] or time.monotonic() - begun > 60.0:
                break
            time.sleep(0.2)
        seen["current_s"] = time.monotonic() - begun
        rights = [self.settle(replica)[1] for replica in self.replicas]
        return seen | {"how": how, "next": following["word"], "right": all(rights), "used": following["used"]}

    def close(self) -> None:
        self.calls.send(None)
        self.trainer.join(30)
        for process, _ in self.servers.values():
            process.join(30)
            process.kill()


def run(route: str, nbytes: float, times: int) -> list[dict[str, Any]]:
    one = Run(route, nbytes)
    try:
        calm = [one.update()["seconds"] for _ in range(6)]
        usual_s = statistics.median(calm[2:])
        return [
            {"route": route, "usual_s": usual_s} | one.hurt(how, usual_s) for how in ENDS for _ in range(times)
        ]
    finally:
        one.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--gb", type=float, default=8.0)
    parser.add_argument("--json")
    options = parser.parse_args()
    rows = [row for route in ("broadcast", "peer") for row in run(route, options.gb * 1e9, options.times)]
    for row in rows:
        print(json.dumps({key: value for key, value in row.items() if key != "text"}), flush=True)
    record.write(options.json, "faults_gpu", rows, dead_after_s=DEAD_AFTER_S, gb=options.gb)
    late = [row for row in rows if row["after_s"] > (2.0 if row["how"] == "kill" else DEAD_AFTER_S + 2.0)]
    wrong = [row for row in rows if not row["right"] or row["next"] != "ok"]
    print(f"{len(rows)} faults, {len(late)} late answers, {len(wrong)} wrong ends")
    return int(bool(wrong or late))


if __name__ == "__main__":
    raise SystemExit(main())
