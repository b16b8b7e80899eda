"""Digests of tensors and modules against hashlib over bytes that the test has made itself."""

from __future__ import annotations

import hashlib
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn

from weightbus import SpecError, module_sha256, named_sha256, tensor_sha256
from weightbus.digest.sha256 import tensors as sha256
from weightbus.memory import host_bytes
from weightbus.planning.spec import ITEMSIZE

SHAPES = [(), (0,), (3, 0, 2), (1,), (5,), (4, 6), (2, 3, 5)]


def raw_bytes(dtype: str, count: int, start: int = 0) -> bytes:
    """Some of a tensor's bytes; a bool's are 0 and 1."""
    top = 2 if dtype == "bool" else 251
    return bytes((start + i) % top for i in range(count * ITEMSIZE[dtype]))


def tensor_of(dtype: str, raw: bytes, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that complex32 is young
        flat = torch.tensor(list(raw), dtype=torch.uint8).view(getattr(torch, dtype))
        return flat.reshape(shape)


def count_of(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def golden(dtype: str, shape: tuple[int, ...], raw: bytes) -> str:
    """By the recipe: ``str(dtype) || repr(tuple(shape)) || bytes``."""
    return hashlib.sha256(f"torch.{dtype}".encode() + repr(shape).encode() + raw).hexdigest()


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_golden_values(dtype: str) -> None:
    for shape in SHAPES:
        raw = raw_bytes(dtype, count_of(shape))
        assert tensor_sha256(tensor_of(dtype, raw, shape)) == golden(dtype, shape, raw), shape


def test_literal_values() -> None:
    """As sha256sum prints them for ``printf 'torch.float32()\\x00\\x00\\xc0\\x3f'``, and so on."""
    assert tensor_sha256(torch.tensor(1.5)) == LITERAL_SCALAR
    assert tensor_sha256(torch.tensor([1, 2], dtype=torch.bfloat16)) == LITERAL_VECTOR


LITERAL_SCALAR = "871dc7d7d60b7d542b0d2f4a7e086dfb38bd1af04ef2b5feb1bbdc2d797d5e9f"
LITERAL_VECTOR = "36c6f3a1b00e728f3a88ea0f0020868b6c6bf4dd279ee1aadcbb5f36b0eb41a0"


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "complex64", "complex128", "bool"])
@pytest.mark.parametrize("chunk_bytes", [16, 48, 4 << 20])
def test_strides_and_chunks(dtype: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_bytes, "CHUNK_BYTES", chunk_bytes)
    size = ITEMSIZE[dtype]
    raw = raw_bytes(dtype, 7 * 9)
    tensor = tensor_of(dtype, raw, (7, 9))
    element = {(i, j): raw[(9 * i + j) * size :][:size] for i in range(7) for j in range(9)}
    turned = b"".join(element[i, j] for j in range(9) for i in range(7))
    assert tensor_sha256(tensor.t()) == golden(dtype, (9, 7), turned)
    piece = b"".join(element[i, j] for i in (1, 3, 5) for j in range(2, 6))
    assert tensor_sha256(tensor[1:7:2, 2:6]) == golden(dtype, (3, 4), piece)
    column = b"".join(element[i, 4] for i in range(7))
    assert tensor_sha256(tensor[:, 4:5]) == golden(dtype, (7, 1), column)
    assert tensor_sha256(tensor[2, 4]) == golden(dtype, (), element[2, 4])
    assert tensor_sha256(tensor[:1, 8:]) == golden(dtype, (1, 1), element[0, 8])


def test_bytes_are_not_values() -> None:
    """NaNs keep their payload, -0.0 is not 0.0."""
    raw = bytes.fromhex("010080ff 0000c07f 00000080 00000000")
    tensor = torch.tensor(list(raw), dtype=torch.uint8).view(torch.float32)
    assert tensor_sha256(tensor) == golden("float32", (4,), raw)
    assert tensor_sha256(tensor[::2]) == golden("float32", (2,), raw[:4] + raw[8:12])


