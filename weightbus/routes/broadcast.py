"""The broadcast route: each transfer of a plan goes from one rank to all of the group."""

from __future__ import annotations

from typing import Any

from weightbus.routes.waves import Waves
from weightbus.tensors.bucket import Wave


class Broadcast(Waves):
    """One rank's execution of a plan of broadcasts."""

    def transfer(self, wave: Wave) -> list[Any]:
        return self.group.broadcast([(step.buffer, step.src) for step in wave.steps])
