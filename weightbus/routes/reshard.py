"""The reshard route: what a rank needs comes to it alone, from ranks that have it (docs/reshard.md)."""

from __future__ import annotations

from typing import Any

from weightbus.routes.waves import Waves
from weightbus.tensors.bucket import Wave


class Reshard(Waves):
    """One rank's execution of a plan of moves. Every rank calls all waves, with what it has to do in each."""

    def transfer(self, wave: Wave) -> list[Any]:
        return self.group.exchange(wave.sends, wave.receives)
