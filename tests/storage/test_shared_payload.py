"""Tensors of another process of this host in a request: it says where they lie, ranks copy what they hold."""

from __future__ import annotations

import base64
import copy
import gc
import os
import threading
import time
from pathlib import Path

import msgspec
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline import SHAPES, drawn, pipeline, versions_held
from processes import Job, run_jobs

import weightbus
from weightbus.control.client import Client
from weightbus.errors import SpecError
from weightbus.hub.server import Hub
from weightbus.planning.box import Box
from weightbus.planning.exports import Allocation, Exports, Place
from weightbus.storage.ranges import Read, pieces_of
from weightbus.storage.reading import Reader
from weightbus.storage.shared_payload import open_shared
from weightbus.storage.sources import Sources
from weightbus.tools.http import app as http

CPU, HERE = torch.device("cpu"), Path("payload")


def bits(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def mapped():
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:weightbus")


def tensors():
    base = torch.arange(60.0).view(6, 10)
    return {
        "columns": base[:, 2:7],
        "transposed": base.t(),
        "expanded": torch.arange(3).expand(4, 3),
        "bf16": torch.arange(7).to(torch.bfloat16),
        "fp8": torch.arange(4.0).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False, True]),
        "complex": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128),
        "scalar": torch.tensor(5),
        "empty": torch.zeros(0, 3),
    }


def read(payload, views=None, device=CPU):
    """Every tensor of a payload as a load reads it, into ``views`` or memory like the sender's."""
    stored, memory, opened = open_shared(HERE, payload, device)
    made = {n: torch.empty(t.spec.shape, dtype=getattr(torch, t.spec.dtype)) for n, t in stored.items()}
    views = views or made
    reads = [Read(stored=t, box=Box.whole(t.spec.shape), view=views[n]) for n, t in stored.items()]
    reader = Reader(Sources(stored.values(), memory), device, lambda: None)
    reader.write(pieces_of(reads, 64), {i: read.view for i, read in enumerate(reads)}, lambda nbytes: None)
    opened.close()
    return views


@pytest.mark.parametrize("named", [tensors(), list(tensors().items())], ids=["mapping", "pairs"])
def test_what_is_shared_is_read_bit_for_bit_and_unmapped(named):
    before, files = mapped(), len(os.listdir("/proc/self/fd"))
    with weightbus.share_tensors(named) as shared:
        assert len(shared.payload) < 2000
        found = read(shared.payload)
    for name, tensor in dict(named).items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(found[name]), bits(tensor)), name
    with pytest.raises(SpecError, match=r"payload: shared memory can't be opened.* safetensors\.torch\.save"):
        open_shared(HERE, shared.payload, CPU)
    assert (mapped(), len(os.listdir("/proc/self/fd"))) == (before, files)


def test_what_cannot_be_shared():
    with pytest.raises(SpecError, match="share_tensors: expected at least one tensor"):
        weightbus.share_tensors({})
    with pytest.raises(SpecError, match="w: expected a tensor with storage"):
        weightbus.share_tensors({"w": torch.zeros(2, device="meta")})
    with pytest.raises(SpecError, match="w: expected a tensor, got a int"):
        weightbus.share_tensors({"w": 3})
    with pytest.raises(SpecError, match="w: expected each name once, got it twice"):
        weightbus.share_tensors([("w", torch.zeros(2)), ("w", torch.ones(2))])


