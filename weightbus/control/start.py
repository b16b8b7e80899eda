"""Start a hub, in a process of its own, where none listens."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from weightbus.control.keys import Keys, host_and_port
from weightbus.control.messages import DEAD_AFTER_S
from weightbus.errors import HubError

log = logging.getLogger("weightbus")

START_HUB_S = 30.0

# Hubs that this process has started, by address.
_started: dict[str, subprocess.Popen[bytes]] = {}

# ``-m`` and ``-c`` look into the current directory first, where others may have put what they like. Here only
# what this process itself imports from counts, and weightbus's own place comes last.
_LAUNCH = (
    "import sys; sys.path[:] = [p for p in sys.path if p] + [sys.argv.pop(1)]; "
    "from weightbus.hub.__main__ import main; sys.exit(main())"
)


def ensure_hub(address: str, *, dead_after_s: float = DEAD_AFTER_S, keys: Keys | None = None) -> None:
    """Start a hub at ``address`` unless something listens there. Called by trainer rank 0.

    Returns once it listens. The hub leaves with its last peer. It gets the keys that this process has.
    Raises HubError with the hub's own words if it ends at once.
    """
    keys = keys or Keys()
    keys.check(address)
    if listens(address):
        return
    if keys.client and not keys.hub_secret:
        raise HubError(f"no hub listens at {address}, and this rank has no hub.secret to start one with")
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", _LAUNCH, root, "--address", address, "--ephemeral"]
    command += ["--dead-after", str(dead_after_s)]
    if keys.insecure:
        command.append("--insecure")
    env = {name: value for name, value in os.environ.items() if name != "WEIGHTBUS_KEYS"}
    if keys.directory is not None:
        command += ["--keys", str(keys.directory)]
    elif keys.hub_secret:
        # By the environment, which, unlike a command line, other users can't read.
        env["WEIGHTBUS_HUB_SECRET"] = keys.hub_secret
        env["WEIGHTBUS_ALLOWED"] = ",".join(keys.allowed)
    with tempfile.TemporaryFile() as words:
        # A session of its own: a signal to the trainer's process group must not end the hub before
        # the server ranks have heard of the trainer's end.
        hub = subprocess.Popen(  # noqa: S603 - this interpreter, arguments from above
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words,
            start_new_session=True,
            env=env,
        )
        deadline = time.monotonic() + START_HUB_S
        while not listens(address):
            if hub.poll() is not None and not listens(address):  # another job's has come first
                words.seek(0)
                said = words.read().decode(errors="replace").strip()
                raise HubError(f"no hub could be started at {address}: {said}")
            if time.monotonic() > deadline:
                hub.kill()
                raise HubError(f"the hub started at {address} did not listen within {START_HUB_S:.0f} s")
            time.sleep(0.02)
    _started[address] = hub
    # Reaps it, if it ends before this process, and keeps Python from warning of a process that still runs.
    threading.Thread(target=hub.wait, name="weightbus-hub-wait", daemon=True).start()


def end_hub(address: str) -> None:
    """End the hub at ``address`` if this process has started it: it listens and answers nobody, as one that was
    stopped. What it knew its ranks know, too."""
    hub = _started.pop(address, None)
    if hub is not None and hub.poll() is None:
        log.warning("the hub at %s (pid %d) answers no more; it is ended, and replaced", address, hub.pid)
        hub.kill()


def listens(address: str) -> bool:
    try:
        socket.create_connection(host_and_port(address), timeout=2.0).close()
    except OSError:
        return False
    return True
