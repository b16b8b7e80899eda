"""Memory given to another process and read there: shared memory on the CPU, CUDA IPC on GPUs."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import resource
from pathlib import Path

import msgspec
import pytest
import torch
from processes import _context as context
from processes import shared_memory_files
from torch import Tensor

from weightbus.errors import WeightbusError
from weightbus.memory import cuda_ipc, shared_memory
from weightbus.memory.cuda_ipc import DeviceImport
from weightbus.memory.driver import EngineCopies
from weightbus.memory.export import IpcError
from weightbus.memory.ipc import export_parts, import_exports
from weightbus.memory.shard import Part
from weightbus.memory.shared_memory import SharedImport, view_of
from weightbus.planning.box import Box
from weightbus.planning.exports import Allocation, Exports
from weightbus.planning.runs import runs_of
from weightbus.planning.spec import Spec

CPU = torch.device("cpu")


def part(name: str, tensor: Tensor) -> Part:
    spec = Spec(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
    return Part(spec=spec, box=Box.whole(tensor.shape), tensor=tensor)


def parts_of(**tensors: Tensor) -> dict[str, tuple[Part, ...]]:
    return {name: (part(name, tensor),) for name, tensor in tensors.items()}


def source(device: torch.device = CPU) -> dict[str, Tensor]:
    base = torch.arange(60, dtype=torch.float32, device=device).view(6, 10)
    return {
        "columns": base[:, 2:7],
        "bf16": torch.arange(7, device=device).to(torch.bfloat16),
        "flags": torch.tensor([True, False, True], device=device),
        "scalar": torch.tensor(5, device=device),
        "empty": torch.zeros(0, 3, device=device),
    }


def read(opened: SharedImport, name: str, like: Tensor) -> Tensor:
    (place,) = opened.exports.places[name]
    memory = opened.memory[place.allocation]
    return view_of(memory, place.offset, like.dtype, like.shape, place.strides)


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:weightbus")


def dtypes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in tensors.items()}


def test_shared_memory_holds_what_was_packed_last() -> None:
    before, tensors = mapped(), source()
    export = export_parts(parts_of(**tensors), CPU)
    opened = import_exports(export.exports, CPU)
    assert isinstance(opened, SharedImport)
    for step in range(2):
        tensors["columns"].add_(step)
        export.pack(dtypes(tensors))
        for name, tensor in tensors.items():
            if tensor.numel():
                assert torch.equal(read(opened, name, tensor), tensor)
    export.pack({"bf16": torch.bfloat16})
    assert not export.moved()
    export.close()
    assert export.moved()
    opened.close()
    gc.collect()
    assert mapped() == before


def reader(pipe: object, exports: Exports, like: dict[str, Tensor]) -> None:
    """Answers each word of the pipe with what it reads, or with why it can't."""
    try:
        opened = import_exports(exports, CPU)
        assert isinstance(opened, SharedImport)
        while pipe.recv() == "read":  # type: ignore[attr-defined]
            pipe.send([read(opened, n, t).tolist() for n, t in like.items() if t.numel()])  # type: ignore[attr-defined]
    except WeightbusError as error:
        pipe.send(str(error))  # type: ignore[attr-defined]


@contextlib.contextmanager
def another_process(target, *arguments):
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        with contextlib.suppress(OSError):
            ours.send("end")
        process.join(20)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
        ours.close()


def ask(pipe, word: str = "read"):
    pipe.send(word)
    assert pipe.poll(30)
    return pipe.recv()


def test_another_process_reads_it_and_keeps_it_after_the_owner_let_go() -> None:
    tensors = source()
    export = export_parts(parts_of(**tensors), CPU)
    files = shared_memory_files()
    with another_process(reader, export.exports, tensors) as pipe:
        for step in range(2):
            tensors["bf16"].mul_(step + 2)
            export.pack(dtypes(tensors))
            assert ask(pipe) == [tensor.tolist() for tensor in tensors.values() if tensor.numel()]
        export.close()
        assert ask(pipe)[1] == tensors["bf16"].tolist()
    assert shared_memory_files() == files


