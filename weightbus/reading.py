"""Reading boxes of stored tensors, and writing them: by several threads, straight from or to live memory where
that is possible, elsewhere through one buffer for each thread (pinned for CUDA).

What a box asks of a file is exactly its bytes: one read for each run of them, be it a whole block of rows or
one row's piece of a column shard.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from weightbus.box import Box
from weightbus.bucket import torch_dtype
from weightbus.digest import STABLE_SEED, Digester, P
from weightbus.disk import Stored, byte_shape
from weightbus.errors import SpecError
from weightbus.opened import Files, OpenFile, unreadable
from weightbus.part import Part
from weightbus.runs import row_major
from weightbus.spec import ITEMSIZE

try:
    from weightbus import _pread
except ImportError:
    _pread: Any = None  # type: ignore[no-redef]

READERS = 4
BUFFER_BYTES = 8 << 20

# How often the thread that waits for the readers looks at what the hub says.
LOOK_S = 0.05

Check = Callable[[], None]


class OnDevice(Protocol):
    """A stored tensor that is memory on a GPU."""

    def copy(self, box: Box, dst: Tensor) -> None:
        """``box`` of it into ``dst``, ``row_major`` and of its dtype, in the order of the current stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A box of a stored tensor. view: what takes it, cast where the dtypes differ; None is not known yet."""

    stored: Stored
    box: Box
    view: Tensor | None


@dataclass(slots=True, kw_only=True, eq=False)
class Piece:
    """At most a buffer of a read, as equal runs of bytes in its file.

    number: the read's. begin, pitch: the byte where the first run begins, and how far on each next one does.
    kept: the piece's bytes, where they are kept in memory.
    """

    number: int
    stored: Stored
    box: Box
    within: tuple[slice, ...]
    begin: int
    pitch: int
    runs: int
    nbytes: int
    kept: Tensor | None = None

    def in_runs(self, memory: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Where each run begins in the file, and its part of the piece's memory."""
        length = self.nbytes // self.runs
        for i in range(self.runs):
            yield self.begin + i * self.pitch, memory[i * length : (i + 1) * length]


