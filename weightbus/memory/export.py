"""What memory that other processes read has in common, be it a GPU's or the host's."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

from weightbus.errors import WeightbusError
from weightbus.memory.shard import Part
from weightbus.planning.exports import Exports

Parts = Mapping[str, Sequence[Part]]


class IpcError(WeightbusError):
    """Memory that can't be given to another process, or not be read here; the text says why."""


@cache
def host_id() -> str:
    """The same for all processes of one running kernel, and for no others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def device_id(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


class Export(Protocol):
    """One trainer rank's parts, open to readers until ``close``."""

    exports: Exports

    def moved(self) -> bool:
        """Whether readers would see memory that is no longer the source's."""

    def pack(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Make what readers see of these tensors the source's present values. dtypes: as readers want them."""

    def opened(self) -> None:
        """No further reader will come."""

    def close(self) -> None: ...
