"""Reading boxes of stored tensors, and writing them: by several threads, straight from or to live memory where
that is possible, elsewhere through one buffer for each thread (pinned for CUDA).

What a box asks of a file is exactly its bytes: one read for each run of them, be it a whole block of rows or
one row's piece of a column shard.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from weightbus.digest import STABLE_SEED, Digester, P
from weightbus.memory.shard import Part
from weightbus.planning.box import Box
from weightbus.planning.runs import row_major
from weightbus.planning.spec import ITEMSIZE
from weightbus.storage import ranges
from weightbus.storage.disk import byte_shape
from weightbus.storage.ranges import OnDevice, Piece
from weightbus.storage.sources import Sources
from weightbus.tensors.bucket import torch_dtype

READERS = 4

# How often the thread that waits for the readers looks at what the hub says.
LOOK_S = 0.05

Check = Callable[[], None]


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
            self._buffer = torch.empty(ranges.BUFFER_BYTES, dtype=torch.uint8, pin_memory=pinned)
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
    room = ranges.BUFFER_BYTES
    for piece in pieces:
        if batch and piece.nbytes > room:
            yield batch
            batch, room = [], ranges.BUFFER_BYTES
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