def test_what_fails_half_way_leaves_nothing(monkeypatch):
    monkeypatch.delattr("weightbus.storage.shared_payload.encode_exports")
    before, files = mapped(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(NameError):
        weightbus.share_tensors({"w": torch.zeros(2)})
    assert (mapped(), len(os.listdir("/proc/self/fd"))) == (before, files)


# -- payloads that are not sound -------------------------------------------------------------------


def edited(shared, **changes):
    """The payload with other exports; ``places`` and ``allocations`` may be functions of the good ones."""
    outer = msgspec.msgpack.decode(shared.payload)
    exports = msgspec.msgpack.decode(outer["exports"], type=Exports)
    given = {k: v(getattr(exports, k)) if callable(v) else v for k, v in changes.items()}
    outer["exports"] = msgspec.msgpack.encode(msgspec.structs.replace(exports, **given))
    return msgspec.msgpack.encode(outer)


def place(allocation=0, offset=4096, strides=(3, 1)):
    return {"w": (Place(allocation=allocation, offset=offset, strides=strides),)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"host": "elsewhere"}, r"tensors of a process on this rank's host, got another's; else send .*save"),
        ({"device": "GPU-1"}, "source on GPU-1, target on cpu; else send"),
        ({"places": {}}, "w: expected 1 places, got 0"),
        ({"places": place(offset=1 << 20)}, "w: box .* lies outside its allocation"),
        ({"places": place(allocation=1)}, "w: box .* lies outside its allocation"),
        ({"places": place(strides=(1,))}, "w: box .* lies outside its allocation"),
        ({"places": place(strides=(1, 2))}, "w: expected rows one after the other"),
        ({"places": place(strides=(0, 1))}, "w: expected rows one after the other"),
        ({"places": place(strides=(4, 1))}, "w: expected rows one after the other"),
        ({"allocations": lambda good: good * 2}, "expected one shared memory, got 2"),
        (
            {"allocations": lambda good: (Allocation(handle=good[0].handle, nbytes=1 << 40),)},
            f"shared memory: expected {1 << 40} bytes",
        ),
        (
            {
                "allocations": lambda good: (
                    Allocation(handle=good[0].handle[:-1] + b"?", nbytes=good[0].nbytes),
                )
            },
            "another process's",
        ),
        ({"reason": "asleep"}, "expected tensors of a process on this rank's host"),
    ],
)
def test_what_does_not_add_up_is_refused(changes, expected):
    before = mapped()
    with weightbus.share_tensors({"w": torch.ones(2, 3)}) as shared:
        with pytest.raises(SpecError, match=expected):
            open_shared(HERE, edited(shared, **changes), CPU)
        assert torch.equal(read(edited(shared))["w"], torch.ones(2, 3))
    assert mapped() == before


@pytest.mark.parametrize("data", [b"", b"\xc0", b"\x80", b"\x81\xa5facts\xc4\x00", b"\x91" * 2000])
def test_what_is_no_payload_is_refused(data):
    with pytest.raises(SpecError, match=r"payload: expected what weightbus\.share_tensors makes, got"):
        open_shared(HERE, data, CPU)


def test_what_is_no_memory_is_not_opened():
    """A handle names a process and a file of it: that may be anything."""
    with weightbus.share_tensors({"w": torch.ones(2, 3)}) as shared:
        reading, writing = os.pipe()
        null = os.open("/dev/null", os.O_RDONLY)

        def handle(good, file):
            changed = good[0].handle[:8] + file.to_bytes(8, "little") + good[0].handle[16:]
            return (Allocation(handle=changed, nbytes=good[0].nbytes),)

        for file in (reading, null):
            with pytest.raises(SpecError, match="shared memory: expected a file"):
                open_shared(HERE, edited(shared, allocations=lambda good, f=file: handle(good, f)), CPU)
        for file in (reading, writing, null):
            os.close(file)


SPOILED = st.one_of(
    st.integers(-2, (1 << 64) - 1),
    st.binary(max_size=70),
    st.text(max_size=8),
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 3, 4096, 8192, 1 << 48, "cpu", "int8", [3, 1], [[0], [7]], []]),
)


