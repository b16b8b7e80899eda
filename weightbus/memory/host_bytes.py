"""Bytes of tensors on the host: in place where they lie so, else through a few buffers, pinned for CUDA."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from weightbus.memory.shard import bits_of
from weightbus.planning.box import Box

CHUNK_BYTES = 4 << 20
BUFFERS = 3  # one is read while the others fill


class HostBytes:
    """The bytes of some tensors, row-major, one tensor after the other: an iterator for one thread.

    Yields (index of the tensor, its next bytes), at least once for each tensor; bytes are good until the next
    are asked for. Contiguous CPU tensors are not copied. Others are, in chunks of CHUNK_BYTES, those on CUDA
    while their reader is at work on the ones before, with BUFFERS * CHUNK_BYTES of host memory at most.
    Made in the thread on whose current streams the tensors were written; may be read in another.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: plain, of any dtype and strides; they must stay as they are while they are read."""
        self._tensors = [bits_of(tensor) for tensor in tensors]
        devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
        self._ready = {device: torch.cuda.current_stream(device).record_event() for device in devices}

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        streams = {}
        for device, ready in self._ready.items():
            streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            streams[device].wait_event(ready)
        buffers = self._buffers()
        waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        copies = 0
        for index, tensor in enumerate(self._tensors):
            for chunk in _chunks(tensor):
                event = None
                if not _in_place(chunk):
                    # At most BUFFERS are waiting or with the reader, so this one is free again.
                    buffer = buffers[copies % BUFFERS][: chunk.nbytes].view(chunk.dtype).view(chunk.shape)
                    copies += 1
                    stream = streams.get(chunk.device)
                    if stream is None:
                        buffer.copy_(chunk)
                    else:
                        # The device first: a stream's context, left in a new thread, would set up device 0.
                        with torch.cuda.device(chunk.device), torch.cuda.stream(stream):
                            buffer.copy_(chunk, non_blocking=True)
                            event = stream.record_event()
                    chunk = buffer
                waiting.append((index, chunk, event))
                if len(waiting) == BUFFERS:
                    yield _taken(waiting)
        while waiting:
            yield _taken(waiting)

    def _buffers(self) -> list[Tensor]:
        copied = [tensor for tensor in self._tensors if not _in_place(tensor)]
        size = min(max((tensor.nbytes for tensor in copied), default=0), CHUNK_BYTES)
        count = BUFFERS if size else 0
        return [torch.empty(size, dtype=torch.uint8, pin_memory=bool(self._ready)) for _ in range(count)]


def _in_place(tensor: Tensor) -> bool:
    return not tensor.numel() or (tensor.device.type == "cpu" and tensor.is_contiguous())


def _chunks(tensor: Tensor) -> Iterable[Tensor]:
    """The tensor, flat, where it can be read in place; else pieces of at most CHUNK_BYTES."""
    if tensor.is_contiguous():
        tensor = _flat(tensor)
    if _in_place(tensor):
        return [tensor]
    whole = Box.whole(tensor.shape)
    return (tensor[piece.within(whole)] for piece in whole.split(CHUNK_BYTES // tensor.itemsize))


def _taken(waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]]) -> tuple[int, memoryview]:
    index, chunk, event = waiting.popleft()
    if event is not None:
        event.synchronize()
    if not chunk.numel():
        return index, memoryview(b"")
    return index, _flat(chunk).view(torch.uint8).numpy().data


def _flat(tensor: Tensor) -> Tensor:
    """A contiguous tensor with one axis, of stride 1: an axis of one element may have had any."""
    return tensor.as_strided((tensor.numel(),), (1,))
