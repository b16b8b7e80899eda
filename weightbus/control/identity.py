"""Which job a process belongs to, where its hub is, and which process it is. Imports no torch.

Library, command line and examples read the same environment: ``WEIGHTBUS_JOB`` and ``WEIGHTBUS_ADDRESS``.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import time

from weightbus.control import messages as m
from weightbus.errors import SpecError

DEFAULT_ADDRESS = "tcp://127.0.0.1:5757"

JOB_VARIABLE = "WEIGHTBUS_JOB"
ADDRESS_VARIABLE = "WEIGHTBUS_ADDRESS"


def job_of(given: str | None) -> str:
    """The job's name: as given, else of the environment, else empty. Raises SpecError for one that is none."""
    name = os.environ.get(JOB_VARIABLE, "") if given is None else given
    if not isinstance(name, str) or not re.search(m.JOB_PATTERN, name):
        raise SpecError(f"job: expected at most 64 of the characters A-Z a-z 0-9 . _ / : @ + -, got {name!r}")
    return name


def address_of(given: str | None) -> str:
    """The hub's address: as given, else of the environment, else this host's default."""
    return given or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS


def host_name() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:255]


@functools.lru_cache(maxsize=4)
def _started(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as stat, open("/proc/stat") as of_host:
            ticks = int(stat.read().rsplit(")", 1)[1].split()[19])
            boot = next(int(line.split()[1]) for line in of_host if line.startswith("btime "))
    except (OSError, ValueError, IndexError, StopIteration):
        return time.time()  # this system does not tell: since it first asked
    return boot + ticks / os.sysconf("SC_CLK_TCK")


def is_running(pid: int, started: float) -> bool:
    """Whether the process of this host that started then still runs; True where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as stat:
            state = stat.read().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return not os.path.exists("/proc/self/stat")
    except (OSError, IndexError):
        return True
    return state not in "ZX" and abs(_started.__wrapped__(pid) - started) < 1.0


def process_started() -> float:
    """When this process started, as Unix time; a process that was forked has its own."""
    return _started(os.getpid())
