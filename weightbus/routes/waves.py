"""Compiled waves, replayed through a process group, as the broadcast and the reshard route do. No decisions."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from weightbus.digest.ledger import Ledger
from weightbus.memory.streams import Lanes, Mark, wait_for
from weightbus.routes.group import Group
from weightbus.tensors.bucket import Compiled, Wave
from weightbus.tensors.loaders.hook import Hook


class Waves(ABC):
    """One rank's execution of one plan.

    On CUDA all is put into lanes at once, ordered by events alone, and the host then waits for the marks. On
    the CPU, and where a GPU's bytes go on to host memory, some waves are sent while the host installs and
    digests others.
    """

    def __init__(
        self,
        compiled: Compiled,
        group: Group,
        lanes: Lanes,
        hooks: Mapping[str, Hook],
        sent: Ledger,
        live: Ledger,
    ) -> None:
        self.compiled, self.group, self.lanes, self.hooks = compiled, group, lanes, hooks
        self.sent, self.live = sent, live
        self.wrote = False
        self._ended: list[Mark] = []
        self._digested: dict[int, Mark] = {}
        # Told the name of a stage and when a piece of it began, at its end; on CUDA the host's time.
        self.clock: Callable[[str, float], None] = lambda stage, begun: None

    @abstractmethod
    def transfer(self, wave: Wave) -> list[Any]:
        """Start what the wave moves between ranks, in the current stream; works to wait for."""

    def run(
        self,
        seed: bytes | None,
        *,
        check: Callable[[], None],
        progress: Callable[[int], None],
        meanwhile: Callable[[], None] = lambda: None,
        after: Mark = None,
        pause_s: float = 0.0,
    ) -> None:
        """Send, receive and install everything; returns once it is in place.

        seed: digest both ends under it, as they come; ``collect`` on both ledgers waits for the sums.
        check: raises once the update has ended elsewhere. meanwhile: called once, while bytes move.
        progress: told the bytes of each finished wave. after: the source is ready then. pause_s: of the
        host between two looks at what is done.
        """
        lanes, compiled = self.lanes, self.compiled
        lanes.begin(after)
        try:
            ahead = 0 if lanes.overlap and not compiled.landing else compiled.depth - 1
            pending: deque[tuple[int, Wave, list[Any], Mark]] = deque()
            for index, wave in enumerate(compiled.waves):
                check()
                while pending and pending[0][0] <= wave.needs:
                    self._finish(*pending.popleft(), seed, check, progress)
                pending.append((index, wave, *self._start(index, wave, seed)))
                if index == 0 and not lanes.overlap:
                    meanwhile()
                while len(pending) > ahead:
                    self._finish(*pending.popleft(), seed, check, progress)
            while pending:
                self._finish(*pending.popleft(), seed, check, progress)
            if empty := compiled.whole.keys() - compiled.last.keys():  # tensors without elements
                with lanes.install:
                    for name in empty:
                        self._install(name, seed)
                self._ended.append(lanes.install.mark())
            if seed:
                self.sent.prepare(seed)
                self.live.prepare(seed)
            if lanes.overlap:
                meanwhile()
                for index, mark in enumerate(self._ended):
                    wait_for(mark, check, pause_s=pause_s)
                    progress(compiled.waves[index].nbytes if index < len(compiled.waves) else 0)
        except BaseException:
            lanes.end()
            raise

    def _start(self, index: int, wave: Wave, seed: bytes | None) -> tuple[list[Any], Mark]:
        """Fill this rank's bucket and start the transfers; what to wait for."""
        lanes, earlier = self.lanes, index - self.compiled.depth
        free = self._ended[earlier] if earlier >= 0 else None
        packed = None
        if wave.needs >= 0:
            lanes.pack.after(self._ended[wave.needs])
            lanes.send.after(self._ended[wave.needs])
        if wave.pack:
            with lanes.pack:
                lanes.pack.after(free)
                lanes.pack.after(self._digested.get(earlier))
                begun = time.monotonic()
                wave.pack.run()
                self.clock("pack", begun)
            packed = lanes.pack.mark()
            lanes.send.after(packed)
        elif wave.staged or self.compiled.whole:
            lanes.send.after(free)
            lanes.send.after(self._digested.get(earlier))  # what this rank sent in that bucket
        self.wrote = True
        begun = time.monotonic()
        with lanes.send:
            works = self.transfer(wave)
        sent = lanes.send.mark()
        self.clock("send", begun)
        if seed:
            begun = time.monotonic()
            with lanes.digest:
                lanes.digest.after(packed)
                if self.sent.launch(index, seed):
                    self._digested[index] = lanes.digest.mark()
            self.clock("digest", begun)
        return works, sent

    def _finish(
        self,
        index: int,
        wave: Wave,
        works: list[Any],
        sent: Mark,
        seed: bytes | None,
        check: Callable[[], None],
        progress: Callable[[int], None],
    ) -> None:
        """Install what has come."""
        lanes = self.lanes
        if index in self.compiled.landing:
            wait_for(sent, check)  # copies to the host may block, and then nobody looks at deadlines
        with lanes.install:
            lanes.install.after(sent)
            begun = time.monotonic()
            for work in works:
                self.group.wait(work, check)
            self.clock("send", begun)
            begun = time.monotonic()
            wave.unpack.run()
            for name in wave.assembled:
                self._install(name, seed)
        self._ended.append(lanes.install.mark())
        if index in self.compiled.landing:
            wait_for(self._ended[index], check)
        self.clock("install", begun)
        if seed:
            begun = time.monotonic()
            with lanes.digest:
                lanes.digest.after(self._ended[index])
                self.live.launch(index, seed)
            self.clock("digest", begun)
        if not lanes.overlap:
            progress(wave.nbytes)

    def _install(self, name: str, seed: bytes | None) -> None:
        if seed:
            self.live.launch(name, seed)
        self.hooks[name].run(self.compiled.whole[name])