def leaves(value, path=()):
    """Paths to everything in a decoded message."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))


def replaced(value, path, other):
    if not path:
        return other
    changed = value.copy()
    changed[path[0]] = replaced(value[path[0]], path[1:], other)
    return changed


@pytest.fixture(scope="module")
def shared():
    with weightbus.share_tensors(tensors()) as shared:
        yield shared


@settings(
    max_examples=int(os.environ.get("WEIGHTBUS_FUZZ", "100")),  # WEIGHTBUS_FUZZ=1000 for a long run
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_any_payload_is_read_within_its_bounds_or_refused(shared, data):
    """Fields of a good payload replaced, or its bytes cut and changed."""
    outer = msgspec.msgpack.decode(shared.payload)
    fields = {key: msgspec.msgpack.decode(outer[key]) for key in ("facts", "exports")}
    for _ in range(data.draw(st.integers(0, 3))):
        path = data.draw(st.sampled_from(list(leaves(fields))[1:]))
        fields = replaced(fields, path, data.draw(SPOILED))
    raw = bytearray(msgspec.msgpack.encode({k: msgspec.msgpack.encode(value) for k, value in fields.items()}))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    try:
        stored, memory, opened = open_shared(HERE, bytes(raw), CPU)
    except SpecError:
        return
    for tensor in stored.values():
        assert len(memory[tensor.path]) == tensor.end == tensor.spec.nbytes
        bytes(memory[tensor.path])
    opened.close()


# -- through a hub ---------------------------------------------------------------------------------


def server(rank, size, *, address, device):
    modules = pipeline(rank, size)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_DEVICE"]))
    modules = {name: module.to(device) for name, module in modules.items()}
    seen = []

    def on_commit(version):
        on_host = {name: copy.deepcopy(module).cpu() for name, module in modules.items()}
        seen.append((version, versions_held(on_host, rank, size)))

    with weightbus.Subscriber(
        modules, address=address, rank=rank, replica_size=size, on_commit=on_commit
    ) as subscriber:
        while len(seen) < 3:
            subscriber.poll(0.2)
    return seen, mapped()


def asker(rank, size, *, address, device):
    """One payload for all ranks, refused ones, one for each rank, and one over HTTP; what was said to each."""
    hub = Hub(address)
    thread = threading.Thread(target=hub.serve)
    thread.start()
    two = {module: {n: t.to(device) for n, t in held.items()} for module, held in drawn(2).items()}
    said = []

    def ask(*payloads, version=None):
        given = [data if name is None else {name: data} for name, data in payloads]
        with Client(address) as client:
            end = client.update_from_tensor(given, version=version, format="shared", timeout_s=30)
        said.append((end.ok, end.moved, end.version, "; ".join(map(str, end.failures))))

    with Client(address) as client:
        while not any(found.joined == found.size for found in client.replicas().replicas):
            time.sleep(0.05)
    with weightbus.share_tensors(two["transformer"]) as shared:
        ask((None, shared.payload), version=2)
    with weightbus.share_tensors({"decoder.bias": torch.ones(3, device=device)}) as shared:
        ask(("vae", shared.payload))
        ask(("vae", shared.payload[:-1]))
    with weightbus.share_tensors(two["vae"]) as one, weightbus.share_tensors(two["vae"]) as other:
        ask(("vae", one.payload), ("vae", other.payload))
    with (
        TestClient(http.create_app(address), base_url="http://localhost") as client,
        weightbus.share_tensors(two["text_encoder"]) as shared,
    ):
        text = base64.b64encode(shared.payload).decode()
        body = {"serialized_named_tensors": [{"text_encoder": text}], "load_format": "shared"}
        answer = client.post("/update_weights_from_tensor", json=body)
        said.append((answer.status_code, answer.json()["message"]))
    hub.stop()
    thread.join()
    return said


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_ranks_copy_what_they_hold(address, device):
    arguments = {"address": address, "device": device}
    (said,), served = run_jobs(
        Job(run=asker, arguments=arguments), Job(run=server, size=2, arguments=arguments), timeout_s=120
    )
    whole, shape, cut, each, (status, message) = said
    assert whole == (True, True, 2, "")
    assert shape[:2] == cut[:2] == (False, False)
    assert "vae.decoder.bias: expected shape [48]" in shape[3]
    assert "payload of vae: expected what weightbus.share_tensors makes" in cut[3]
    assert each[:2] == (True, True)
    assert (status, "unverified on 2 ranks" in message) == (200, True), message
    for seen, left in served:
        assert [version for version, _ in seen] == [2, None, None]
        assert seen[-1][1] == dict.fromkeys(SHAPES, 2)
        assert left == 0


# -- out of a GPU's memory -------------------------------------------------------------------------


def lender(rank, size, *, folder):
    with weightbus.share_tensors({name: tensor.cuda() for name, tensor in tensors().items()}) as shared:
        (folder / "writing").write_bytes(shared.payload)
        (folder / "writing").rename(folder / "payload")
        while not (folder / "done").exists():
            time.sleep(0.05)


def borrower(rank, size, *, folder):
    """Into live memory of all kinds: as it lies, strided, of another dtype, on the GPU and on the host."""
    while not (folder / "payload").exists():
        time.sleep(0.05)
    payload, found = (folder / "payload").read_bytes(), []
    device = torch.device("cuda", 0)
    try:
        for where in ("cuda", "cpu"):
            live = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors().items()}
            live["transposed"] = torch.zeros(6, 10).t()
            live["bf16"] = torch.zeros(7)
            views = {name: tensor.to(where) for name, tensor in live.items()}
            views["columns"] = torch.zeros(6, 9, device=where)[:, 3:8]
            read(payload, views, device)
            found.append({name: view.cpu() for name, view in views.items()})
    finally:
        (folder / "done").touch()
    return found


@pytest.mark.cuda
def test_gpu_memory_is_read_into_memory_of_all_kinds(tmp_path):
    _, (found,) = run_jobs(
        Job(run=lender, arguments={"folder": tmp_path}), Job(run=borrower, arguments={"folder": tmp_path})
    )
    expected = {**tensors(), "bf16": torch.arange(7.0)}
    for views in found:
        for name, tensor in expected.items():
            assert torch.equal(bits(views[name]), bits(tensor)), name