def test_memory_that_is_not_the_trainers_is_refused() -> None:
    export = export_parts(parts_of(w=torch.ones(4)), CPU)
    exports = export.exports
    (good,) = exports.allocations

    def opened(handle: bytes, nbytes: int = good.nbytes) -> Exports:
        return msgspec.structs.replace(exports, allocations=(Allocation(handle=handle, nbytes=nbytes),))

    with pytest.raises(IpcError, match="another process's"):
        import_exports(opened(good.handle[:-1] + bytes([good.handle[-1] ^ 1])), CPU)
    with pytest.raises(IpcError, match="can't be opened"):
        import_exports(opened(b"short"), CPU)
    with pytest.raises(IpcError, match=f"expected {good.nbytes + 1} bytes, got another file"):
        import_exports(opened(good.handle, good.nbytes + 1), CPU)
    file = os.memfd_create("other")  # not sealed: it could be cut short under a reader
    os.ftruncate(file, good.nbytes)
    with pytest.raises(IpcError, match="sealed"):
        import_exports(opened(good.handle[:8] + file.to_bytes(8, "little") + good.handle[16:]), CPU)
    os.close(file)
    export.close()
    with pytest.raises(IpcError, match="can't be opened"):
        import_exports(exports, CPU)


def test_readers_can_neither_write_nor_resize() -> None:
    export = export_parts(parts_of(w=torch.ones(4)), CPU)
    opened = import_exports(export.exports, CPU)
    assert isinstance(opened, SharedImport)
    maps = Path("/proc/self/maps").read_text().splitlines()
    ours = [line.split()[1] for line in maps if "memfd:weightbus" in line]
    assert sorted(ours) == ["r--s", "rw-s"]
    handle = export.exports.allocations[0].handle
    file = os.open(f"/proc/self/fd/{int.from_bytes(handle[8:16], 'little')}", os.O_RDWR)
    assert fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    with pytest.raises(PermissionError):
        os.ftruncate(file, 0)
    os.close(file)
    export.close()


def test_shared_memory_that_cannot_be_had_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, nbytes: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(shared_memory.mmap, "mmap", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(IpcError, match=r"no shared memory of \d+ bytes can be had: .*Cannot allocate memory"):
        export_parts(parts_of(w=torch.ones(4)), CPU)
    assert len(os.listdir("/proc/self/fd")) == before


def test_why_not() -> None:
    exports = Exports(host="elsewhere", device="cpu")
    with pytest.raises(IpcError, match="different hosts"):
        import_exports(exports, CPU)
    with pytest.raises(IpcError, match="asleep"):
        import_exports(Exports(reason="asleep"), CPU)
    with pytest.raises(IpcError, match=r"w: expected rows of adjacent elements, got strides \(1, 5\)"):
        export_parts(parts_of(w=torch.ones(3, 5).t()), CPU)
    export = export_parts(parts_of(w=torch.ones(3)), CPU)
    with pytest.raises(IpcError, match="source on cpu, target on cuda:0"):
        import_exports(export.exports, torch.device("cuda", 0))
    export.close()


def holder(pipe: object, text: bytes) -> None:
    """Tells its process and a file that it has open, until it is told to end."""
    file = os.memfd_create("held")
    os.write(file, text)
    pipe.send((cuda_ipc._own_handle(), file))  # type: ignore[attr-defined]
    pipe.recv()  # type: ignore[attr-defined]


def test_files_of_another_process_are_taken_over_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)  # as where Python was built with older headers
    with another_process(holder, b"virtual memory") as pipe:
        assert pipe.poll(30)
        handle, file = pipe.recv()
        before = len(os.listdir("/proc/self/fd"))
        found = []
        for ours in cuda_ipc._files_of(Allocation(handle=handle, nbytes=2, pieces=((file, 1), (file, 1)))):
            found.append(os.pread(ours, 100, 0))
        assert found == [b"virtual memory"] * 2
        with pytest.raises(IpcError, match=r"can't be taken over \(pidfd_getfd\): Bad file descriptor"):
            list(cuda_ipc._files_of(Allocation(handle=handle, nbytes=1, pieces=((file + 1000, 1),))))
        with pytest.raises(IpcError, match="expected a process of the same pid namespace"):
            list(cuda_ipc._files_of(Allocation(handle=handle[:8] + bytes(8), nbytes=1, pieces=((file, 1),))))
        with pytest.raises(IpcError, match=r"its process can't be found \(pidfd_open\): Invalid argument"):
            list(cuda_ipc._files_of(Allocation(handle=bytes(8) + handle[8:], nbytes=1, pieces=((file, 1),))))
        with pytest.raises(IpcError, match="expected a process, got"):
            list(cuda_ipc._files_of(Allocation(handle=b"short", nbytes=1, pieces=((file, 1),))))
        assert len(os.listdir("/proc/self/fd")) == before


