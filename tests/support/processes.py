"""Real processes for tests: jobs of ranks, each with a deadline, all gone at the end."""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

# A server that has imported torch once and forks: a rank starts in milliseconds, not in seconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
        "weightbus.publisher",
        "weightbus.subscriber",
    ]
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_address() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


def start_python(*arguments: object, **options: Any) -> subprocess.Popen[Any]:
    """This interpreter with ``arguments``; options are those of Popen."""
    return subprocess.Popen([sys.executable, *map(str, arguments)], **options)  # noqa: S603 - what tests say


def run_python(*arguments: object, timeout: float = 60.0, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same, to its end, with what it has printed."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)  # noqa: S603 - as above


def shared_memory_files() -> set[str]:
    """Without the semaphores of multiprocessing, which come and go with the tests beside this one."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}  # noqa: S108 - only listed


@dataclass(frozen=True, kw_only=True)
class Job:
    """``size`` ranks of ``run(rank, size, **arguments)``, with torchrun's variables unless ``bare``.

    fails: how many ranks may end with an exception or a signal; their result is the error's text.
    never_ends: its ranks are stopped on purpose; they are killed when all others have ended.
    on_one_gpu: all ranks use the first GPU, however many there are.
    """

    run: Callable[..., Any]
    size: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)
    bare: bool = False
    env: dict[str, str] = field(default_factory=dict)
    fails: int = 0
    never_ends: bool = False
    on_one_gpu: bool = False


def _devices(index: int, total: int, *, on_one: bool) -> dict[str, str]:
    """Variables that give each process a GPU. NCCL refuses two ranks on one GPU of one host, so where
    there are fewer GPUs than ranks, each is told to be a host of its own: real NCCL, over sockets."""
    found = 1 if on_one else max(1, torch.cuda.device_count())
    variables = {"LOCAL_DEVICE": str(index % found)}
    if total > found:
        variables |= {"NCCL_HOSTID": f"test-{index}", "NCCL_SOCKET_IFNAME": "lo"}
    return variables


def _main(pipe: Connection, job: Job, rank: int, port: int, devices: dict[str, str]) -> None:
    variables = {
        "RANK": rank,
        "WORLD_SIZE": job.size,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    for name, value in variables.items():
        os.environ.pop(name, None)
        if not job.bare:
            os.environ[name] = str(value)
    os.environ.update(devices | job.env)
    torch.set_num_threads(1)
    try:
        answer = (True, job.run(rank, job.size, **job.arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    # A Connection's own pickling would send tensors by shared memory that ends with this process.
    stream = io.BytesIO()
    torch.save(answer, stream)
    with contextlib.suppress(BrokenPipeError):
        pipe.send_bytes(stream.getvalue())
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries' exit handlers may wait for ranks that were killed on purpose.
    os._exit(0)


def run_jobs(*jobs: Job, timeout_s: float = 60.0) -> list[list[Any]]:
    """Results of each job's ranks. Any rank beyond ``fails`` that fails, or is late, fails the test."""
    deadline = time.monotonic() + timeout_s
    running: dict[Connection, tuple[int, int]] = {}
    processes = []
    results: list[list[Any]] = [[None] * job.size for job in jobs]
    failures: list[list[str]] = [[] for _ in jobs]
    try:
        for j, job in enumerate(jobs):
            port = free_port()
            for rank in range(job.size):
                devices = _devices(len(processes), sum(job.size for job in jobs), on_one=job.on_one_gpu)
                ours, theirs = _context.Pipe(duplex=False)
                process = _context.Process(target=_main, args=(theirs, job, rank, port, devices), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                running[ours] = (j, rank)
        while any(not jobs[j].never_ends for j, _ in running.values()):
            ready = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = [f"job {j} rank {rank}" for j, rank in sorted(running.values())]
                raise AssertionError(f"late: {late}; failures: " + "\n".join(itertools.chain(*failures)))
            for pipe in ready:
                assert isinstance(pipe, Connection)
                j, rank = running.pop(pipe)
                try:
                    good, value = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
                except (EOFError, ConnectionResetError):
                    good, value = False, "died without a word"
                pipe.close()
                results[j][rank] = value
                if not good:
                    failures[j].append(f"job {j} rank {rank}:\n{value}")
                    # One failure often brings others: a moment more shows which came first.
                    deadline = (
                        min(deadline, time.monotonic() + 2.0) if len(failures[j]) > jobs[j].fails else deadline
                    )
        for job, failed in zip(jobs, failures, strict=True):
            assert len(failed) == job.fails, f"expected {job.fails} failed ranks, got:\n" + "\n".join(
                itertools.chain(*failures)
            )
        return results
    finally:
        for pipe in running:
            pipe.close()
        for process in processes:
            if process.is_alive() and not running:
                process.join(5)
            if process.is_alive():
                process.kill()
            process.join(5)
            process.close()
