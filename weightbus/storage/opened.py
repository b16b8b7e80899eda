"""Files opened once: regular ones only, beneath the roots that were named, and read through one descriptor.

A path is followed folder by folder, each held open, and each symbolic link by its own text. So what is
checked is what is read, whatever is renamed or linked meanwhile, and nothing above a root is reached.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from weightbus.errors import SpecError

MAX_LINKS = 40  # as the kernel
MAX_NAMES = 100_000  # in one folder

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
}
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK the open of a FIFO waits for a writer.
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, eq=False)
class OpenFile:
    """A regular file. look: what it was when it was opened. seen: digests of what ``part`` has given."""

    path: Path
    descriptor: int
    look: os.stat_result
    seen: list[tuple[int, int, bytes]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.look.st_size

    def read(self, limit_bytes: int) -> bytes:
        """All of it. Raises SpecError for more than ``limit_bytes``, before anything is read."""
        if self.nbytes > limit_bytes:
            raise SpecError(f"{self.path}: expected at most {limit_bytes} bytes, got a file of {self.nbytes}")
        return self.part(0, self.nbytes)

    def part(self, begin: int, nbytes: int) -> bytes:
        """These bytes; fewer where the file ends before."""
        data = self._part(begin, nbytes)
        self.seen.append((begin, nbytes, hashlib.sha256(data).digest()))
        return data

    def _part(self, begin: int, nbytes: int) -> bytes:
        parts = []
        try:
            while nbytes and (part := os.pread(self.descriptor, nbytes, begin)):
                parts.append(part)
                begin, nbytes = begin + len(part), nbytes - len(part)
        except OSError as error:
            raise unreadable(self.path, error) from error
        return b"".join(parts)

    def relinked(self) -> bool:
        """Whether links to it were made or removed since it was opened, as where another save took its name,
        and its size and time of writing are the same."""
        now, then = os.fstat(self.descriptor), self.look
        same = (now.st_size, now.st_mtime_ns) == (then.st_size, then.st_mtime_ns)
        return same and now.st_nlink != then.st_nlink

    def check_unchanged(self, *, relinked: bool = False, proved: bool = False) -> None:
        """Raise SpecError if it may have been written to since it was opened: who writes can put back the time
        of that, but not the time of the change of status.

        relinked: other links are no change; the caller reads the bytes again. proved: nor is any change of
            status alone, as the bytes were proved. Either way what ``part`` gave is read again here.
        """
        now, then = os.fstat(self.descriptor), self.look
        same = (now.st_size, now.st_mtime_ns) == (then.st_size, then.st_mtime_ns)
        if same and now.st_ctime_ns != then.st_ctime_ns:
            same = (proved or (relinked and self.relinked())) and all(
                hashlib.sha256(self._part(begin, nbytes)).digest() == seen for begin, nbytes, seen in self.seen
            )
        if not same:
            raise SpecError(
                f"{self.path}: expected a file that stays as it is while it is loaded, but it changed"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Folder:
    """A directory. root: that it lies in. stack: descriptors of the folders from the root down to itself."""

    path: Path
    root: str
    stack: tuple[int, ...]
    files: Files

    def names(self) -> list[str]:
        """What lies in it, in order. Raises SpecError for more than MAX_NAMES."""
        found = []
        try:
            handle = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.stack[-1])
            try:
                with os.scandir(handle) as entries:
                    for entry in entries:
                        found.append(entry.name)
                        if len(found) > MAX_NAMES:
                            raise SpecError(f"{self.path}: expected at most {MAX_NAMES} files, got more")
            finally:
                os.close(handle)
        except OSError as error:
            raise unreadable(self.path, error) from error
        return sorted(found)

    def has(self, name: str) -> bool:
        """Whether there is something of this name; a link counts."""
        try:
            os.stat(name, dir_fd=self.stack[-1], follow_symlinks=False)
        except OSError:
            return False
        return True

    def file(self, name: str) -> OpenFile:
        """Raises SpecError for a name with a separator, and where that is no regular file in reach."""
        found = self._find(name)
        if isinstance(found, Folder):
            raise _irregular(found.path, stat.S_IFDIR)
        return found

    def folder(self, name: str) -> Folder:
        """Raises SpecError for a name with a separator, and where that is no folder in reach."""
        found = self._find(name)
        if isinstance(found, OpenFile):
            raise SpecError(f"{found.path}: expected a directory, got a file")
        return found

    def _find(self, name: str) -> OpenFile | Folder:
        check_plain_name(name, str(self.path))
        return self.files.find_in(self, name)


class Files:
    """What is open for one load or digest; ``close`` closes all of it."""

    def __init__(self, roots: Sequence[str | Path] = ()) -> None:
        """roots: directories in which everything must lie, links followed. None of them: anywhere, and errors
        then say more, as who asks may look anywhere too."""
        self._roots = [os.path.abspath(root) for root in roots]
        self._names = {root: (root, os.path.realpath(root)) for root in self._roots or ["/"]}
        self._files: dict[Path, OpenFile] = {}
        self._descriptors: list[int] = []

    def find(self, path: Path) -> OpenFile | Folder:
        """The file or folder at ``path``, opened.

        Raises SpecError for a path that does not lead to one in a root. The error is the same for what lies
        outside, what is not there and what may not be read.
        """
        whole = os.path.abspath(path)
        for root in self._names:
            if (names := self._rest(whole, root)) is not None:
                try:
                    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                except OSError as error:
                    raise self._out_of_reach(path, error) from error
                self._descriptors.append(top)
                return self._walk(path, root, (top,), names)
        raise self._out_of_reach(path, None)

    def find_in(self, folder: Folder, name: str) -> OpenFile | Folder:
        path = folder.path / name
        if path in self._files:
            return self._files[path]
        return self._walk(path, folder.root, folder.stack, name)

    def file(self, path: Path) -> OpenFile:
        """The file at ``path``, the one that is open where there is one. Raises SpecError as ``find`` does."""
        if path in self._files:
            return self._files[path]
        found = self.find(path)
        if isinstance(found, Folder):
            raise _irregular(path, stat.S_IFDIR)
        return found

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._files.clear()

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rest(self, path: str, root: str) -> str | None:
        """What follows a root in ``path``, the root as given or with its own links followed; None where it does
        not begin with it."""
        for name in self._names[root]:
            if name == "/":
                return path
            if path == name or path.startswith(f"{name}/"):
                return path[len(name) :]
        return None

    def _walk(self, path: Path, root: str, stack: tuple[int, ...], names: str) -> OpenFile | Folder:
        """From the last folder of ``stack`` along ``names``, never above its first, which is ``root``."""
        opened: list[int] = []  # on the way
        left, links = _parts(names), 0
        try:
            while left:
                name = left.pop()
                if name == "..":
                    if len(stack) == 1 and self._roots:
                        raise self._out_of_reach(path, None)
                    stack = stack[:-1] if len(stack) > 1 else stack
                    continue
                here = os.open(name, _LOOK, dir_fd=stack[-1])
                opened.append(here)
                kind = stat.S_IFMT(os.fstat(here).st_mode)
                if kind == stat.S_IFDIR:
                    stack = (*stack, here)
                elif kind == stat.S_IFLNK:
                    links += 1
                    if links > MAX_LINKS:
                        raise self._out_of_reach(path, None)
                    target = os.readlink("", dir_fd=here)
                    if target.startswith("/"):
                        rest = self._rest(target, root)
                        if rest is None:
                            raise self._out_of_reach(path, None)
                        target, stack = rest, stack[:1]
                    left += _parts(target)
                elif left:
                    raise self._out_of_reach(path, None)
                elif kind != stat.S_IFREG:
                    raise _irregular(path, kind)
                else:
                    return self._open(path, stack[-1], name)
            kept = set(stack)
            self._descriptors += [one for one in opened if one in kept]
            opened = [one for one in opened if one not in kept]
            return Folder(path, root, stack, self)
        except SpecError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a zero byte in a name
            raise self._out_of_reach(path, error) from error
        finally:
            for one in opened:
                os.close(one)

    def _open(self, path: Path, folder: int, name: str) -> OpenFile:
        descriptor = os.open(name, _READ, dir_fd=folder)
        self._descriptors.append(descriptor)
        look = os.fstat(descriptor)
        if not stat.S_ISREG(look.st_mode):  # put there since the look
            raise _irregular(path, stat.S_IFMT(look.st_mode))
        self._files[path] = found = OpenFile(path, descriptor, look)
        return found

    def _out_of_reach(self, path: Path, error: Exception | None) -> SpecError:
        if not self._roots:
            said = (error.strerror if isinstance(error, OSError) else error) or "a loop of links"
            return SpecError(f"{path}: expected a readable file, got {said}")
        return SpecError(f"{path}: expected what can be read in {' or '.join(self._roots)}, got no such")


def check_plain_name(name: str, where: str) -> None:
    """Raise SpecError for what is no name of one file in a folder, but leads out of it, or can't be written."""
    try:
        bad = name in ("", ".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > 255
    except UnicodeEncodeError:
        bad = True
    if bad:
        raise SpecError(f"{where}: expected the name of one file or folder in it, got {short(repr(name))}")


def short(text: object, limit: int = 200) -> str:
    """Text of others for an error, cut."""
    shown = str(text)
    return shown if len(shown) <= limit else f"{shown[:limit]}…"


def unreadable(path: Path, error: OSError) -> SpecError:
    return SpecError(f"{path}: expected a readable file, got {error.strerror or error}")


def _irregular(path: Path, kind: int) -> SpecError:
    return SpecError(f"{path}: expected a regular file, got {_KINDS.get(kind, 'none')}")


def _parts(path: str) -> list[str]:
    """Names along a path, the first one last."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]
