"""The CUDA digest's own promises: streams, replays, allocations, devices. Kept quick, for compute-sanitizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from grid61_boxes import part_of, random_part
from seeded import seeded
from torch import Tensor, nn

from weightbus import model_digest, tensor_digest
from weightbus.digest import Digester
from weightbus.memory.shard import Part

pytestmark = pytest.mark.cuda
SEED = bytes(range(32))


def on_cpu(parts: list[Part]) -> np.ndarray:
    copies = [Part(spec=part.spec, box=part.box, tensor=part.tensor.cpu()) for part in parts]
    return Digester(copies).sums(SEED)


def draw(*shape: int, device: str = "cuda") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).to(device)


def serves(digester: Digester) -> list[str]:
    return [type(sums).__name__ for _, sums in digester._sums]


def test_the_kernels_serve_tensors_on_the_gpu() -> None:
    """Not the reference, which would be right as well: it needs an extra, cuda12 or cuda13."""
    assert serves(Digester([part_of(draw(3, 70))])) == ["CudaSums"]


def test_a_given_stream_is_waited_for_and_used() -> None:
    """What is queued on the stream before the call is in the digest; the default stream is not involved."""
    tensor = torch.zeros(300, 700, dtype=torch.int16, device="cuda")
    parts = [part_of(tensor), part_of(tensor.t()[3:, 5:])]
    digester = Digester(parts)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    before = torch.cuda.current_stream()
    for value in (1, 2, 3):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # some 10 ms: whoever does not wait digests what was there before
            tensor.fill_(value)
        found = digester.sums(SEED, stream=stream)
        assert torch.cuda.current_stream() == before
        assert np.array_equal(found, on_cpu(parts))


def test_the_current_stream_is_the_default() -> None:
    tensor = torch.zeros(500, 300, dtype=torch.int16, device="cuda")
    digester = Digester([part_of(tensor)])
    for value, stream in enumerate([torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()], 1):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            tensor.fill_(value)
            found = digester.sums(SEED)
        assert np.array_equal(found, on_cpu([part_of(tensor)]))


def test_a_prepared_digester_sees_changed_bytes_and_seeds() -> None:
    tensor = draw(123, 457)
    digester = Digester([part_of(tensor), part_of(tensor[::2, 1:])])
    first = digester.sums(SEED)
    tensor[77, 301] += 1
    second = digester.sums(SEED)
    assert not np.array_equal(first, second)
    assert np.array_equal(second, on_cpu([part_of(tensor), part_of(tensor[::2, 1:])]))
    assert first is not second  # a result is its caller's, and not a buffer that the next call writes
    assert not np.array_equal(digester.sums(bytes(32)), second)
    tensor[77, 301] -= 1
    assert np.array_equal(digester.sums(SEED), first)


def test_many_small_tensors_in_one_call() -> None:
    rng = seeded(2)
    pool = draw(2_000_000)
    parts = []
    for i in range(3000):
        size = rng.choice([1, 2, 31, 32, 33, 64, 100, 257, 600])
        start = rng.randrange(len(pool) - size)
        parts.append(part_of(pool[start : start + size], name=f"t{i}"))
    parts += [random_part(seeded(i), "cuda", max_bytes=2000) for i in range(40)]
    parts += [part_of(torch.zeros(0, 3, device="cuda")), part_of(torch.tensor(1.5, device="cuda"))]
    assert np.array_equal(Digester(parts).sums(SEED), on_cpu(parts))


def test_a_replay_allocates_nothing_on_the_device() -> None:
    digester = Digester([part_of(draw(300, 400)), part_of(draw(90))])
    digester.sums(SEED)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(3):
        digester.sums(SEED)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_model_on_the_gpu_has_its_digest_on_the_cpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(130, 70), nn.Conv2d(3, 5, 3), nn.BatchNorm1d(9))
    want = model_digest(model)
    assert model_digest(model.cuda()) == want
    weight = model[0].weight
    assert tensor_digest(weight, seed=SEED) == tensor_digest(weight.cpu(), seed=SEED)


@pytest.mark.gpus(2)
def test_two_devices_in_one_process() -> None:
    """Both on their default streams, which have one handle."""
    tensors = [("a", draw(70, 300, device="cuda:0")), ("b", draw(300, 70, device="cuda:1"))]
    want = model_digest([(name, tensor.cpu()) for name, tensor in tensors])
    assert model_digest(tensors) == want
    with torch.cuda.device(1):
        assert model_digest(tensors) == want
