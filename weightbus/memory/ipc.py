"""Memory of another process of this host: given to read by its owner, and mapped by a reader.

CUDA: the source's own allocations, read in place: by CUDA IPC, or, as virtual memory (torch's
``expandable_segments``) has no such handles, by file descriptors that the reader takes over. CPU: anonymous
shared memory (memfd), into which the owner packs its parts at each update; it has no name, so that nothing is
left of a killed process. Nobody writes into another process's memory.
"""

from __future__ import annotations

import torch

from weightbus.memory.cuda_ipc import DeviceExport, DeviceImport
from weightbus.memory.export import Export, IpcError, Parts, host_id
from weightbus.memory.shared_memory import SharedExport, SharedImport
from weightbus.planning.exports import OTHER_HOST, Exports
from weightbus.planning.runs import row_major


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


def import_exports(exports: Exports, device: torch.device) -> DeviceImport | SharedImport:
    """Map them for copies to ``device``. Raises IpcError or DriverError with the reason why that can't be."""
    if exports.reason:
        raise IpcError(exports.reason)
    if exports.host != host_id():
        raise IpcError(OTHER_HOST)
    if (exports.device == "cpu") != (device.type == "cpu"):
        raise IpcError(f"source on {exports.device}, target on {device}")
    return DeviceImport(exports, device) if device.type == "cuda" else SharedImport(exports)


Import = DeviceImport | SharedImport
