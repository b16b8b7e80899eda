"""A progress bar for updates that take long enough for someone to wonder."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from weightbus.errors import visible

# Shorter updates end before a bar could be read.
PATIENCE_S = 2.0


class Bar:
    """Call it with (done, total) bytes; it shows itself on a terminal's stderr after PATIENCE_S."""

    def __init__(self, title: str, *, patience_s: float = PATIENCE_S, console: Console | None = None) -> None:
        self._title = visible(title)
        self._patience_s = patience_s
        self._begun = time.monotonic()
        self._console = console
        self._progress: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._progress is None:
            if time.monotonic() - self._begun < self._patience_s:
                return
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
            )
            console = self._console or Console(file=sys.stderr)
            hidden = not console.is_terminal
            self._progress = Progress(*columns, console=console, transient=True, disable=hidden)
            self._progress.start()
            self._progress.add_task(self._title, total=total)
        self._progress.update(self._progress.task_ids[0], completed=done, total=total)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
