"""A hub in a process of its own, to be attacked."""

from __future__ import annotations

import contextlib
import subprocess
import time

from processes import start_python

from weightbus.control.start import listens

FULL = """
import sys
from weightbus.hub.server import Hub
Hub(sys.argv[1]).serve()
"""


def tcp(address):
    host, port = address.removeprefix("tcp://").split(":")
    return host, int(port)


@contextlib.contextmanager
def served(address):
    """A hub in a process of its own, which may end; with the number of its descriptors."""
    hub = start_python("-c", FULL, address, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not listens(address):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield hub
    finally:
        hub.kill()
        hub.wait(10)
