"""Snapshots, perturbation and SHA-256 on a GPU: answers as on the CPU, streams and buffers as promised."""

from __future__ import annotations

import hashlib
import os

import pytest
import torch
import torch.distributed as dist
from models import Toy, fill, values
from perturbed import bits, check_every_element_changes, everything
from processes import Job, run_jobs
from torch import Tensor, nn

from weightbus import check_sha256, module_sha256, named_sha256, perturb, snapshot, tensor_sha256, whole_sha256
from weightbus.digest.sha256 import gather as joined
from weightbus.memory import host_bytes

pytestmark = pytest.mark.cuda


def golden(tensor: Tensor) -> str:
    """By the recipe, of a copy on the host."""
    raw = bits(tensor).numpy().tobytes()
    return hashlib.sha256(str(tensor.dtype).encode() + repr(tuple(tensor.shape)).encode() + raw).hexdigest()


def large() -> list[tuple[str, Tensor]]:
    """More than one chunk each, contiguous and not; with offsets and odd sizes."""
    base = torch.randint(-(2**15), 2**15, (3001, 1777), dtype=torch.int16, device="cuda")
    return [
        ("whole", base.view(torch.bfloat16)),
        ("turned", base.t()),
        ("columns", base[:, 5:1500]),
        ("rows", base[7:]),
        ("cube", base[:3000, :1776].reshape(30, 100, 16, 111).permute(2, 0, 3, 1)),
    ]


def test_every_dtype_and_shape() -> None:
    tensors = everything("cuda")
    perturb(tensors.items())
    assert named_sha256(tensors.items(), threads=3) == {
        name: golden(tensor) for name, tensor in tensors.items()
    }


def test_tensors_of_many_chunks() -> None:
    tensors = large()
    want = {name: golden(tensor) for name, tensor in tensors}
    assert named_sha256(tensors, threads=2) == want
    assert named_sha256(tensors, threads=1) == want
    assert {name: tensor_sha256(tensor) for name, tensor in tensors} == want


def test_a_module_and_its_copy_on_the_host() -> None:
    model = nn.Sequential(nn.Linear(2000, 1500), nn.LayerNorm(7)).cuda()
    on_gpu = module_sha256(model)
    text = b"".join(
        name.encode() + parameter.detach().cpu().numpy().tobytes()
        for name, parameter in sorted(model.named_parameters())
    )
    assert on_gpu == hashlib.sha256(text).hexdigest()
    mixed = [
        ("b", torch.ones(3)),
        ("a", torch.arange(5.0, device="cuda")),
        ("c", torch.zeros(2, device="cuda")),
    ]
    assert module_sha256(mixed) == module_sha256([(name, tensor.cpu()) for name, tensor in mixed])


def test_what_is_queued_on_the_current_stream_counts() -> None:
    """Threads have current streams of their own: the caller's is waited for, whichever it is."""
    tensor = torch.zeros(3_000_000, dtype=torch.int32, device="cuda")
    for value, stream in enumerate([torch.cuda.Stream(), torch.cuda.current_stream()], 1):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # some 50 ms
            tensor.fill_(value)
            found = named_sha256([("a", tensor), ("b", tensor[1:].view(-1, 1)[::2])], threads=2)
            assert torch.cuda.current_stream() == stream
        assert found["a"] == golden(torch.full((3_000_000,), value, dtype=torch.int32))
        assert found["b"] == golden(torch.full((1_500_000, 1), value, dtype=torch.int32))


def test_pinned_buffers_are_few() -> None:
    reader = host_bytes.HostBytes([tensor for _, tensor in large()])
    buffers = reader._buffers()
    assert [buffer.nbytes for buffer in buffers] == [host_bytes.CHUNK_BYTES] * host_bytes.BUFFERS
    assert all(buffer.is_pinned() for buffer in buffers)
    addresses = set()
    for _, data in reader:
        assert len(data) <= host_bytes.CHUNK_BYTES
        addresses.add(torch.frombuffer(data, dtype=torch.uint8).data_ptr())
    assert len(addresses) == host_bytes.BUFFERS


def test_every_element_changes_on_the_gpu() -> None:
    check_every_element_changes("cuda")


def test_random_state_of_the_gpu_is_left_alone() -> None:
    model = Toy().cuda()
    state = torch.cuda.get_rng_state()
    perturb(model)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_snapshot_on_the_gpu() -> None:
    """Also of a model on two kinds of devices, one call for each; and the same as on the CPU."""
    model = Toy()
    fill(model, values(1))
    before = snapshot(model)
    model.cuda()
    model.mask = model.mask.cpu()
    assert before.compare(model).none
    with torch.no_grad():
        model.big.view(torch.int32)[699, 599] ^= 1 << 30
        model.mask[8].logical_not_()
    assert before.compare(model).changed == ("big", "mask")
    perturb(model)
    assert before.compare(model).unchanged == ()


def shards(rank, size):
    """Plain shards on the GPU, joined over gloo."""
    torch.cuda.set_device(int(os.environ["LOCAL_DEVICE"]))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    joined.CHUNK_BYTES = 1 << 16
    full = torch.arange(600 * 700, dtype=torch.float32).view(600, 700)
    column = nn.Parameter(full.chunk(size, 0)[rank].cuda())
    column.output_dim = 0
    row = nn.Parameter(full.t().chunk(size, 1)[rank].cuda())  # not contiguous
    row.input_dim = 1
    expected = {"column": golden(full), "row": golden(full.t()), "same": golden(full[:3])}
    pairs = [("column", column), ("row", row), ("same", full[:3].cuda())]
    good = check_sha256(pairs, expected, group=dist.group.WORLD)
    whole = whole_sha256(pairs[2:], dist.group.WORLD)
    if rank == 1:
        with torch.no_grad():
            row[300, 2] += 1
    return good.ok, check_sha256(pairs, expected, group=dist.group.WORLD).mismatching, whole


def test_shards_on_gpus() -> None:
    (ranks,) = run_jobs(Job(run=shards, size=2))
    same = golden(torch.arange(2100, dtype=torch.float32).view(3, 700))
    assert ranks == [(True, {"row": (0, 1)}, {"same": same})] * 2