def test_parameters_are_read_as_they_are() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    assert tensor_sha256(weight) == golden("float32", (2, 2), bytes.fromhex("0000803f") * 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Linear(3, 2, bias=False)
        self.a = nn.Linear(3, 2, bias=False)
        self.a.weight = self.z.weight  # tied: "z.weight" comes first, "a.weight" is less
        self.m = nn.Parameter(torch.arange(3.0).bfloat16())
        self.none = nn.Parameter(torch.empty(0, 5))
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("cache", torch.ones(4), persistent=False)


def plain_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().reshape(-1).view(torch.uint8).tolist())


def test_module_of_a_module() -> None:
    """Parameters only, in order of names, a tied one under its first."""
    net = Net()
    text = b"m" + plain_bytes(net.m) + b"none" + b"z.weight" + plain_bytes(net.z.weight)
    assert module_sha256(net) == hashlib.sha256(text).hexdigest()
    assert module_sha256(net.named_parameters()) == module_sha256(net)


def test_module_of_pairs_in_any_order_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_bytes, "CHUNK_BYTES", 16)
    pairs = [("b", torch.arange(70.0).view(7, 10).t()), ("ä", torch.tensor(True)), ("a", torch.zeros(0))]
    text = b"a" + b"b" + plain_bytes(pairs[0][1].contiguous()) + "ä".encode() + b"\x01"
    assert module_sha256(pairs) == hashlib.sha256(text).hexdigest()
    assert module_sha256(pairs[::-1]) == hashlib.sha256(text).hexdigest()


def test_names() -> None:
    net = Net()
    found = named_sha256(net)
    assert list(found) == ["m", "none", "scale", "z.weight"]
    assert found["z.weight"] == golden("float32", (2, 3), plain_bytes(net.z.weight))
    assert list(named_sha256({"vae": net})) == ["vae.m", "vae.none", "vae.scale", "vae.z.weight"]
    assert named_sha256(net.state_dict().items()) == {**found, "a.weight": found["z.weight"]}
    with pytest.raises(SpecError, match="twice"):
        named_sha256([("a", net.m), ("a", net.m)])


def test_threads_share_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three threads are at work at the same time, on about equal bytes, and each tensor keeps its name."""
    meeting, loads = threading.Barrier(3), []
    hashed = sha256._hashed

    def meet(reader, tensors):
        meeting.wait(10)
        loads.append(sum(tensor.nbytes for tensor in tensors))
        return hashed(reader, tensors)

    monkeypatch.setattr(sha256, "_hashed", meet)
    pairs = [(f"t{i}", torch.full((1000 + 50 * i,), float(i))) for i in range(20)]
    found = named_sha256(pairs, threads=3)
    assert len(loads) == 3
    assert max(loads) < 1.15 * min(loads)
    assert list(found) == [name for name, _ in pairs]
    for name, tensor in pairs:
        assert found[name] == golden("float32", tuple(tensor.shape), plain_bytes(tensor))


def test_host_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be read in place is; of the rest, never more than a few chunks are there at the same time."""
    monkeypatch.setattr(host_bytes, "CHUNK_BYTES", 4096)
    lying, turned = torch.zeros(100, 1000), torch.zeros(1000, 100).t()
    seen = [(index, len(data)) for index, data in host_bytes.HostBytes([lying, turned])]
    assert seen[0] == (0, lying.nbytes)
    assert {index for index, _ in seen[1:]} == {1}
    assert max(count for _, count in seen[1:]) <= 4096
    assert sum(count for _, count in seen[1:]) == turned.nbytes
    assert sum(b.nbytes for b in host_bytes.HostBytes([lying, turned])._buffers()) == 3 * 4096
    assert host_bytes.HostBytes([lying])._buffers() == []


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.empty(2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "strided"),
        (torch.ones(2, dtype=torch.complex64).conj(), "materialised"),
    ],
)
def test_tensors_without_bytes_are_refused(tensor: Tensor, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        tensor_sha256(tensor)
    with pytest.raises(SpecError, match=f"^w: .*{reason}"):
        module_sha256([("w", tensor)])
