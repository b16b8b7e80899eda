"""Each byte to the rank that needs it, beside a broadcast of the whole model to all.

    python benchmarks/reshard.py --json benchmarks/results/reshard-cpu.json                      # needs root
    torchrun --nproc-per-node 2 benchmarks/reshard.py --json benchmarks/results/reshard-h200.json

On the CPU 4 trainer ranks with FSDP's rows, and 4 tensor-parallel server ranks, or two replicas of 2. Each rank
is on a host of its own: network namespaces on one bridge, whose links carry ``--mbit`` in each direction (tbf).
Bytes are those of the interface, less 66 for each packet. Under torchrun two processes: each a trainer
rank, with half of the rows, and a tensor-parallel server rank (``both ends``; ``reversed``: in the opposite
order, so that hardly anything stays); or one with the whole model that serves half of it, and one that serves
the rest (``half``).

In turn, plain and verified: the routes; and ``raw``: what has to move, in one message for each pair of ranks,
by grouped send and receive. Times are of the slowest rank, from a barrier. Bits first: all of the target is
compared after the first update of each kind, and after the last.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
import torch.distributed as dist
from colocated import SPLIT_INPUT, WIRE, Place
from rich.console import Console
from rich.table import Table
from shapes import MODELS, Shapes
from timing import timings
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import weightbus

CLONE_NEWNET = 0x40000000
HEADERS = 66  # Ethernet, IP, and TCP with time stamps
HOSTS = 8
NETWORK, PORT = "10.79.0", 29500

ROUTES = ("reshard", "broadcast")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Trainer ranks, and the server ranks of each replica, by the rank of the process."""

    trainers: list[int]
    replicas: list[list[int]]
    routes: tuple[str, ...] = ROUTES


GPU_CASES = {
    "both ends": Layout(trainers=[0, 1], replicas=[[0, 1]]),
    "reversed": Layout(trainers=[0, 1], replicas=[[1, 0]]),
    "half": Layout(trainers=[0], replicas=[[0, 1]]),
}
CPU_CASES = {
    "fsdp4 to tp4": Layout(trainers=[0, 1, 2, 3], replicas=[[4, 5, 6, 7]]),
    "fsdp4 to two of tp2": Layout(trainers=[0, 1, 2, 3], replicas=[[4, 5], [6, 7]], routes=("reshard",)),
}


def split_of(name: str, shape: tuple[int, ...]) -> int | None:
    if len(shape) < 2:
        return None
    return 1 if name.endswith(SPLIT_INPUT) else 0


class Bus:
    """One route between the tensors: what this process is of it."""

    def __init__(self, case: Case, route: str, address: str) -> None:
        self.case, self.version = case, 0
        options: dict[str, Any] = {"address": address, "insecure": True}
        self.publisher = self.subscriber = None
        if case.trains is not None:
            self.publisher = weightbus.Publisher(
                case.sources(),
                rank=case.trains,
                size=len(case.layout.trainers),
                min_replicas=len(case.layout.replicas),
                route=route,
                **options,
            )
        if case.serves is not None:
            self.subscriber = weightbus.Subscriber(
                case.targets(),
                replica=case.replica,
                rank=case.serves,
                replica_size=case.parts,
                **options,
            )

    def update(self, *, verify: bool) -> None:
        self.version += 1
        if self.publisher is not None:
            word = self.publisher.update(self.version, verify=verify).word
            if word != ("verified" if verify else "unverified"):
                raise SystemExit(f"expected an update, got {word}")
        elif self.subscriber is not None:
            self.subscriber.wait(self.version)

    def close(self) -> None:
        for end in (self.publisher, self.subscriber):
            if end is not None:
                end.close()


