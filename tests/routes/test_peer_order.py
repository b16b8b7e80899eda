"""What of the peer route waits for what, by lanes that note it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from weightbus.routes.peer import CompiledPeer, Peer
from weightbus.routes.peer_wave import Wave


class Recorded:
    """A lane that notes what it waits for: another lane's name, and how often that had been put to work."""

    stream = None

    def __init__(self, name: str) -> None:
        self.name, self.puts = name, 0
        self.waits: list[tuple[str, int]] = []

    def __enter__(self) -> None:
        self.puts += 1

    def __exit__(self, *_: object) -> None:
        pass

    def after(self, mark: Any) -> None:
        self.waits.append((mark.lane, mark.puts))

    def mark(self) -> Any:
        return SimpleNamespace(lane=self.name, puts=self.puts, query=lambda: True)


def test_a_hook_runs_after_all_copies_of_earlier_waves() -> None:
    """What it may write over has to be there first; the two lanes of copies do not wait for each other."""
    copies: Any = SimpleNamespace(start=lambda lane: None)
    near, hooked = Wave(near=copies), Wave(by_engine=[copies], wire="w")
    lanes = {name: Recorded(name) for name in ("send", "pack", "install", "digest")}
    every: Any = SimpleNamespace(**lanes, overlap=True, begin=lambda after: None)
    hook: Any = SimpleNamespace(run=lambda tensor: None)
    compiled = CompiledPeer(waves=[near, hooked], whole={"w": torch.zeros(1)}, last={})
    nothing: Any = None
    peer = Peer(compiled, every, {"w": hook}, nothing, nothing)
    peer.run(None, check=lambda: None, progress=lambda nbytes: None)
    last = dict(lanes["install"].waits)
    assert last["pack"] == lanes["pack"].puts > 0
    assert last["send"] == lanes["send"].puts > 0
