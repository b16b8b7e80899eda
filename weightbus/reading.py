"""Reading boxes of stored tensors, and writing them: by several threads, straight from or to live memory where
that is possible, elsewhere through one buffer for each thread (pinned for CUDA).

What a box asks of a file is exactly its bytes: one read for each run of them, be it a whole block of rows or
one row's piece of a column shard.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weightbus.box import Box
from weightbus.bucket import torch_dtype
from weightbus.digest import STABLE_SEED, Digester, P
from weightbus.disk import Stored, byte_shape, unreadable
from weightbus.errors import SpecError
from weightbus.part import Part
from weightbus.runs import row_major
from weightbus.spec import ITEMSIZE

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


@dataclass(slots=True, kw_only=True)
class Piece:
    """At most a buffer of a read. number: the read's. kept: its bytes, where they are kept in memory."""

    number: int
    stored: Stored
    box: Box
    within: tuple[slice, ...]
    kept: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.box.volume * ITEMSIZE[self.stored.spec.dtype]


def pieces_of(reads: Sequence[Read], buffer_bytes: int | None = None) -> list[Piece]:
    limit = BUFFER_BYTES if buffer_bytes is None else buffer_bytes
    return [
        Piece(number=number, stored=read.stored, box=box, within=box.within(read.box))
        for number, read in enumerate(reads)
        if read.box.volume
        for box in read.box.split(limit // ITEMSIZE[read.stored.spec.dtype])
    ]


def runs(shape: Sequence[int], box: Box) -> tuple[npt.NDArray[np.int64], int]:
    """Where the contiguous runs of a box begin in a row-major tensor, in elements, and how long each is."""
    axis = len(shape)
    while axis and box.sizes[axis - 1 :] == tuple(shape[axis - 1 :]):
        axis -= 1
    axis = max(axis - 1, 0)  # one axis more may be cut, and the run is still contiguous
    length = int(np.prod(box.sizes[axis:], dtype=np.int64))
    starts = np.zeros((1,), dtype=np.int64)
    stride = int(np.prod(shape[axis + 1 :], dtype=np.int64))
    if shape:
        starts += box.offsets[axis] * stride
        stride *= shape[axis]
    for a in reversed(range(axis)):
        steps = np.arange(box.offsets[a], box.offsets[a] + box.sizes[a], dtype=np.int64) * stride
        starts = (steps[:, None] + starts).reshape(-1)
        stride *= shape[a]
    return starts, length


def file_spans(piece: Piece) -> Iterator[tuple[int, slice]]:
    """Each run of a piece: the byte of the file where it begins, and its bytes of the piece, row-major."""
    starts, length = runs(piece.stored.spec.shape, piece.box)
    itemsize = ITEMSIZE[piece.stored.spec.dtype]
    length *= itemsize
    for i, begin in enumerate((starts * itemsize + piece.stored.begin).tolist()):
        yield begin, slice(i * length, (i + 1) * length)


class Sources:
    """The files and payloads behind stored tensors, held open from the look at them to the end of the load, so
    that a directory that is replaced meanwhile does not mix with what replaces it."""

    def __init__(self, stored: Iterable[Stored], memory: Mapping[Path, memoryview | OnDevice]) -> None:
        """memory: of what is no file, by the path that stands for it. Raises SpecError for a file that can't be
        opened, or is shorter than its tensors."""
        self._memory = memory
        self._files: dict[Path, int] = {}
        self._looks: dict[Path, os.stat_result] = {}
        try:
            for tensor in stored:
                if tensor.path not in self._files and tensor.path not in memory:
                    self._open(tensor.path)
                if (look := self._looks.get(tensor.path)) is not None and look.st_size < tensor.end:
                    raise SpecError(
                        f"{tensor.path}: {tensor.spec.name}: expected data up to byte {tensor.end}, "
                        f"got a file of {look.st_size}; truncated"
                    )
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        try:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._looks[path] = os.fstat(self._files[path])
        except OSError as error:
            raise unreadable(path, error) from error

    def read(self, tensor: Stored, begin: int, into: memoryview) -> None:
        """Fill ``into`` from byte ``begin`` of the tensor's file. Raises SpecError if that ends before."""
        if (payload := self._memory.get(tensor.path)) is not None:
            assert isinstance(payload, memoryview), "what lies on a GPU is not read by the host"
            into[:] = payload[begin : begin + len(into)]
            return
        file = self._files[tensor.path]
        try:
            while into:
                count = os.preadv(file, [into], begin)
                if not count:
                    raise SpecError(
                        f"{tensor.path}: {tensor.spec.name}: expected data up to byte {tensor.end}, "
                        f"got a file of {begin}; truncated"
                    )
                into, begin = into[count:], begin + count
        except OSError as error:
            raise unreadable(tensor.path, error) from error

    def on_device(self, piece: Piece) -> OnDevice | None:
        memory = self._memory.get(piece.stored.path)
        return None if isinstance(memory, memoryview) else memory

    def fill(self, piece: Piece, into: memoryview) -> None:
        """Read a piece, row-major, into memory of its size."""
        spans = list(file_spans(piece))
        file = self._files.get(piece.stored.path)
        if file is None or len(spans) == 1:
            for begin, span in spans:
                self.read(piece.stored, begin, into[span])
            return
        # Runs of a column shard: the kernel's own read-ahead does not see that they follow each other.
        first, (last, span) = spans[0][0], spans[-1]
        os.posix_fadvise(file, first, last + span.stop - span.start - first, os.POSIX_FADV_WILLNEED)
        length, preadv = span.stop - span.start, os.preadv
        for begin, span in spans:
            try:
                whole = preadv(file, [into[span]], begin) == length
            except OSError as error:
                raise unreadable(piece.stored.path, error) from error
            if not whole:  # cut short: by a signal, or by the file's end
                self.read(piece.stored, begin, into[span])

    def check_unchanged(self) -> None:
        """Raises SpecError for a file that has been written to since it was opened."""
        for path, look in self._looks.items():
            now = os.fstat(self._files[path])
            if (now.st_size, now.st_mtime_ns) != (look.st_size, look.st_mtime_ns):
                raise SpecError(
                    f"{path}: expected a file that stays as it is while it is loaded, but it changed"
                )

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        self._memory = {}


class _Worker:
    """One thread's buffer and, where it copies to a GPU, its stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer: Tensor | None = None
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))

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
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(READERS):
            self._workers.put(_Worker(device))

    def run(
        self, pieces: Sequence[Piece], work: Callable[[Piece, _Worker], None], progress: Callable[[int], None]
    ) -> None:
        """Returns once all pieces are done. Raises what the first one raises, when none is at work any more."""

        def one(batch: list[Piece]) -> int:
            worker = self._workers.get()
            try:
                for piece in batch:
                    work(piece, worker)
            finally:
                self._workers.put(worker)
            return sum(piece.nbytes for piece in batch)

        pool = ThreadPoolExecutor(READERS, "weightbus-file")
        try:
            futures = [pool.submit(one, batch) for batch in _batches(pieces)]
            left = set(futures)
            # Looked at now and then only: each time, this thread takes the interpreter from the readers.
            while left:
                self._check()
                done, left = wait(left, LOOK_S, FIRST_EXCEPTION)
                if any(future.exception() for future in done):
                    break
                progress(sum(future.result() for future in done))
            pool.shutdown(wait=True, cancel_futures=True)
            for future in futures:
                if not future.cancelled():
                    future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for _ in range(READERS):
                worker = self._workers.get()
                worker.drain()
                self._workers.put(worker)


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

        def work(piece: Piece, worker: _Worker) -> None:
            view = views[piece.number][piece.within]
            if piece.kept is not None:
                worker.copy(view, piece.kept)
            elif (memory := self._sources.on_device(piece)) is not None:
                worker.fetch(memory, piece, view)
            elif _direct(view) and view.dtype == torch_dtype(piece.stored.spec.dtype):
                self._sources.fill(piece, memory_of(view))
            else:
                tensor = worker.take(piece)
                self._sources.fill(piece, memory_of(tensor))
                worker.copy(view, tensor)

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

    def __init__(self, device: torch.device, check: Check) -> None:
        self._threads = _Threads(device, check)
        self._files: dict[Path, int] = {}

    def write(
        self, pieces: Sequence[Piece], views: Mapping[int, Tensor], progress: Callable[[int], None]
    ) -> dict[int, tuple[int, int]]:
        """Write each piece of a view, which ``views`` gives by number; returns their sums by number."""
        sums = _Sums()
        for path in {piece.stored.path for piece in pieces}:
            self._files[path] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

        def work(piece: Piece, worker: _Worker) -> None:
            view = views[piece.number][piece.within]
            if _direct(view):
                tensor = view
            else:
                tensor = worker.take(piece)
                worker.copy(tensor, view)
                worker.drain()
            sums.add(piece, tensor)
            self._put(piece, memory_of(tensor))

        self._threads.run(pieces, work, progress)
        for file in self._files.values():
            os.fsync(file)
        return sums.total()

    def _put(self, piece: Piece, data: memoryview) -> None:
        for begin, span in file_spans(piece):
            left, at = data[span], begin
            while left:
                count = os.pwrite(self._files[piece.stored.path], left, at)
                left, at = left[count:], at + count

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
