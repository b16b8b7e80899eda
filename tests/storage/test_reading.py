"""Boxes of stored tensors: which bytes are asked for, where they go, and what memory that takes."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from weightbus import tensor_digest
from weightbus.digest import P
from weightbus.errors import SpecError
from weightbus.planning.box import Box
from weightbus.storage import ranges, reading, sources
from weightbus.storage.disk import stored_tensors
from weightbus.storage.ranges import Read, pieces_of, runs_of
from weightbus.storage.reading import Reader
from weightbus.storage.sources import Sources


@st.composite
def boxes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    offsets = tuple(draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    return shape, Box(offsets, sizes)


@given(boxes())
def test_runs_are_the_elements_of_a_box_in_order_and_as_long_as_can_be(case):
    shape, box = case
    numbers = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
    found, count = [], 0
    for part, first, pitch, runs in runs_of(shape, box):
        starts = [first + i * pitch for i in range(runs)]
        places = [start + i for start in starts for i in range(part.volume // runs)]
        assert places == numbers[part.within(Box.whole(shape))].reshape(-1).tolist()
        found += places
        count += runs
    places = numbers[box.within(Box.whole(shape))].reshape(-1)
    assert found == places.tolist()
    breaks = int((np.diff(places) != 1).sum())
    assert count >= breaks + 1
    if len(shape) <= 2:
        assert count == breaks + 1


@pytest.fixture(params=["compiled", "interpreted"])
def each_way(request, monkeypatch):
    """The compiled loop over runs, and the one that stands in where it was not built."""
    if request.param == "interpreted":
        monkeypatch.setattr(sources, "_pread", None)
    elif sources._pread is None:
        pytest.skip("weightbus.storage._pread is not built")


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A file of several kinds of tensors, read by pieces of 1 KB."""
    monkeypatch.setattr(ranges, "BUFFER_BYTES", 1 << 10)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(70, 50, generator=generator),
        "cube": torch.randn(6, 11, 13, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "flags": torch.randint(0, 2, (3001,), generator=generator).bool(),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    return tensors, stored_tensors(tmp_path)


def pieces(reads):
    return pieces_of(reads, 1 << 10)


def box_of(tensor, *spans):
    return Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans))


CASES = {
    "matrix": [((10, 40), (0, 50)), ((0, 70), (25, 50)), ((3, 4), (7, 8))],
    "cube": [((1, 5), (0, 11), (0, 13)), ((0, 6), (3, 9), (2, 13)), ((2, 3), (0, 11), (5, 6))],
    "scalar": [()],
    "flags": [((17, 2999),)],
    "empty": [((0, 0), (0, 4))],
}


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["as stored", "cast"])
@pytest.mark.parametrize("strided", [False, True])
def test_every_box_lands_bit_for_bit(stored, each_way, dtype, strided):
    tensors, files = stored
    reads, expected = [], []
    for name, spans in CASES.items():
        for span in spans:
            box = box_of(tensors[name], *span)
            want = tensors[name][box.within(Box.whole(tensors[name].shape))]
            want = want if dtype is None or name == "flags" else want.to(dtype)
            view = torch.zeros((*want.shape, 2) if strided else want.shape, dtype=want.dtype)
            view = view[..., 0] if strided else view
            reads.append(Read(stored=files[name], box=box, view=view))
            expected.append(want)
    sources = Sources([read.stored for read in reads], {})
    moved = []
    Reader(sources, torch.device("cpu"), lambda: None).write(
        pieces(reads), {i: read.view for i, read in enumerate(reads)}, moved.append
    )
    sources.close()
    for read, want in zip(reads, expected, strict=True):
        assert torch.equal(read.view, want)
    assert sum(moved) == sum(read.box.volume * tensors[read.stored.spec.name].itemsize for read in reads)


@pytest.mark.parametrize("keep", [False, True])
def test_digests_of_boxes_add_up_to_the_tensors(stored, keep):
    tensors, files = stored
    halves = {"matrix": [((0, 70), (0, 13)), ((0, 70), (13, 50))], "cube": [((0, 6), (0, 11), (0, 13))]}
    reads = [
        Read(stored=files[name], box=box_of(tensors[name], *span), view=None)
        for name, spans in halves.items()
        for span in spans
    ]
    sources = Sources([read.stored for read in reads], {})
    work = pieces(reads)
    sums = Reader(sources, torch.device("cpu"), lambda: None).digest(work, lambda _: None, keep=keep)
    sources.close()
    whole = tuple((a + b) % P for a, b in zip(sums[0], sums[1], strict=True))
    assert whole == tensor_digest(tensors["matrix"]).sums
    assert sums[2] == tensor_digest(tensors["cube"]).sums
    assert all((piece.kept is not None) == keep for piece in work)


def rchar():
    """Bytes that this thread has asked files for."""
    with open("/proc/thread-self/io") as file:
        return int(file.readline().split()[1])


