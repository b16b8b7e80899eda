"""Backends of torch.distributed used directly, so that no default group is made or touched.

torch's private names here: ``ProcessGroupGloo._Options`` and its fields, ``_start_coalescing`` and
``_end_coalescing``.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from weightbus.keys import host_and_port


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
    options._timeout = timedelta(seconds=timeout_s)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    options._devices = [
        ProcessGroupGloo.create_device(interface=interface)
        if interface
        else ProcessGroupGloo.create_device(hostname=local_address(hub_address))
    ]
    # Transfers run in order anyway; a second thread only takes turns with the first.
    options._threads = 1
    return ProcessGroupGloo(store, rank, size, options)


def nccl_backend(store: Any, rank: int, size: int, timeout_s: float, device: torch.device) -> Any:
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    # The watchdog ends the whole process when this passes, so it lies far above our own deadlines.
    options._timeout = timedelta(seconds=10 * timeout_s + 600)
    backend = ProcessGroupNCCL(store, rank, size, options)
    backend.eager_connect_single_device(device)
    return backend


def broadcast(backend: Any, buffers: Sequence[tuple[torch.Tensor, int]], device: torch.device) -> list[Any]:
    """Start a broadcast of each buffer from its rank; their works.

    On CUDA they are one NCCL group in the current stream itself, which is all that need be waited for.
    """
    cuda = device.type == "cuda"
    if not cuda:
        return [backend.broadcast([buffer], _options(src, True)) for buffer, src in buffers]
    backend._start_coalescing()
    try:
        for buffer, src in buffers:
            backend.broadcast([buffer], _options(src, False))
    finally:
        backend._end_coalescing()
    return []


@cache
def _options(src: int, is_async: bool) -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = src
    options.rootTensor = 0
    options.asyncOp = is_async
    return options
