"""Host memory that other processes map: a copy of what is on the CPU."""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import stat
import struct
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weightbus.memory.copy_descriptors import CASTS
from weightbus.memory.export import IpcError, Parts, host_id
from weightbus.memory.torch_copy import Copies
from weightbus.planning.exports import Allocation, Exports, Place

# Of each shared memory: the secret by which a reader knows that it has opened the right one.
_HEADER_BYTES = mmap.PAGESIZE

_SECRET_BYTES = 16

_ALIGN = 64

_SHARED = struct.Struct(f"<QQ{_SECRET_BYTES}s")  # process id, file descriptor, secret
_CAST = {src for src, _ in CASTS}  # what may be packed as something else


class SharedExport:
    """A second copy of the parts, in shared memory. Pages that are never packed take no memory."""

    def __init__(self, parts: Parts) -> None:
        if not hasattr(os, "memfd_create"):
            raise IpcError("this system has no anonymous shared memory (memfd)")
        offset = _HEADER_BYTES
        places: dict[str, tuple[Place, ...]] = {}
        # Of tied tensors there is one copy for all names, but of what each name may want in another dtype.
        copied: dict[int, Place] = {}
        for name, held in parts.items():
            rows = []
            for part in held:
                place = None if part.tensor.dtype in _CAST else copied.get(id(part.tensor))
                if place is None:
                    place = Place(allocation=0, offset=offset, strides=_contiguous(part.box.sizes))
                    copied[id(part.tensor)] = place
                    offset += -(-part.tensor.nbytes // _ALIGN) * _ALIGN
                rows.append(place)
            places[name] = tuple(rows)
        secret = secrets.token_bytes(_SECRET_BYTES)
        self._file = os.memfd_create("weightbus", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._file, offset)
            # Readers need not fear that pages vanish under them.
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            memory = mmap.mmap(self._file, offset)
        except OSError as error:
            os.close(self._file)
            raise IpcError(f"no shared memory of {offset} bytes can be had: {error}") from error
        memory[:_SECRET_BYTES] = secret
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._parts = parts
        self.exports = Exports(
            host=host_id(),
            device="cpu",
            allocations=(Allocation(handle=_SHARED.pack(os.getpid(), self._file, secret), nbytes=offset),),
            places=places,
        )

    def moved(self) -> bool:
        return self._file < 0

    def pack(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Cast, where readers want them so: what is narrower has room."""
        copies = Copies()
        for name, dtype in dtypes.items():
            for part, place in zip(self._parts[name], self.exports.places[name], strict=True):
                if part.tensor.numel():
                    copies.add(
                        view_of(self._memory, place.offset, dtype, part.box.sizes, place.strides), part.tensor
                    )
        copies.run()

    def opened(self) -> None:
        """Nothing: the owner itself needs the one file."""

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._memory = self._memory.new_empty(0)


def _contiguous(sizes: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.append(strides[-1] * max(1, size))
    return tuple(reversed(strides[: len(sizes)]))


def view_of(
    memory: Tensor, offset: int, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int]
) -> Tensor:
    """A box in flat uint8 memory; offset in bytes, strides in elements."""
    reach = sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True)) + 1
    flat = memory[offset : offset + reach * dtype.itemsize].view(dtype)
    return flat.as_strided(sizes, strides)


class SharedImport:
    """One trainer rank's shared memory, mapped here until ``close`` and the last view: flat uint8, not to be
    written."""

    def __init__(self, exports: Exports) -> None:
        self.exports = exports
        self.memory = [_map(allocation) for allocation in exports.allocations]

    def close(self) -> None:
        # Unmapped with the last view; a plan that is dropped drops its views.
        self.memory = []


def _map(allocation: Allocation) -> Tensor:
    try:
        process, number, secret = _SHARED.unpack(allocation.handle)
        path = f"/proc/{process}/fd/{number}"
        if not stat.S_ISREG(os.stat(path).st_mode):  # a device may do things when it is opened
            raise IpcError("shared memory: expected a file, got something else")
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (struct.error, OSError) as error:
        raise IpcError(f"shared memory can't be opened: {error}") from error
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or not _HEADER_BYTES <= allocation.nbytes <= found.st_size:
            raise IpcError(f"shared memory: expected {allocation.nbytes} bytes, got another file")
        if not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise IpcError("shared memory: expected one that is sealed against shrinking")
        memory = mmap.mmap(file, allocation.nbytes, access=mmap.ACCESS_READ)
    except OSError as error:
        raise IpcError(f"shared memory can't be mapped: {error}") from error
    finally:
        os.close(file)
    if memory[:_SECRET_BYTES] != secret:
        raise IpcError("shared memory: expected the sender's, got another process's (pid namespaces differ)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is not to be written
        return torch.frombuffer(memory, dtype=torch.uint8)
