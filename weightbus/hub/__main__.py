"""``python -m weightbus.hub``: the hub as a process of its own, until it is stopped."""

from __future__ import annotations

import argparse
import contextlib
import logging
import resource
import signal

from weightbus.control.identity import ADDRESS_VARIABLE, address_of
from weightbus.control.keys import load_keys
from weightbus.control.messages import DEAD_AFTER_S
from weightbus.errors import HubError
from weightbus.hub.server import Hub

log = logging.getLogger("weightbus.hub")

# Descriptors that a hub process takes, if it may: three for each rank, and some.
MAX_DESCRIPTORS = 1 << 16


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="weightbus hub", description="Run the hub until it is stopped.")
    parser.add_argument("--address", help=f"tcp://host:port to listen on; else {ADDRESS_VARIABLE}")
    parser.add_argument("--ephemeral", action="store_true", help="leave with the last peer")
    parser.add_argument(
        "--dead-after", type=float, default=DEAD_AFTER_S, metavar="SECONDS", help="drop a silent peer after"
    )
    parser.add_argument("--keys", metavar="DIR", help="CURVE keys (weightbus keygen); else WEIGHTBUS_KEYS")
    parser.add_argument("--insecure", action="store_true", help="listen on any address without keys")
    options = parser.parse_args(arguments)
    # A hub that a trainer started has nobody who reads along.
    level = logging.ERROR if options.ephemeral else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s")
    try:
        keys = load_keys(options.keys, insecure=options.insecure)
        hub = Hub(
            address_of(options.address), ephemeral=options.ephemeral, dead_after_s=options.dead_after, keys=keys
        )
    except HubError as error:
        log.error("%s", error)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: hub.stop())
    _take_descriptors()
    hub.serve()
    return 0


def _take_descriptors() -> None:
    """As many as this process may have: connections of strangers take some of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    raise SystemExit(main())
