"""Backends of torch.distributed used directly, so that no default group is made or touched.

torch's private names here: ``ProcessGroupGloo._Options`` and its fields, ``_start_coalescing`` and
``_end_coalescing``; that gloo's ranks tell each other their addresses as the bytes of ``sockaddr``, under keys
that end with the rank; and what lies before these bytes.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, TimeoutError
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from weightbus.control.keys import host_and_port

# gloo's ranks, once each knows where the others are, have connected after so long, or never will.
CONNECT_S = 10.0


def local_address(hub_address: str) -> str:
    """This host's address on the way to the hub: where the other ranks can reach it."""
    host, port = host_and_port(hub_address)
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(ipaddress.ip_address(probe.getsockname()[0]))


def gloo_backend(store: Any, rank: int, size: int, timeout_s: float, hub_address: str) -> Any:
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=min(timeout_s, CONNECT_S))  # transfers have their own
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    options._devices = [
        ProcessGroupGloo.create_device(interface=interface)
        if interface
        else ProcessGroupGloo.create_device(hostname=local_address(hub_address))
    ]
    # Transfers run in order anyway; a second thread only takes turns with the first.
    options._threads = 1
    return ProcessGroupGloo(store, rank, size, options)


def told_address(value: bytes) -> tuple[str, int] | None:
    """Where a rank of gloo's listens, by what it has told the others; None for what can't be read.

    value: the host's name and the ``sockaddr``, each behind its length in 8 bytes.
    """
    with contextlib.suppress(struct.error, ValueError, OverflowError):
        at = 16 + int(struct.unpack_from("=Q", value)[0])
        (family,), (port,) = struct.unpack_from("=H", value, at), struct.unpack_from(">H", value, at + 2)
        found = {socket.AF_INET: value[at + 4 : at + 8], socket.AF_INET6: value[at + 8 : at + 24]}
        if family in found and port:
            return str(ipaddress.ip_address(found[family])), port
    return None


def cut(addresses: Iterable[bytes]) -> int:
    """Shut down this process's connections of gloo's; how many. What is under way over them fails at once.

    Otherwise nothing ends a receive but the sender, and the backend can't be given up before. addresses: what
    gloo's ranks have told each other.
    """
    told, count = list(addresses), 0
    for name in os.listdir("/proc/self/fd") if told and os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # not a socket, not connected, closed meanwhile
            connection = socket.socket(fileno=int(name))
            try:
                ends = [_sockaddr(connection.getsockname()), _sockaddr(connection.getpeername())]
                if connection.type == socket.SOCK_STREAM and any(end in one for end in ends for one in told):
                    connection.shutdown(socket.SHUT_RDWR)
                    count += 1
            finally:
                connection.detach()
    return count


def _sockaddr(address: Any) -> bytes:
    """As the kernel has it: family, port, and the IP address. Raises OSError for anything else."""
    if not isinstance(address, tuple):
        raise OSError("not an IP address")
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    family, flow = (socket.AF_INET, b"") if ip.version == 4 else (socket.AF_INET6, bytes(4))
    return struct.pack("=H", family) + struct.pack(">H", address[1]) + flow + ip.packed


def nccl_backend(store: Any, rank: int, size: int, timeout_s: float, device: torch.device) -> Any:
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    # The watchdog ends the whole process when this passes, so it lies far above our own deadlines.
    options._timeout = timedelta(seconds=10 * timeout_s + 600)
    backend = ProcessGroupNCCL(store, rank, size, options)
    backend.eager_connect_single_device(device)
    return backend


def broadcast(
    backend: Any, buffers: Sequence[tuple[torch.Tensor, int]], device: torch.device, timeout_s: float
) -> list[Any]:
    """Start a broadcast of each buffer from its rank; their works.

    On CUDA they are one NCCL group in the current stream itself, which is all that need be waited for.
    """
    cuda = device.type == "cuda"
    if not cuda:
        return [backend.broadcast([buffer], _options(src, True, timeout_s)) for buffer, src in buffers]
    backend._start_coalescing()
    try:
        for buffer, src in buffers:
            backend.broadcast([buffer], _options(src, False, timeout_s))
    finally:
        backend._end_coalescing()
    return []


def exchange(
    backend: Any,
    sends: Sequence[tuple[torch.Tensor, int]],
    receives: Sequence[tuple[torch.Tensor, int]],
    device: torch.device,
    timeout_s: float,
) -> list[Any]:
    """Start messages to and from ranks; their works.

    On CUDA they are one NCCL group, for which the current stream waits; the host does not.
    """
    if device.type != "cuda":
        works = [backend.recv([buffer], src, 0) for buffer, src in receives]
        works += [backend.send([buffer], dst, 0) for buffer, dst in sends]
        return [_Messages(works, timeout_s)]
    backend._start_coalescing()
    try:
        for buffer, dst in sends:
            backend.send([buffer], dst, 0)
        for buffer, src in receives:
            backend.recv([buffer], src, 0)
    finally:
        work = backend._end_coalescing()
    work.wait()  # NCCL's own stream has done them
    return []


class _Messages:
    """gloo's works for messages, as one. A wait for them that is over breaks all connections, and they don't
    say whether they are completed: so a thread waits, and others for it."""

    def __init__(self, works: list[Any], timeout_s: float) -> None:
        self._done = Future[None]()
        threading.Thread(
            target=self._wait,
            args=(works, timedelta(seconds=timeout_s)),
            name="weightbus-messages",
            daemon=True,
        ).start()

    def _wait(self, works: list[Any], timeout: timedelta) -> None:
        try:
            for work in works:
                work.wait(timeout)
        except BaseException as error:
            self._done.set_exception(error)
        else:
            self._done.set_result(None)

    def is_completed(self) -> bool:
        return self._done.done()

    def wait(self, timeout: timedelta | None = None) -> None:
        """Raises RuntimeError if a message failed, or if the time is over."""
        try:
            self._done.result(None if timeout is None else timeout.total_seconds())
        except TimeoutError as error:
            raise RuntimeError("not done in time") from error


@cache
def _options(src: int, is_async: bool, timeout_s: float) -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = src
    options.rootTensor = 0
    options.asyncOp = is_async
    options.timeout = timedelta(seconds=timeout_s)
    return options
