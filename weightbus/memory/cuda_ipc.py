"""Allocations of a CUDA device, given to other processes and mapped by them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
from bisect import bisect_right
from collections.abc import Generator, Mapping, Sequence
from functools import cache

import torch

from weightbus.memory import driver
from weightbus.memory.driver import DriverError
from weightbus.memory.export import IpcError, Parts, device_id, host_id
from weightbus.memory.shard import Part
from weightbus.memory.warn_once import say_once
from weightbus.planning.exports import Allocation, Exports, Place

_PROCESS = struct.Struct("<QQ")  # process id, its namespace

# Numbers of system calls, the same on all architectures. Python has the first one only if the headers that it
# was built with do.
_PIDFD_OPEN, _PIDFD_GETFD = 434, 438

CURE = "the reader has to be of the same user, and allowed to trace it (kernel.yama.ptrace_scope)"

# File descriptors that are left to others where the pieces of virtual memory need more than a process may have.
SPARE_FILES = 256


class DeviceExport:
    """Allocations of a CUDA device, as they are."""

    def __init__(self, parts: Parts, device: torch.device) -> None:
        self._files: list[int] = []
        try:
            with torch.cuda.device(device):
                driver.bind()
                bases, allocations = self._open(_allocated(parts))
        except BaseException:
            self.close()
            raise

        def place(part: Part) -> Place:
            index = max(0, bisect_right(bases, _extent(part)[0]) - 1)
            offset = _extent(part)[0] - bases[index] if part.tensor.numel() else 0
            return Place(allocation=index, offset=offset, strides=part.tensor.stride())

        self.exports = Exports(
            host=host_id(),
            device=device_id(device),
            allocations=tuple(allocations),
            places={name: tuple(map(place, held)) for name, held in parts.items()},
        )

    def _open(self, allocated: Sequence[tuple[int, int]]) -> tuple[list[int], list[Allocation]]:
        """Handles of allocations, given by base and bytes in order; and the base of each. Neighbors in virtual
        memory count as one, as a tensor may lie across them."""
        self._allocated = driver.Allocated([base for base, _ in allocated])
        virtual = [not driver.has_handle(base) for base, _ in allocated]
        _make_room_for_files(sum(virtual))
        bases: list[int] = []
        found: list[Allocation] = []
        for (base, nbytes), is_virtual in zip(allocated, virtual, strict=True):
            if not is_virtual:
                bases.append(base)
                found.append(Allocation(handle=driver.handle_of(base), nbytes=nbytes))
                continue
            self._files.append(driver.file_of(base))
            piece = self._files[-1], nbytes
            if found and found[-1].pieces and bases[-1] + found[-1].nbytes == base:
                pieces = (*found[-1].pieces, piece)
                found[-1] = Allocation(handle=_own_handle(), nbytes=found[-1].nbytes + nbytes, pieces=pieces)
            else:
                bases.append(base)
                found.append(Allocation(handle=_own_handle(), nbytes=nbytes, pieces=(piece,)))
        return bases, found

    def moved(self) -> bool:
        # A tensor's address says too little: freed memory may come back there, as other memory.
        return not self._allocated.unchanged()

    def pack(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Nothing: readers see the source itself, and cast it."""

    def opened(self) -> None:
        self.close()

    def close(self) -> None:
        """Handles hold no memory, but files do."""
        files, self._files = self._files, []
        for file in files:
            os.close(file)


def _extent(part: Part) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one; zeros for no elements."""
    tensor = part.tensor
    if not tensor.numel():
        return 0, 0
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.itemsize


def _allocated(parts: Parts) -> list[tuple[int, int]]:
    """Base and bytes of each allocation in which parts lie, in order of address."""
    found: list[tuple[int, int]] = []
    at = 0
    for start, end in sorted(_extent(part) for held in parts.values() for part in held):
        at = max(at, start)
        while at < end:
            base, nbytes = driver.allocation_of(at)
            found.append((base, nbytes))
            at = base + nbytes
    return found


def _own_handle() -> bytes:
    """What finds this process's files."""
    return _PROCESS.pack(os.getpid(), os.stat("/proc/self/ns/pid").st_ino)


def _make_room_for_files(count: int) -> None:
    """Raise the limit of open files where so many more would not fit. Raises IpcError if it can't be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + count + SPARE_FILES if count else 0
    if wanted > hard:
        raise IpcError(f"virtual memory of {count} pieces: expected a limit of {wanted} open files, got {hard}")
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _files_of(allocation: Allocation) -> Generator[int, None, None]:
    """This process's own descriptor of each piece's file, until the next is taken."""
    try:
        process, namespace = _PROCESS.unpack(allocation.handle)
    except struct.error as error:
        raise IpcError(f"virtual memory: expected a process, got {error}") from error
    if namespace != os.stat("/proc/self/ns/pid").st_ino:
        raise IpcError("virtual memory: expected a process of the same pid namespace")
    owner = _libc().syscall(_PIDFD_OPEN, ctypes.c_uint(process), 0)
    if owner < 0:
        reason = os.strerror(ctypes.get_errno())
        raise IpcError(f"virtual memory: its process can't be found (pidfd_open): {reason}")
    try:
        for number, _ in allocation.pieces:
            file = _libc().syscall(_PIDFD_GETFD, owner, ctypes.c_uint(number), 0)
            if file < 0:
                reason = os.strerror(ctypes.get_errno())
                raise IpcError(f"virtual memory: its file can't be taken over (pidfd_getfd): {reason}; {CURE}")
            try:
                yield file
            finally:
                os.close(file)
    finally:
        os.close(owner)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class DeviceImport:
    """One trainer rank's allocations, mapped here until ``close``.

    addresses: of each, in the mapping of the device that copies. near: whether they lie on that device.
    """

    def __init__(self, exports: Exports, device: torch.device) -> None:
        self.exports = exports
        self.near = exports.device == device_id(device)
        self.addresses: list[int] = []
        self._device = device
        try:
            with torch.cuda.device(device):
                driver.bind()
                for allocation in exports.allocations:
                    self.addresses.append(_open_allocation(allocation))
        except BaseException:
            self.close()
            raise

    def check_sizes(self) -> None:
        """Raises IpcError, and closes, where an allocation is smaller than said, as a client might say."""
        try:
            with torch.cuda.device(self._device):
                driver.bind()
                for address, allocation in zip(self.addresses, self.exports.allocations, strict=True):
                    if allocation.pieces:
                        continue  # more than there is could not be mapped
                    if (nbytes := driver.allocation_of(address)[1]) < allocation.nbytes:
                        raise IpcError(f"GPU memory: expected {allocation.nbytes} bytes, got {nbytes}")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        addresses, self.addresses = self.addresses, []
        with torch.cuda.device(self._device):
            with contextlib.suppress(RuntimeError):  # a device that has failed
                driver.bind()  # the thread may be another one than opened them
            for address, allocation in zip(addresses, self.exports.allocations, strict=False):
                try:
                    if allocation.pieces:
                        driver.unmap_files(address, allocation.nbytes)
                    else:
                        driver.close_handle(address)
                except DriverError as error:  # a device that has failed; the others are given back
                    say_once(str(error))


def _open_allocation(allocation: Allocation) -> int:
    if not allocation.pieces:
        return driver.open_handle(allocation.handle)
    with contextlib.closing(_files_of(allocation)) as files:
        return driver.map_files(files, [nbytes for _, nbytes in allocation.pieces])