class Case:
    """Which ranks train and which serve, their shards, and all that is timed between them."""

    def __init__(self, place: Place, shapes: Shapes, layout: Layout, host: str) -> None:
        self.place, self.shapes, self.layout = place, shapes, layout
        self.parts = len(layout.replicas[0])
        self.trains = layout.trainers.index(place.rank) if place.rank in layout.trainers else None
        self.replica = next((i for i, ranks in enumerate(layout.replicas) if place.rank in ranks), None)
        self.serves = None if self.replica is None else layout.replicas[self.replica].index(place.rank)
        device = place.device.type  # a mesh is made by all ranks, its own or not
        self.mesh = DeviceMesh(device, layout.trainers) if len(layout.trainers) > 1 else None
        self.meshes = [DeviceMesh(device, ranks) for ranks in layout.replicas]
        self.rows = {} if self.trains is None else {n: self.row(n, self.trains) for n in shapes}
        self.target = {} if self.serves is None else {n: torch.zeros_like(self.shard(n)) for n in shapes}
        self.sends, self.receives = self.messages()
        ports: list[Any] = [None]
        first = layout.trainers[0]
        if place.rank == first:
            ports[0] = [free_port(host) for _ in layout.routes]
        dist.broadcast_object_list(ports, src=first)
        self.buses = {
            route: Bus(self, route, f"tcp://{host}:{port}")
            for route, port in zip(layout.routes, ports[0], strict=True)
        }

    def drawn(self, name: str) -> Tensor:
        generator = torch.Generator(device=self.place.device).manual_seed(list(self.shapes).index(name))
        return torch.randn(self.shapes[name], generator=generator, device=self.place.device).to(WIRE)

    def row(self, name: str, index: int) -> Tensor:
        return self.drawn(name).chunk(len(self.layout.trainers), 0)[index].clone()

    def shard(self, name: str) -> Tensor:
        """What this server rank should hold."""
        whole, split = self.drawn(name), split_of(name, self.shapes[name])
        return whole if split is None else whole.chunk(self.parts, split)[self.serves or 0].contiguous()

    def sources(self) -> list[tuple[str, Tensor]]:
        if self.mesh is None:
            return list(self.rows.items())
        return [
            (n, DTensor.from_local(t, self.mesh, [Shard(0)], run_check=False)) for n, t in self.rows.items()
        ]

    def targets(self) -> list[tuple[str, Tensor]]:
        mesh, found = self.meshes[self.replica or 0], []
        for name, local in self.target.items():
            split = split_of(name, self.shapes[name])
            where = Replicate() if split is None else Shard(split)
            found.append((name, DTensor.from_local(local, mesh, [where], run_check=False)))
        return found

    def messages(self) -> tuple[list[Tensor], list[Tensor]]:
        """A buffer for each rank and from each, as long as what has to move."""
        size, trainers, replicas = self.place.size, self.layout.trainers, self.layout.replicas
        counts = torch.zeros(size, size, dtype=torch.float64)  # of elements, [from, to]
        for name, shape in self.shapes.items():
            split, elements = split_of(name, shape), torch.Size(shape).numel()
            for i, src in enumerate(trainers):
                for j in range(self.parts):
                    low, high = (j / self.parts, (j + 1) / self.parts) if split == 0 else (0.0, 1.0)
                    common = min((i + 1) / len(trainers), high) - max(i / len(trainers), low)
                    moved = elements * max(0.0, common) / (self.parts if split == 1 else 1)
                    for one in replicas:  # each gets its share, and gives that to the others
                        counts[src, one[j]] += moved / len(replicas)
                        for other in replicas:
                            counts[one[j], other[j]] += moved / len(replicas)
        counts = counts.round().to(torch.int64)
        counts.fill_diagonal_(0)
        self.moved_bytes = int(max(counts.sum(0).max(), counts.sum(1).max())) * WIRE.itemsize
        rank, device = self.place.rank, self.place.device
        return (
            [torch.zeros(int(counts[rank, other]), dtype=WIRE, device=device) for other in range(size)],
            [torch.zeros(int(counts[other, rank]), dtype=WIRE, device=device) for other in range(size)],
        )

    def raw(self) -> None:
        sends = [dist.P2POp(dist.isend, t, r) for r, t in enumerate(self.sends) if t.numel()]
        receives = [dist.P2POp(dist.irecv, t, r) for r, t in enumerate(self.receives) if t.numel()]
        for work in dist.batch_isend_irecv(sends + receives) if sends + receives else ():
            work.wait()

    def wrong(self) -> int:
        """How many tensors of the target differ in a bit, on all ranks; then they are zeroed."""
        count = 0
        for name, found in self.target.items():
            count += not torch.equal(found.view(torch.int16), self.shard(name).view(torch.int16))
            found.zero_()
        total = torch.tensor(count)
        dist.all_reduce(total)
        return int(total)

    def run(self, rounds: int) -> list[dict[str, Any]]:
        kinds: dict[str, Callable[[], None]] = {"raw": self.raw}
        for route, bus in self.buses.items():
            kinds[route] = lambda bus=bus: bus.update(verify=False)  # type: ignore[misc]
            kinds[f"{route}, verified"] = lambda bus=bus: bus.update(verify=True)  # type: ignore[misc]
        wrong, first, bytes_ = dict.fromkeys(list(kinds)[1:], 0), {}, {}
        for what, run in kinds.items():
            first[what] = self.place.time(run)
            if what != "raw":
                wrong[what] = self.wrong()
        seconds: dict[str, list[float]] = {what: [] for what in kinds}
        for number in range(rounds):
            for what in kinds if number % 2 == 0 else list(kinds)[::-1]:
                before = interface_bytes()
                seconds[what].append(self.place.time(kinds[what]))
                moved = [after - was for after, was in zip(interface_bytes(), before, strict=True)]
                bytes_[what] = self.gathered(moved)
        for route, bus in self.buses.items():
            bus.update(verify=True)
            wrong[f"{route}, verified"] += self.wrong()
        shards = self.gathered([sum(tensor.nbytes for tensor in self.target.values()), 0])
        rows = []
        for what, times in seconds.items():
            row = {"what": what, "moved_bytes": self.moved_bytes, **timings(times, seconds["raw"])}
            row |= {"first_s": first[what], "seconds": times}
            if what in wrong:
                row["wrong"] = wrong[what]
            if any(map(any, bytes_[what])):
                row |= {"received_bytes": [got for got, _ in bytes_[what]]}
                row |= {"sent_bytes": [sent for _, sent in bytes_[what]], "shard_bytes": [n for n, _ in shards]}
            rows.append(row)
        return rows

    def gathered(self, numbers: list[int]) -> list[list[int]]:
        """By rank."""
        found: list[Any] = [None] * self.place.size
        dist.all_gather_object(found, numbers)
        return found

    def close(self) -> None:
        for bus in self.buses.values():
            bus.close()


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def interface_bytes() -> list[int]:
    """Received and sent by this rank's interface, without headers; zeros where ranks share one."""
    folder = Path("/sys/class/net/eth0/statistics")
    if "WEIGHTBUS_HOST" not in os.environ:
        return [0, 0]

    def read(name: str) -> int:
        return int((folder / name).read_text())

    return [read(f"{way}_bytes") - HEADERS * read(f"{way}_packets") for way in ("rx", "tx")]