def pieces_of(reads: Sequence[Read], buffer_bytes: int | None = None) -> list[Piece]:
    limit = BUFFER_BYTES if buffer_bytes is None else buffer_bytes
    found = []
    for number, read in enumerate(reads):
        stored, itemsize = read.stored, ITEMSIZE[read.stored.spec.dtype]
        for whole in read.box.split(limit // itemsize) if read.box.volume else ():
            for box, first, pitch, runs in runs_of(stored.spec.shape, whole):
                piece = Piece(
                    number=number,
                    stored=stored,
                    box=box,
                    within=() if box is read.box else box.within(read.box),
                    begin=stored.begin + first * itemsize,
                    pitch=pitch * itemsize,
                    runs=runs,
                    nbytes=box.volume * itemsize,
                )
                found.append(piece)
    return found


def runs_of(shape: Sequence[int], box: Box) -> Iterator[tuple[Box, int, int, int]]:
    """Boxes that make up ``box``, each of equal runs at one distance in a row-major tensor: the box, where its
    first run begins, the distance, and how many runs it has; in elements."""
    axis = len(shape)
    while axis and box.sizes[axis - 1] == shape[axis - 1]:
        axis -= 1
    axis = max(axis - 1, 0)  # one axis more may be cut, and the run is still contiguous
    if axis < 2 or Box(box.offsets[:axis], box.sizes[:axis]).runs_in(Box.whole(shape[:axis])):
        first = 0
        for offset, size in zip(box.offsets, shape, strict=True):
            first = first * size + offset
        yield box, first, math.prod(shape[axis:]), math.prod(box.sizes[:axis])
        return
    for part in box.split(box.volume // next(n for n in box.sizes if n > 1)):
        yield from runs_of(shape, part)


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
            assert isinstance(payload, memoryview), "what lies on a GPU is not read by the host"
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


class _Worker:
    """One thread's buffer and, where it copies to a GPU, its stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer: Tensor | None = None
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        """What is copied from now on waits for the current stream, whose work may use the same memory."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def take(self, piece: Piece) -> Tensor:
        """Memory for a piece, in its stored dtype; what was copied out of it before has left."""
        if self._buffer is None:
            pinned = self._device.type == "cuda"
            self._buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=pinned)
        self.drain()
        return self._buffer[: piece.nbytes].view(torch_dtype(piece.stored.spec.dtype)).view(piece.box.sizes)

    def copy(self, view: Tensor, tensor: Tensor) -> None:
        with torch.no_grad():
            if self._stream is None:
                view.copy_(tensor)
                return
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                view.copy_(tensor, non_blocking=True)

    def fetch(self, memory: OnDevice, piece: Piece, view: Tensor) -> None:
        dtype = torch_dtype(piece.stored.spec.dtype)
        with torch.no_grad(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if view.dtype == dtype and row_major(view.stride(), piece.box.sizes):
                memory.copy(piece.box, view)
                return
            tensor = torch.empty(piece.box.sizes, dtype=dtype, device=self._device)
            memory.copy(piece.box, tensor)
            view.copy_(tensor)

    def drain(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


class _Threads:
    """Runs work on pieces in READERS threads."""

    def __init__(self, device: torch.device, check: Check) -> None:
        """check: called while waiting; raises once the task has ended elsewhere."""
        self._check = check
        self._workers = [_Worker(device) for _ in range(READERS)]

    def run(
        self, pieces: Sequence[Piece], work: Callable[[Piece, _Worker], None], progress: Callable[[int], None]
    ) -> None:
        """Returns once all pieces are done. Raises what the first one raises, when none is at work any more."""
        left: queue.SimpleQueue[list[Piece]] = queue.SimpleQueue()
        done: queue.SimpleQueue[list[Piece]] = queue.SimpleQueue()
        for batch in _batches(pieces):
            left.put(batch)
        ending = threading.Event()
        errors: list[BaseException] = []

        def one(worker: _Worker) -> None:
            try:
                with contextlib.suppress(queue.Empty):
                    while not ending.is_set():
                        batch = left.get_nowait()
                        for piece in batch:
                            work(piece, worker)
                        done.put(batch)
            except BaseException as error:
                errors.append(error)
                ending.set()

        started: list[threading.Thread] = []
        try:
            for worker in self._workers[: left.qsize()]:
                worker.follow()
                thread = threading.Thread(target=one, args=(worker,), name="weightbus-file")
                thread.start()
                started.append(thread)
            # Looked at now and then only: each time, this thread takes the interpreter from the readers.
            for thread in started:
                going = True
                while going:
                    self._check()
                    thread.join(LOOK_S)
                    going = thread.is_alive()
                    progress(sum(piece.nbytes for _ in range(done.qsize()) for piece in done.get()))
        finally:
            ending.set()
            for thread in started:
                thread.join()
            for worker in self._workers:
                worker.drain()
        if errors:
            raise errors[0]


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Neighbours of a buffer's bytes together: what a thread does at a time."""
    batch: list[Piece] = []
    room = BUFFER_BYTES
    for piece in pieces:
        if batch and piece.nbytes > room:
            yield batch
            batch, room = [], BUFFER_BYTES
        batch.append(piece)
        room -= piece.nbytes
    if batch:
        yield batch


class _Sums:
    """Sums of reads under the stable seed, added up piece by piece, by several threads."""

    def __init__(self) -> None:
        self._rows: queue.SimpleQueue[tuple[int, int, int]] = queue.SimpleQueue()

    def add(self, piece: Piece, tensor: Tensor) -> None:
        ((a, b),) = Digester([_byte_part(piece, tensor)]).sums(STABLE_SEED).tolist()
        self._rows.put((piece.number, a, b))

    def total(self) -> dict[int, tuple[int, int]]:
        found: dict[int, tuple[int, int]] = {}
        while not self._rows.empty():
            number, a, b = self._rows.get()
            x, y = found.get(number, (0, 0))
            found[number] = (x + a) % P, (y + b) % P
        return found


class Reader:
    """Reads pieces; takes READERS * BUFFER_BYTES of memory, and what ``keep`` keeps."""

    def __init__(self, sources: Sources, device: torch.device, check: Check) -> None:
        self._sources = sources
        self._threads = _Threads(device, check)

    def write(
        self, pieces: Sequence[Piece], views: Mapping[int, Tensor], progress: Callable[[int], None]
    ) -> None:
        """Put each piece into its read's view, which ``views`` gives by the read's number."""

        # All at once, and not between the reads, which leave nothing of the interpreter in the caches.
        placed = {piece: views[piece.number][piece.within] for piece in pieces}
        live = {
            piece: memory_of(view)
            for piece, view in placed.items()
            if piece.kept is None
            and self._sources.on_device(piece) is None
            and _direct(view)
            and view.dtype == torch_dtype(piece.stored.spec.dtype)
        }

        def work(piece: Piece, worker: _Worker) -> None:
            if piece in live:
                self._sources.fill(piece, live[piece])
            elif piece.kept is not None:
                worker.copy(placed[piece], piece.kept)
            elif (memory := self._sources.on_device(piece)) is not None:
                worker.fetch(memory, piece, placed[piece])
            else:
                tensor = worker.take(piece)
                self._sources.fill(piece, memory_of(tensor))
                worker.copy(placed[piece], tensor)

        self._threads.run(pieces, work, progress)

    def digest(
        self, pieces: Sequence[Piece], progress: Callable[[int], None], *, keep: bool
    ) -> dict[int, tuple[int, int]]:
        """Sums of each read, by its number. keep: the bytes stay in memory, in the pieces."""
        sums = _Sums()

        def work(piece: Piece, worker: _Worker) -> None:
            if keep:
                self._hold(piece)
            tensor = piece.kept
            if tensor is None:
                tensor = worker.take(piece)
                self._sources.fill(piece, memory_of(tensor))
            sums.add(piece, tensor)

        self._threads.run(pieces, work, progress)
        return sums.total()

    def keep(self, pieces: Sequence[Piece], progress: Callable[[int], None]) -> None:
        """Read the pieces into memory of their own."""
        self._threads.run(pieces, lambda piece, worker: self._hold(piece), progress)

    def _hold(self, piece: Piece) -> None:
        kept = torch.empty(piece.box.sizes, dtype=torch_dtype(piece.stored.spec.dtype))
        self._sources.fill(piece, memory_of(kept))
        piece.kept = kept


class Writer:
    """Writes pieces into files that exist, and digests them on the way; what it has written is on the disk."""

    def __init__(self, device: torch.device, check: Check, open_file: Callable[[Path], int]) -> None:
        """open_file: gives a descriptor, which is closed here."""
        self._threads = _Threads(device, check)
        self._open = open_file
        self._files: dict[Path, int] = {}

    def write(
        self,
        pieces: Sequence[Piece],
        views: Mapping[int, Tensor],
        progress: Callable[[int], None],
        *,
        skip: Container[int] = (),
    ) -> dict[int, tuple[int, int]]:
        """Write each piece of a view, which ``views`` gives by number; returns their sums by number.

        skip: numbers of reads that are digested and not written.
        """
        sums = _Sums()
        for path in {piece.stored.path for piece in pieces if piece.number not in skip}:
            self._files[path] = self._open(path)

        def work(piece: Piece, worker: _Worker) -> None:
            view = views[piece.number][piece.within]
            if _direct(view):
                tensor = view
            else:
                tensor = worker.take(piece)
                worker.copy(tensor, view)
                worker.drain()
            sums.add(piece, tensor)
            if piece.number not in skip:
                self._put(piece, memory_of(tensor))

        self._threads.run(pieces, work, progress)
        for file in self._files.values():
            os.fsync(file)
        return sums.total()

    def _put(self, piece: Piece, data: memoryview) -> None:
        for begin, left in piece.in_runs(data):
            while left:
                count = os.pwrite(self._files[piece.stored.path], left, begin)
                left, begin = left[count:], begin + count

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    # One element may have any stride and be contiguous, but it can't be viewed as bytes then.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _direct(view: Tensor) -> bool:
    """Whether a file can be read into it, or written from it, as it lies."""
    return view.device.type == "cpu" and view.is_contiguous()


def _byte_part(piece: Piece, tensor: Tensor) -> Part:
    """The piece in axes of which the last one is in bytes: the same sums, and any dtype."""
    spec = piece.stored.spec
    itemsize = ITEMSIZE[spec.dtype]
    if not spec.shape:
        box = Box((0,), (itemsize,))
    else:
        *offsets, last = piece.box.offsets
        *sizes, length = piece.box.sizes
        box = Box((*offsets, last * itemsize), (*sizes, length * itemsize))
    memory = tensor.reshape(-1).view(torch.uint8).view(box.sizes)
    return Part(spec=replace(spec, dtype="uint8", shape=byte_shape(spec)), box=box, tensor=memory)
