"""Calls of the CUDA driver that torch does not offer: memory of other processes, copies between bare addresses.

Through ctypes, on the library that torch itself has loaded. Each call works on the calling thread's
current device, which the caller sets (``torch.cuda.device``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import starmap
from typing import Any

import torch

from weightbus.errors import WeightbusError
from weightbus.planning.runs import Run

_LAZY_ENABLE_PEER_ACCESS = 1
_BUFFER_ID, _HAS_HANDLE, _HANDLE_TYPES = 7, 10, 14  # of CUpointer_attribute
_FILE = 1  # of CUmemAllocationHandleType
_ON_DEVICE, _READ = 1, 1  # of CUmemLocationType, CUmemAccess_flags
_HOST, _UNIFIED = 1, 4  # of CUmemorytype; unified: the driver sees from the address where it lies


class DriverError(WeightbusError):
    """The CUDA driver refused a call."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", ctypes.c_int), ("device", ctypes.c_int), ("flags", ctypes.c_int))


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (
        ("src_x", ctypes.c_size_t),
        ("src_y", ctypes.c_size_t),
        ("src_type", ctypes.c_int),
        ("src_host", ctypes.c_void_p),
        ("src", ctypes.c_uint64),
        ("src_array", ctypes.c_void_p),
        ("src_pitch", ctypes.c_size_t),
        ("dst_x", ctypes.c_size_t),
        ("dst_y", ctypes.c_size_t),
        ("dst_type", ctypes.c_int),
        ("dst_host", ctypes.c_void_p),
        ("dst", ctypes.c_uint64),
        ("dst_array", ctypes.c_void_p),
        ("dst_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


_POINTER, _SIZE, _ADDRESS = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (ctypes.c_int, _POINTER),
    "cuMemGetAddressRange_v2": (_POINTER, _POINTER, _ADDRESS),
    "cuPointerGetAttribute": (_POINTER, ctypes.c_int, _ADDRESS),
    "cuIpcGetMemHandle": (_POINTER, _ADDRESS),
    "cuIpcOpenMemHandle_v2": (_POINTER, _Handle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_ADDRESS,),
    "cuMemRetainAllocationHandle": (_POINTER, _ADDRESS),
    "cuMemExportToShareableHandle": (_POINTER, ctypes.c_uint64, ctypes.c_int, ctypes.c_uint64),
    "cuMemImportFromShareableHandle": (_POINTER, _POINTER, ctypes.c_int),
    "cuMemRelease": (ctypes.c_uint64,),
    "cuMemAddressReserve": (_POINTER, _SIZE, _SIZE, _ADDRESS, ctypes.c_uint64),
    "cuMemAddressFree": (_ADDRESS, _SIZE),
    "cuMemMap": (_ADDRESS, _SIZE, _SIZE, ctypes.c_uint64, ctypes.c_uint64),
    "cuMemUnmap": (_ADDRESS, _SIZE),
    "cuMemSetAccess": (_ADDRESS, _SIZE, _POINTER, _SIZE),
    "cuMemcpyAsync": (_ADDRESS, _ADDRESS, _SIZE, _POINTER),
    "cuMemcpy2DAsync_v2": (_POINTER, _POINTER),
}


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
    except (OSError, AttributeError) as error:
        raise DriverError(f"CUDA driver: {error}") from error
    return library


def _check(what: str, status: int) -> None:
    if status:
        name = ctypes.c_char_p()
        _library().cuGetErrorName(status, ctypes.byref(name))
        raise DriverError(f"{what}: CUDA driver says {(name.value or b'?').decode()} ({status})")


def bind() -> None:
    """Make the current device's context the thread's own, as any call of the runtime does."""
    torch.cuda.current_stream().query()


def allocation_of(address: int) -> tuple[int, int]:
    """Base and bytes of the allocation that holds ``address``."""
    base, nbytes = ctypes.c_uint64(), ctypes.c_size_t()
    status = _library().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(nbytes), address)
    _check("address range", status)
    return base.value, nbytes.value


class Allocated:
    """Sees whether allocations are still those that were at these addresses when it was made.

    Each has a number that no other allocation of the process ever has. All that the calls need is prepared.
    """

    def __init__(self, bases: Sequence[int]) -> None:
        self._numbers = (ctypes.c_uint64 * len(bases))()
        first, width = ctypes.addressof(self._numbers), ctypes.sizeof(ctypes.c_uint64)
        self._calls = [
            (ctypes.c_void_p(first + i * width), ctypes.c_int(_BUFFER_ID), ctypes.c_uint64(base))
            for i, base in enumerate(bases)
        ]
        self._complete = self._ask()
        self._expected = bytes(self._numbers)

    def _ask(self) -> bool:
        """Fill in the numbers; False where nothing is allocated."""
        return not any(starmap(_library().cuPointerGetAttribute, self._calls))

    def unchanged(self) -> bool:
        return self._complete and self._ask() and bytes(self._numbers) == self._expected


