"""Tensors in a request that stay where they are: the payload says where, and each rank copies what it holds.

Only between processes of one host: CUDA memory by its IPC handle, CPU tensors by shared memory, as for peer
copies (``ipc``). What a client sends is checked before an address is made of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
import torch
from torch import Tensor

from weightbus.errors import SpecError, WeightbusError
from weightbus.memory import driver
from weightbus.memory.cuda_ipc import DeviceImport
from weightbus.memory.export import Parts, host_id
from weightbus.memory.ipc import Import, export_parts, import_exports
from weightbus.memory.shard import Part, check_plain, plain_view, spec_of
from weightbus.planning.box import Box
from weightbus.planning.exports import Exports, Place, decode_exports, encode_exports
from weightbus.planning.facts import Facts, Holding, decode_facts, encode_facts
from weightbus.planning.runs import runs_of
from weightbus.planning.spec import ITEMSIZE
from weightbus.storage.disk import Stored
from weightbus.storage.ranges import OnDevice
from weightbus.storage.reading import memory_of
from weightbus.tensors.torch_dtensor import is_dtensor
from weightbus.tensors.torch_module import named_pairs

CURE = "else send the tensors' bytes: safetensors.torch.save"


class _Payload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """facts: the tensors, each one whole box. exports: where they lie."""

    facts: bytes
    exports: bytes


class SharedTensors:
    """Tensors that other processes of this host may read, until ``close``.

    payload: for a request with the format ``shared``; over HTTP in base64.
    """

    def __init__(self, parts: Parts, device: torch.device) -> None:
        self._parts = parts  # what lies on a GPU must stay there
        self._export = export_parts(parts, device)
        try:
            self._export.pack({name: part.tensor.dtype for name, (part,) in parts.items()})
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            facts = {name: Holding(spec=part.spec, boxes=(part.box,)) for name, (part,) in parts.items()}
            exports = encode_exports(self._export.exports)
            self.payload = msgspec.msgpack.encode(_Payload(facts=encode_facts(facts), exports=exports))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Not before the request is answered; what is asked for later is refused, or reads other bytes."""
        self._export.close()
        self._parts = {}

    def __enter__(self) -> SharedTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def share_tensors(named: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> SharedTensors:
    """Let ranks on this host read tensors; what they need to know is ``payload``, to be sent in a request.

    named: whole tensors by the names of the model or module that takes them; all on the CPU, of which shared
        memory takes a copy, or all on one GPU, where they are read in place and must not change meanwhile.
    Waits for the GPU's current stream. The ranks have copied everything when the request is answered.
    Raises SpecError for what is no plain tensor, IpcError or DriverError for memory that can't be shared.
    """
    parts: dict[str, tuple[Part, ...]] = {}
    pairs = named.items() if isinstance(named, Mapping) else named
    for name, tensor in named_pairs(pairs, "share_tensors: expected (name, tensor) pairs"):
        if name in parts:
            raise SpecError(f"{name}: expected each name once, got it twice; share_tensors")
        if is_dtensor(tensor):
            raise SpecError(f"{name}: expected a whole tensor, got a DTensor; take its full_tensor()")
        check_plain(name, tensor)
        whole, view = Box.whole(tensor.shape), plain_view(tensor)
        view = view if _ordered(view.stride(), whole, gaps=True) else view.contiguous()
        parts[name] = (Part(spec=spec_of(name, tensor), box=whole, tensor=view),)
    if not parts:
        raise SpecError("share_tensors: expected at least one tensor, got none")
    return SharedTensors(parts, next(iter(parts.values()))[0].tensor.device)


def open_shared(
    where: Path, data: bytes, device: torch.device
) -> tuple[dict[str, Stored], dict[Path, memoryview | OnDevice], Import]:
    """A payload's tensors by name, the memory behind their paths, and the mapping, which has to be closed.

    device: the GPU that copies, where the tensors lie on one.
    Raises SpecError, with the cure, for a payload that is not sound, and for memory out of reach of this rank.
    """
    try:
        payload = msgspec.msgpack.decode(data, type=_Payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError(f"{where}: expected what weightbus.share_tensors makes, got {error}") from error
    facts = decode_facts(payload.facts, str(where))
    exports = decode_exports(payload.exports, facts, str(where))
    if exports.host != host_id():
        raise SpecError(f"{where}: expected tensors of a process on this rank's host, got another's; {CURE}")
    on_host = exports.device == "cpu"
    if on_host and len(exports.allocations) != 1:
        raise SpecError(f"{where}: expected one shared memory, got {len(exports.allocations)}")
    _check(facts, exports, gaps=not on_host)
    try:
        opened = import_exports(exports, torch.device("cpu") if on_host else device)
        if isinstance(opened, DeviceImport):
            opened.check_sizes()
    except WeightbusError as error:
        raise SpecError(f"{where}: {error}; {CURE}") from error
    tensors: dict[str, Stored] = {}
    memory: dict[Path, memoryview | OnDevice] = {}
    for name, holding in facts.items():
        path, spec, (place,) = where / str(len(tensors)), holding.spec, exports.places[name]
        tensors[name] = Stored(spec=spec, path=path, begin=0, end=spec.nbytes)
        if isinstance(opened, DeviceImport):
            memory[path] = _Foreign(opened, place, ITEMSIZE[spec.dtype])
        elif spec.nbytes:
            flat = opened.memory[place.allocation]
            memory[path] = memory_of(flat[place.offset : place.offset + spec.nbytes])
        else:
            memory[path] = memoryview(b"")
    return tensors, memory, opened


def _check(facts: Facts, exports: Exports, *, gaps: bool) -> None:
    for name, holding in facts.items():
        whole = Box.whole(holding.spec.shape)
        if holding.boxes != (whole,):
            raise SpecError(f"{name}: expected the whole tensor {whole}, got {holding.boxes}; shared tensors")
        (place,) = exports.places[name]
        if not _ordered(place.strides, whole, gaps=gaps):
            raise SpecError(f"{name}: expected rows one after the other, got strides {place.strides}")


def _ordered(strides: Sequence[int], box: Box, *, gaps: bool) -> bool:
    """Whether elements lie in row-major order, rows side by side or with gaps between them."""
    reach = 1
    for stride, size in zip(reversed(strides), reversed(box.sizes), strict=True) if box.volume else ():
        if size != 1:
            if stride < reach or (stride > reach and (reach == 1 or not gaps)):
                return False
            reach = stride * size
    return True


@dataclass(frozen=True, slots=True)
class _Foreign:
    """A tensor in memory of another process on a GPU, mapped here."""

    opened: DeviceImport
    place: Place
    itemsize: int

    def copy(self, box: Box, dst: Tensor) -> None:
        strides = self.place.strides
        first = sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
        src = self.opened.addresses[self.place.allocation] + self.place.offset + first * self.itemsize
        runs = runs_of(box.sizes, dst.stride(), strides, itemsize=self.itemsize, dst=dst.data_ptr(), src=src)
        driver.bind()
        driver.EngineCopies(runs, to_host=dst.device.type == "cpu").start(torch.cuda.current_stream())
