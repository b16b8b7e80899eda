"""Memory of another process of this host: given to read by its owner, and mapped by a reader.

CUDA: the source's own allocations, read in place: by CUDA IPC, or, as virtual memory (torch's
``expandable_segments``) has no such handles, by file descriptors that the reader takes over. CPU: anonymous
shared memory (memfd), into which the owner packs its parts at each update; it has no name, so that nothing is
left of a killed process. Nobody writes into another process's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import resource
import secrets
import socket
import stat
import struct
import warnings
from bisect import bisect_right
from collections.abc import Collection, Generator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from weightbus import driver
from weightbus.driver import DriverError
from weightbus.errors import WeightbusError
from weightbus.exports import OTHER_HOST, Allocation, Exports, Place
from weightbus.once import say_once
from weightbus.part import Part
from weightbus.runs import row_major
from weightbus.torch_copy import Copies

# Of each shared memory: the secret by which a reader knows that it has opened the right one.
_HEADER_BYTES = mmap.PAGESIZE
_SECRET_BYTES = 16
_ALIGN = 64
_SHARED = struct.Struct(f"<QQ{_SECRET_BYTES}s")  # process id, file descriptor, secret
_PROCESS = struct.Struct("<QQ")  # process id, its namespace

# Numbers of system calls, the same on all architectures. Python has the first one only if the headers that it
# was built with do.
_PIDFD_OPEN, _PIDFD_GETFD = 434, 438
CURE = "the reader has to be of the same user, and allowed to trace it (kernel.yama.ptrace_scope)"

# File descriptors that are left to others where the pieces of virtual memory need more than a process may have.
SPARE_FILES = 256

Parts = Mapping[str, Sequence[Part]]


class IpcError(WeightbusError):
    """Memory that can't be given to another process, or not be read here; the text says why."""


@cache
def host_id() -> str:
    """The same for all processes of one running kernel, and for no others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def device_id(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


class Export(Protocol):
    """One trainer rank's parts, open to readers until ``close``."""

    exports: Exports

    def moved(self) -> bool:
        """Whether readers would see memory that is no longer the source's."""

    def pack(self, names: Collection[str]) -> None:
        """Make what readers see of these tensors the source's present values."""

    def opened(self) -> None:
        """No further reader will come."""

    def close(self) -> None: ...


def export_parts(parts: Parts, device: torch.device) -> Export:
    """Raises IpcError or DriverError with the reason why other processes can't read the parts."""
    for name, held in parts.items():
        for part in held:
            if part.tensor.device != device:
                raise IpcError(f"{name}: expected memory on {device}, got {part.tensor.device}")
            if not row_major(part.tensor.stride(), part.box.sizes):
                raise IpcError(
                    f"{name}: expected rows of adjacent elements, got strides {part.tensor.stride()}"
                )
    return DeviceExport(parts, device) if device.type == "cuda" else SharedExport(parts)


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

    def pack(self, names: Collection[str]) -> None:
        """Nothing: readers see the source itself."""

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


class SharedExport:
    """A second copy of the parts, in shared memory. Pages that are never packed take no memory."""

    def __init__(self, parts: Parts) -> None:
        if not hasattr(os, "memfd_create"):
            raise IpcError("this system has no anonymous shared memory (memfd)")
        offset = _HEADER_BYTES
        places: dict[str, tuple[Place, ...]] = {}
        copied: dict[int, Place] = {}  # of tied tensors there is one copy for all names
        for name, held in parts.items():
            rows = []
            for part in held:
                if (place := copied.get(id(part.tensor))) is None:
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

    def pack(self, names: Collection[str]) -> None:
        copies = Copies()
        for name in names:
            for part, place in zip(self._parts[name], self.exports.places[name], strict=True):
                if part.tensor.numel():
                    copies.add(self._view(part, place), part.tensor)
        copies.run()

    def opened(self) -> None:
        """Nothing: the owner itself needs the one file."""

    def _view(self, part: Part, place: Place) -> Tensor:
        return view_of(self._memory, place.offset, part.tensor.dtype, part.box.sizes, place.strides)

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


def import_exports(exports: Exports, device: torch.device) -> DeviceImport | SharedImport:
    """Map them for copies to ``device``. Raises IpcError or DriverError with the reason why that can't be."""
    if exports.reason:
        raise IpcError(exports.reason)
    if exports.host != host_id():
        raise IpcError(OTHER_HOST)
    if (exports.device == "cpu") != (device.type == "cpu"):
        raise IpcError(f"source on {exports.device}, target on {device}")
    return DeviceImport(exports, device) if device.type == "cuda" else SharedImport(exports)


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


class SharedImport:
    """One trainer rank's shared memory, mapped here until ``close`` and the last view: flat uint8, not to be
    written."""

    def __init__(self, exports: Exports) -> None:
        self.exports = exports
        self.memory = [_map(allocation) for allocation in exports.allocations]

    def close(self) -> None:
        # Unmapped with the last view; a plan that is dropped drops its views.
        self.memory = []


Import = DeviceImport | SharedImport


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