def _attribute(number: int, address: int) -> int:
    value = ctypes.c_uint64()
    _check("attribute", _library().cuPointerGetAttribute(ctypes.byref(value), number, address))
    return value.value


def has_handle(address: int) -> bool:
    """Whether ``handle_of`` serves; else it is virtual memory, for ``file_of``."""
    return bool(_attribute(_HAS_HANDLE, address))


def handle_of(base: int) -> bytes:
    """The handle by which another process can open an allocation. Raises DriverError with the reason."""
    handle = _Handle()
    _check("IPC handle", _library().cuIpcGetMemHandle(ctypes.byref(handle), base))
    return bytes(handle.reserved)


def file_of(base: int) -> int:
    """A file descriptor by which another process can map the allocation behind a piece of virtual memory.

    The caller closes it. Raises DriverError with the reason.
    """
    if not _attribute(_HANDLE_TYPES, base) & _FILE:
        raise DriverError("virtual memory that its allocator did not make to be shared, as pools that sleep do")
    library, handle, file = _library(), ctypes.c_uint64(), ctypes.c_int()
    _check("virtual memory", library.cuMemRetainAllocationHandle(ctypes.byref(handle), base))
    try:
        _check("sharing it", library.cuMemExportToShareableHandle(ctypes.byref(file), handle, _FILE, 0))
    finally:
        library.cuMemRelease(handle)
    return file.value


def open_handle(handle: bytes) -> int:
    """Map another process's allocation under the current device; its address here.

    Copies into this device's memory run at the full rate only if the mapping is this device's own, not
    that of the device on which the memory lies.
    """
    address = ctypes.c_uint64()
    raw = _Handle.from_buffer_copy(handle)
    status = _library().cuIpcOpenMemHandle_v2(ctypes.byref(address), raw, _LAZY_ENABLE_PEER_ACCESS)
    _check("opening an IPC handle", status)
    return address.value


def close_handle(address: int) -> None:
    _check("closing an IPC handle", _library().cuIpcCloseMemHandle(address))


def map_files(files: Iterable[int], sizes: Sequence[int]) -> int:
    """Map what other processes' ``file_of`` gave, one behind the other, for the current device to read; the
    address. The files may be closed as the next one is taken. Raises DriverError."""
    library, total = _library(), sum(sizes)
    address, handle = ctypes.c_uint64(), ctypes.c_uint64()
    _check("addresses", library.cuMemAddressReserve(ctypes.byref(address), total, 0, 0, 0))
    base, mapped = address.value, 0
    try:
        for file, nbytes in zip(files, sizes, strict=True):
            status = library.cuMemImportFromShareableHandle(ctypes.byref(handle), ctypes.c_void_p(file), _FILE)
            _check("opening virtual memory", status)
            try:
                _check("mapping virtual memory", library.cuMemMap(base + mapped, nbytes, 0, handle, 0))
            finally:
                library.cuMemRelease(handle)
            mapped += nbytes
        access = _Access(location=_ON_DEVICE, device=torch.cuda.current_device(), flags=_READ)
        _check("access to virtual memory", library.cuMemSetAccess(base, total, ctypes.byref(access), 1))
    except BaseException:
        if mapped:
            library.cuMemUnmap(base, mapped)
        library.cuMemAddressFree(base, total)
        raise
    return base


def unmap_files(address: int, nbytes: int) -> None:
    _check("unmapping virtual memory", _library().cuMemUnmap(address, nbytes))
    _check("giving back addresses", _library().cuMemAddressFree(address, nbytes))


class EngineCopies:
    """Copies between addresses, one call of the driver for each; prepared once."""

    def __init__(self, runs: list[Run], *, to_host: bool = False) -> None:
        """runs: offsets are whole addresses. to_host: destinations are the host's memory, pinned or not."""
        self._calls: list[tuple[Any, tuple[Any, ...]]] = []
        library = _library()
        for run in runs:
            if run.rows == 1 or run.src_pitch < run.width:  # rows that overlap, as of an expanded source
                for row in range(run.rows):
                    dst, src = run.dst + row * run.dst_pitch, run.src + row * run.src_pitch
                    self._calls.append((library.cuMemcpyAsync, (dst, src, run.width)))
                continue
            copy = _Copy2D(
                src_type=_UNIFIED,
                src=run.src,
                src_pitch=run.src_pitch,
                dst_type=_HOST if to_host else _UNIFIED,
                dst_host=run.dst if to_host else None,
                dst=0 if to_host else run.dst,
                dst_pitch=run.dst_pitch,
                width=run.width,
                height=run.rows,
            )
            self._calls.append((library.cuMemcpy2DAsync_v2, (ctypes.pointer(copy),)))

    def start(self, stream: torch.cuda.Stream) -> None:
        """Queue all of them on ``stream``."""
        handle = stream.cuda_stream
        for call, arguments in self._calls:
            if status := call(*arguments, handle):
                _check("peer copy", status)
