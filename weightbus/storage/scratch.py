"""A directory that has another name until it is whole. What is made in it is held by descriptors, and only that
is ever written to, renamed or removed, whatever takes a name meanwhile."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from pathlib import Path

from weightbus.errors import SpecError
from weightbus.storage.opened import check_plain_name

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def scratch_name(path: Path) -> str:
    """A name beside ``path`` for what will be ``path``."""
    return f".{path.name}.{secrets.token_hex(4)}.part"


def check_scratch_name(name: str, path: Path) -> None:
    """Raise SpecError for what ``scratch_name`` does not give: another rank's word is not taken for a place."""
    if not re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.part", name):
        raise SpecError(f"{path}: expected a scratch directory named after it, got {name!r}")


class Scratch:
    """Made by one rank, who gives it its name at the end, or removes it."""

    def __init__(self, path: Path, name: str) -> None:
        """path: what it will be. Raises SpecError where that is there already, or has no directory."""
        self._path, self._name = path, name
        self._folders: dict[str, int] = {}
        self._made: list[tuple[str, str, tuple[int, int]]] = []  # folder, file, and which file that is
        try:
            self._parent = os.open(path.parent, _FOLDER & ~os.O_NOFOLLOW)
        except OSError as error:
            raise SpecError(
                f"{path}: expected a directory to make it in, got no {path.parent} ({error.strerror})"
            ) from error
        if _there(path.name, self._parent):
            self.close()
            raise SpecError(f"{path}: expected a path where nothing is yet, got one that exists")

    def make(self, nbytes: int) -> None:
        """The directory. Raises OSError, before anything is written, where ``nbytes`` have no room."""
        room = os.fstatvfs(self._parent)
        if room.f_bavail * room.f_frsize < nbytes:
            text = f"{os.strerror(errno.ENOSPC)}: {nbytes} bytes for {room.f_bavail * room.f_frsize}"
            raise OSError(errno.ENOSPC, text, str(self._path))
        os.mkdir(self._name, dir_fd=self._parent)
        self._folders[""] = os.open(self._name, _FOLDER, dir_fd=self._parent)

    def folder(self, name: str) -> None:
        """A sub-folder. Raises SpecError for a name that is no plain one."""
        check_plain_name(name, str(self._path))
        os.mkdir(name, dir_fd=self._folders[""])
        self._folders[name] = os.open(name, _FOLDER, dir_fd=self._folders[""])

    def create(self, folder: str, name: str, head: bytes, nbytes: int) -> None:
        """A file of ``nbytes`` that begins with ``head``; the rest is to be written."""
        check_plain_name(name, str(self._path))
        descriptor = os.open(name, _NEW, 0o666, dir_fd=self._folders[folder])
        try:
            look = os.fstat(descriptor)
            self._made.append((folder, name, (look.st_dev, look.st_ino)))
            _write_all(descriptor, head)
            os.ftruncate(descriptor, nbytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def publish(self) -> None:
        """Have all of it on the disk, under its name. Raises SpecError where that was taken meanwhile."""
        for descriptor in reversed(self._folders.values()):
            os.fsync(descriptor)
        if _there(self._path.name, self._parent):
            raise SpecError(f"{self._path}: expected a path where nothing is yet, got one made meanwhile")
        if not self._is_here():
            raise SpecError(f"{self._path}: expected {self._name} to be what was made, but it was replaced")
        os.rename(self._name, self._path.name, src_dir_fd=self._parent, dst_dir_fd=self._parent)
        os.fsync(self._parent)
        self._made.clear()
        self._folders = {"whole": self._folders.pop(""), **self._folders}

    def close(self) -> None:
        """Remove what was made, unless it was published: each file and folder only if it is that one still."""
        with contextlib.suppress(OSError):
            for folder, name, identity in self._made:
                if _identity(name, self._folders[folder]) == identity:
                    os.unlink(name, dir_fd=self._folders[folder])
            if "" in self._folders:
                for name in self._folders:
                    if name and _identity(name, self._folders[""]) == _opened(self._folders[name]):
                        os.rmdir(name, dir_fd=self._folders[""])
                if self._is_here():
                    os.rmdir(self._name, dir_fd=self._parent)
        for descriptor in [*self._folders.values(), self._parent]:
            os.close(descriptor)
        self._folders.clear()
        self._made.clear()

    def _is_here(self) -> bool:
        return _identity(self._name, self._parent) == _opened(self._folders[""])


def open_made(path: Path, scratch: str, folder: str, name: str, head: bytes, nbytes: int) -> int:
    """A descriptor to write a file that another rank has made in the scratch directory of ``path``.

    Raises SpecError for what is not that very file, empty but for its ``head``: nothing else is written to.
    """
    check_scratch_name(scratch, path)
    where = path.parent / scratch / folder / name
    opened: list[int] = []
    try:
        opened.append(os.open(path.parent, _FOLDER & ~os.O_NOFOLLOW))
        for step in filter(None, (scratch, folder)):
            check_plain_name(step, str(path))
            opened.append(os.open(step, _FOLDER, dir_fd=opened[-1]))
        check_plain_name(name, str(path))
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(name, flags, dir_fd=opened[-1])
    except OSError as error:
        raise SpecError(f"{where}: expected the file that trainer rank 0 made, got {error.strerror}") from error
    finally:
        for one in opened:
            os.close(one)
    look = os.fstat(descriptor)
    if look.st_size != nbytes or os.pread(descriptor, len(head), 0) != head:
        os.close(descriptor)
        raise SpecError(f"{where}: expected the file that trainer rank 0 made, got another")
    return descriptor


def _there(name: str, folder: int) -> bool:
    return _identity(name, folder) is not None


def _identity(name: str, folder: int) -> tuple[int, int] | None:
    try:
        look = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return look.st_dev, look.st_ino


def _opened(descriptor: int) -> tuple[int, int]:
    look = os.fstat(descriptor)
    return look.st_dev, look.st_ino


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