@contextmanager
def shaped_hosts(count: int, mbit: int) -> Iterator[list[str]]:
    """Namespaces on one bridge, each with a link of its own. This process enters the bridge's for good."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    names = [f"wbr{os.getpid() % 10000}x{i}" for i in range(count)]

    def run(command: str) -> None:
        subprocess.run(command.split(), check=True, timeout=10)  # noqa: S603 - ip and tc

    run("ip link set lo up")
    run("ip link add br0 type bridge")
    run("ip link set br0 up")
    try:
        for i, name in enumerate(names):
            run(f"ip netns add {name}")
            run(f"ip link add v{i} type veth peer name eth0 netns {name}")
            run(f"ip link set v{i} master br0")
            run(f"ip link set v{i} up")
            run(f"ip -n {name} addr add {NETWORK}.{i + 1}/24 dev eth0")
            run(f"ip -n {name} link set eth0 up")
            run(f"ip -n {name} link set lo up")
            shape = f"root tbf rate {mbit}mbit burst 256k latency 100ms"
            run(f"tc qdisc add dev v{i} {shape}")
            run(f"ip netns exec {name} tc qdisc add dev eth0 {shape}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=10)  # noqa: S603, S607 - as above


def start_ranks(args: argparse.Namespace) -> int:
    """This script again, on a host for each rank, as a launcher would start it."""
    size = HOSTS
    with shaped_hosts(size, args.mbit) as names:
        ranks = []
        for rank, name in enumerate(names):
            variables = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": f"{NETWORK}.1", "MASTER_PORT": PORT}
            variables |= {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": 1, "WEIGHTBUS_HOST": f"{NETWORK}.1"}
            environment = {**os.environ, **{key: str(value) for key, value in variables.items()}}
            command = ["ip", "netns", "exec", name, sys.executable, *sys.argv]
            ranks.append(subprocess.Popen(command, env=environment))  # noqa: S603 - this script
        try:
            return max(abs(process.wait(timeout=args.timeout_s)) for process in ranks)
        finally:
            for process in ranks:
                process.kill()


def show(rows: list[dict[str, Any]], model: str) -> None:
    table = Table(title=model)
    for column in ("case", "what", "p50 ms", "p99 ms", "of raw", "most received MB", "first ms", "#wrong"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["case"],
            row["what"],
            f"{row['p50_s'] * 1e3:.1f}",
            f"{row['p99_s'] * 1e3:.1f}",
            f"{row['of_raw']:.3f}",
            f"{max(row['received_bytes']) / 1e6:.1f}" if "received_bytes" in row else "",
            f"{row['first_s'] * 1e3:.0f}",
            str(row.get("wrong", "")),
        )
    Console(width=120).print(table)


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="each byte to the rank that needs it")
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b" if on_gpu else "qwen3-0.6b-few")
    parser.add_argument("--rounds", type=int, default=15 if on_gpu else 5)
    parser.add_argument("--mbit", type=int, default=300, help="of each link on the CPU")
    parser.add_argument("--timeout-s", type=float, default=1200.0, help="for all of it, on the CPU")
    parser.add_argument("--cases", nargs="+", choices=[*GPU_CASES, *CPU_CASES], help="of those that fit; all")
    parser.add_argument("--json", metavar="FILE", help="write the result")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        if on_gpu or os.geteuid() != 0:
            print("expected torchrun with two GPUs, or root, to make network namespaces")
            return 77
        return start_ranks(args)
    place = Place.of_environment()
    on_hosts = "WEIGHTBUS_HOST" in os.environ
    rows: list[dict[str, Any]] = []
    for name, layout in (CPU_CASES if on_hosts else GPU_CASES).items():
        if args.cases and name not in args.cases:
            continue
        case = Case(place, MODELS[args.model], layout, os.environ.get("WEIGHTBUS_HOST", "127.0.0.1"))
        try:
            rows += [{"case": name, **row} for row in case.run(args.rounds)]
        finally:
            case.close()
        del case
        if place.rank == 0:
            link = {"mbit": args.mbit} if on_hosts else {}
            record.write(args.json, "reshard", rows, model=args.model, ranks=place.size, **link)
    if place.rank == 0:
        show(rows, args.model)
    dist.destroy_process_group()
    return 1 if any(row.get("wrong") for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