def test_asks_a_file_for_exactly_the_bytes_of_its_boxes(stored, each_way):
    tensors, files = stored
    box = box_of(tensors["matrix"], (0, 70), (25, 50))
    read = Read(stored=files["matrix"], box=box, view=None)
    sources = Sources([files["matrix"]], {})
    into = bytearray(7000)
    work = pieces([read])
    looks = rchar(), rchar()
    at = 0
    for piece in work:
        sources.fill(piece, memoryview(into)[at : at + piece.nbytes])
        at += piece.nbytes
    asked = rchar() - looks[1] - (looks[1] - looks[0])
    sources.close()
    assert (len(work), at) == (7, 7000)
    assert abs(asked - 7000) < 10  # digits of what was asked before
    assert into == tensors["matrix"][:, 25:].contiguous().numpy().tobytes()


def test_short_runs_are_read_without_the_interpreter(stored, monkeypatch):
    pytest.importorskip("weightbus.storage._pread")
    tensors, files = stored
    monkeypatch.delattr(reading.os, "preadv")
    box = box_of(tensors["matrix"], (0, 70), (7, 8))
    view = torch.zeros(70, 1)
    sources = Sources([files["matrix"]], {})
    read = Read(stored=files["matrix"], box=box, view=view)
    Reader(sources, torch.device("cpu"), lambda: None).write(pieces([read]), {0: view}, lambda _: None)
    sources.close()
    assert torch.equal(view, tensors["matrix"][:, 7:8])


def test_reads_that_fail_say_why(tmp_path):
    compiled = pytest.importorskip("weightbus.storage._pread")
    (tmp_path / "file").write_bytes(bytes(range(100)))
    for read in (compiled.read_runs, sources.read_runs):
        with (tmp_path / "file").open("rb") as file:
            into = bytearray(12)
            assert read(file.fileno(), 10, 30, 3, memoryview(into)) == 12
            assert into == bytes([10, 11, 12, 13, 40, 41, 42, 43, 70, 71, 72, 73])
            assert read(file.fileno(), 38, 30, 3, memoryview(into)) == 10  # two bytes of the last run
            assert into[8:10] == bytes([98, 99])
        with pytest.raises(OSError, match="Bad file descriptor"):
            read(-1, 0, 30, 3, memoryview(into))
    for runs in (0, 5, -1):
        with pytest.raises(ValueError, match="expected memory for equal runs"):
            compiled.read_runs(0, 0, 30, runs, memoryview(bytearray(12)))


@pytest.mark.parametrize("columns", [50, 25], ids=["rows", "columns"])
def test_the_first_failure_ends_it_and_no_thread_goes_on(stored, each_way, columns):
    tensors, files = stored
    view = torch.zeros(70, columns)
    sources = Sources([files["matrix"]], {})
    os.truncate(files["matrix"].path, files["matrix"].begin + 5000)
    read = Read(stored=files["matrix"], box=box_of(tensors["matrix"], (0, 70), (0, columns)), view=view)
    with pytest.raises(SpecError, match=r"matrix: expected data up to byte \d+, got a file of \d+; truncated"):
        Reader(sources, torch.device("cpu"), lambda: None).write(pieces([read]), {0: view}, lambda _: None)
    with pytest.raises(SpecError, match="stays as it is while it is loaded"):
        sources.check_unchanged()
    sources.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "weightbus-file"]


def test_a_wait_can_be_ended_from_outside(stored):
    _, files = stored

    def ended():
        raise InterruptedError

    sources = Sources([files["matrix"]], {})
    view = torch.zeros(70, 50)
    read = Read(stored=files["matrix"], box=Box.whole((70, 50)), view=view)
    with pytest.raises(InterruptedError):
        Reader(sources, torch.device("cpu"), ended).write(pieces([read]), {0: view}, lambda _: None)
    sources.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "weightbus-file"]


@settings(max_examples=30, deadline=None)
@given(boxes(), st.sampled_from([torch.uint8, torch.float16, torch.float32]))
def test_any_box_of_any_shape(tmp_path_factory, case, dtype):
    shape, box = case
    whole = torch.arange(int(np.prod(shape, dtype=int))).reshape(shape).to(dtype)
    folder = tmp_path_factory.mktemp("box")
    save_file({"t": whole}, folder / "t.safetensors")
    stored = stored_tensors(folder)["t"]
    view = torch.zeros(box.sizes, dtype=dtype)
    sources = Sources([stored], {})
    Reader(sources, torch.device("cpu"), lambda: None).write(
        pieces_of([Read(stored=stored, box=box, view=view)], 16), {0: view}, lambda _: None
    )
    sources.close()
    assert torch.equal(view, whole[box.within(Box.whole(shape))])


@pytest.mark.cuda
def test_reads_into_a_gpu_come_after_what_its_stream_was_given_before(stored):
    """As of a tensor whose memory the code before it, which is still under way, has used."""
    tensors, files = stored
    device = torch.device("cuda", 0)
    view = torch.zeros(70, 50, device=device)
    box = Box.whole((70, 50))
    sources = Sources([files["matrix"]], {})
    reader = Reader(sources, device, lambda: None)
    read = Read(stored=files["matrix"], box=box, view=view)
    torch.cuda._sleep(1_000_000_000)
    view.fill_(7)
    reader.write(pieces_of([read]), {0: view}, lambda _: None)
    torch.cuda.synchronize(device)
    sources.close()
    assert torch.equal(view.cpu(), tensors["matrix"])