def test_more_pieces_than_files_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, found: limits.append(found))
    cuda_ipc._make_room_for_files(0)
    cuda_ipc._make_room_for_files(10)
    assert limits == [(1024, 4096)]
    cuda_ipc._make_room_for_files(1000)
    assert 1000 < limits[-1][0] < 1400
    assert limits[-1][1] == 4096
    with pytest.raises(IpcError, match=r"virtual memory of 9000 pieces: expected a limit of .* got 4096"):
        cuda_ipc._make_room_for_files(9000)


def test_mappings_are_given_back_by_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may have made no call of CUDA yet; a device that has failed keeps none of them from being tried."""
    calls: list[object] = []

    def bind() -> None:
        calls.append("bind")
        raise RuntimeError("the device has failed")

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda_ipc.driver, "bind", bind)
    monkeypatch.setattr(cuda_ipc.driver, "close_handle", calls.append)
    opened = DeviceImport.__new__(DeviceImport)
    opened.exports = Exports(allocations=(Allocation(handle=b"a", nbytes=1),) * 2)
    opened.addresses, opened._device = [7, 8], torch.device("cuda", 0)
    opened.close()
    assert calls == ["bind", 7, 8]


# -- CUDA --------------------------------------------------------------------------------------------


def device_reader(
    pipe: object, exports: Exports, like: dict[str, tuple[tuple[int, ...], torch.dtype]], index: int
):
    """As ``reader``, by copies to its own device."""
    device = torch.device("cuda", index)
    try:
        opened = import_exports(exports, device)
        assert isinstance(opened, DeviceImport)
        while pipe.recv() == "read":  # type: ignore[attr-defined]
            found = {}
            for name, (shape, dtype) in like.items():
                out = torch.full(shape, 99, device=device).to(dtype)
                (place,) = exports.places[name]
                address = opened.addresses[place.allocation] + place.offset
                runs = runs_of(
                    shape, out.stride(), place.strides, itemsize=out.itemsize, dst=out.data_ptr(), src=address
                )
                with torch.cuda.device(device):
                    EngineCopies(runs).start(torch.cuda.current_stream())
                torch.cuda.synchronize(device)
                found[name] = out.tolist()
            pipe.send((found, opened.near, len(opened.addresses)))  # type: ignore[attr-defined]
        opened.close()
    except WeightbusError as error:
        pipe.send(str(error))  # type: ignore[attr-defined]


@pytest.mark.cuda
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.gpus(2))])
def test_another_process_reads_a_gpu_in_place(index: int) -> None:
    device = torch.device("cuda", 0)
    tensors = source(device) | {"large": torch.arange(9 << 20, device=device, dtype=torch.int32).view(9, -1)}
    like = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items() if name != "large"}
    like["large"] = (9, 16), torch.int32
    export = export_parts(parts_of(**(tensors | {"large": tensors["large"][:, 5:21]})), device)
    blocks = len(export.exports.allocations)
    assert 2 <= blocks < len(tensors)  # small tensors share a block of the caching allocator
    expected = {n: t.tolist() for n, t in (tensors | {"large": tensors["large"][:, 5:21]}).items()}
    torch.cuda.synchronize()
    with another_process(device_reader, export.exports, like, index) as pipe:
        assert ask(pipe) == (expected, index == 0, blocks)
        tensors["scalar"].fill_(6)
        torch.cuda.synchronize()
        assert ask(pipe)[0]["scalar"] == 6


@pytest.mark.cuda
def test_memory_that_was_freed_is_noticed() -> None:
    device = torch.device("cuda", 0)
    held = parts_of(w=torch.ones(8 << 20, device=device))
    export = export_parts(held, device)
    assert not export.moved()
    held.clear()
    torch.cuda.empty_cache()
    assert export.moved()
