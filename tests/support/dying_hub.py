"""A hub that kills itself (SIGKILL) at a chosen moment: python dying_hub.py ADDRESS VERSION MOMENT [SIGNAL].

MOMENT: a phase's name, as the hub enters it in the round of VERSION; or COMMIT, when the first rank has been
sent the outcome and the others have not; or LAST, the same but for the other end of the list. SIGNAL: another
one for itself, by number.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from weightbus.hub.coordinator import Phase
from weightbus.hub.server import Hub


def main(address: str, version: int, moment: str, number: int = signal.SIGKILL) -> None:
    hit = []

    def die() -> None:
        if not hit:
            hit.append(1)
            os.kill(os.getpid(), number)

    hub = Hub(address, ephemeral=True, dead_after_s=2.0)
    coordinator = hub.coordinator
    go_on, send, enter = coordinator._next, hub.sender.send, coordinator.enter
    sent = []

    def next_phase(round, phase, *rest):
        go_on(round, phase, *rest)
        if round.enter.version == version and phase is Phase.__members__.get(moment):
            hub._flush(time.monotonic())  # what opens the phase has been said
            time.sleep(0.05)
            die()

    def entered(message, now):
        enter(message, now)
        if message.version == version and moment == "ENTER":
            die()

    def sending(identity, frames, **more):
        outcome = b"outcome" in bytes(frames[1])[:40] and coordinator.committed >= version
        if outcome and moment == "LAST" and not sent:
            sent.append(1)
            return True  # the first rank is not told
        result = send(identity, frames, **more)
        if outcome and moment in ("COMMIT", "LAST"):
            time.sleep(0.1)
            die()
        return result

    coordinator._next, coordinator.enter, hub.sender.send = next_phase, entered, sending
    hub.serve()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
