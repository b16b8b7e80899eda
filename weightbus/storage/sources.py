"""The files and payloads that a load reads: opened once, and found unchanged at its end."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from weightbus.errors import SpecError
from weightbus.storage.disk import Stored
from weightbus.storage.opened import Files, OpenFile, unreadable
from weightbus.storage.ranges import OnDevice, Piece

try:
    from weightbus.storage import _pread
except ImportError:
    _pread: Any = None  # type: ignore[no-redef]


def read_runs(file: int, begin: int, pitch: int, runs: int, into: memoryview) -> int:
    """Fill ``into`` with equal runs of a file; returns how many bytes there were, fewer where the file ends.
    ``_pread.read_runs`` does the same without the interpreter."""
    length = len(into) // runs
    filled = 0
    while filled < len(into):
        run, done = divmod(filled, length)
        count = os.preadv(file, [into[filled : filled + length - done]], begin + run * pitch + done)
        if not count:
            break
        filled += count
    return filled


class Sources:
    """The files and payloads behind stored tensors, held open from the look at them to the end of the load, so
    that a directory that is replaced meanwhile does not mix with what replaces it."""

    def __init__(
        self,
        stored: Iterable[Stored],
        memory: Mapping[Path, memoryview | OnDevice],
        files: Files | None = None,
    ) -> None:
        """memory: of what is no file, by the path that stands for it. files: where they are open already, as
        their headers were read there; they stay open. Raises SpecError for a file that can't be opened, or is
        shorter than its tensors."""
        self._memory = memory
        self._own = Files()
        self._files: dict[Path, OpenFile] = {}
        self._descriptors: dict[Path, int] = {}
        try:
            for tensor in stored:
                path = tensor.path
                if path not in self._files and path not in memory:
                    self._files[path] = file = (files or self._own).file(path)
                    self._descriptors[path] = file.descriptor
                if path in self._files and self._files[path].nbytes < tensor.end:
                    raise SpecError(
                        f"{path}: {tensor.spec.name}: expected data up to byte {tensor.end}, "
                        f"got a file of {self._files[path].nbytes}; truncated"
                    )
        except BaseException:
            self.close()
            raise

    def fill(self, piece: Piece, into: memoryview) -> None:
        """Read a piece, row-major, into memory of its size. Raises SpecError if its file ends before."""
        tensor = piece.stored
        if (payload := self._memory.get(tensor.path)) is not None:
            assert isinstance(payload, memoryview), "what lies on a GPU is not read by the host"  # noqa: S101 - for mypy
            for begin, run in piece.in_runs(into):
                run[:] = payload[begin : begin + len(run)]
            return
        file = self._descriptors[tensor.path]
        try:
            if piece.runs > 1:
                # Of a column shard: the kernel's own read-ahead does not see that they follow each other.
                os.posix_fadvise(file, piece.begin, piece.runs * piece.pitch, os.POSIX_FADV_WILLNEED)
            read = _pread.read_runs if _pread else read_runs
            count = read(file, piece.begin, piece.pitch, piece.runs, into)
        except OSError as error:
            raise unreadable(tensor.path, error) from error
        if count < len(into):
            raise SpecError(
                f"{tensor.path}: {tensor.spec.name}: expected data up to byte {tensor.end}, "
                f"got a file of {os.fstat(file).st_size}; truncated"
            )

    def on_device(self, piece: Piece) -> OnDevice | None:
        memory = self._memory.get(piece.stored.path)
        return None if isinstance(memory, memoryview) else memory

    def check_unchanged(self, *, relinked: bool = False, proved: bool = False) -> None:
        """Raise SpecError for a file that was written to since it was opened; as of ``OpenFile``."""
        for file in self._files.values():
            file.check_unchanged(relinked=relinked, proved=proved)

    def relinked(self) -> bool:
        """Whether links to a file were made or removed since it was opened."""
        return any(file.relinked() for file in self._files.values())

    def close(self) -> None:
        self._own.close()
        self._files.clear()
        self._descriptors.clear()
        self._memory = {}
