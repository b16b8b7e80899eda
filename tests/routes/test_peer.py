"""The peer route end to end: when it is taken, memory that moves, ranks that die in the middle, what stays."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import Job, run_jobs, shared_memory_files

import weightbus
from weightbus.memory import driver
from weightbus.memory.driver import EngineCopies
from weightbus.planning.box import Box
from weightbus.planning.exports import Place
from weightbus.planning.runs import runs_of
from weightbus.routes.peer import Peer, Wave, _Compiler

SIZES = {"a": (512, 1024), "b": (300,), "c": (64, 64)}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param


def tensors(value, device="cpu", dtype=torch.float32):
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_DEVICE"]))
    return [(n, torch.full(shape, float(value), device=device, dtype=dtype)) for n, shape in SIZES.items()]


def held(target):
    return sorted({value for _, tensor in target for value in tensor.unique().tolist()})


def open_memory():
    """Shared memory that this process maps, and files that it has open."""
    maps = Path("/proc/self/maps").read_text().count("memfd:weightbus")
    return maps, len(os.listdir("/proc/self/fd"))


def publish(source, address, versions, **options):
    """What became of each update; the source holds the version's number everywhere."""
    seen = []
    options = {"route": "peer", "join_timeout_s": 20, "dead_after_s": 4.0} | options
    with weightbus.Publisher(source, address=address, **options) as publisher:
        for version in versions:
            for _, tensor in source:
                tensor.fill_(version)
            try:
                report = publisher.update(version)
                seen.append((report.word, report.route, report.route_reason))
            except weightbus.WeightbusError as error:
                seen.append((type(error).__name__, str(error), ""))
    return seen


def trainer(rank, size, *, address, device="cpu", dtype=torch.float32, updates=2, **options):
    return publish(tensors(0, device, dtype), address, range(1, updates + 1), **options)


def server(rank, size, *, address, device="cpu", dtype=torch.float32, **options):
    target = tensors(-1, device, dtype)
    with weightbus.Subscriber(target, address=address, **options) as subscriber:
        subscriber.serve()
    return subscriber.state, subscriber.version, held(target)


def run_pair(address, trainer_options, server_options, **more):
    (one,), (other,) = run_jobs(
        Job(run=trainer, arguments={"address": address, **more, **trainer_options}),
        Job(run=server, arguments={"address": address, **more, **server_options}),
    )
    return one, other


# -- when it is taken ----------------------------------------------------------------------------------


def test_on_the_cpu_it_has_to_be_asked_for(address):
    seen, served = run_pair(address, {"route": "auto"}, {})
    assert [row[:2] for row in seen] == [("verified", "broadcast")] * 2
    assert "must be asked for" in seen[0][2]
    assert served == ("ready", 2, [2.0])


@pytest.mark.cuda
def test_on_gpus_it_is_taken(address):
    seen, served = run_pair(address, {"route": "auto"}, {}, device="cuda")
    assert seen == [("verified", "peer", "all ranks share a host")] * 2
    assert served == ("ready", 2, [2.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_are_cast_on_the_way(address, device, dtype):
    seen, served = run_pair(address, {}, {"dtype": dtype}, device=device)
    assert seen == [("verified", "peer", "asked for")] * 2
    assert served == ("ready", 2, [2.0])


@pytest.mark.parametrize(
    ("trains", "serves"), [(torch.float64, torch.float32), (torch.bfloat16, torch.float32)]
)
def test_other_casts_are_refused_where_it_is_asked_for(address, trains, serves):
    (first, _), served = run_pair(address, {"dtype": trains}, {"dtype": serves})
    assert first[0] == "UpdateError"
    a, b = (str(dtype).removeprefix("torch.") for dtype in (trains, serves))
    assert f"as asked for; a is {a} on the trainer and {b} on" in first[1]
    assert "peer copies cast float32 to bfloat16 or float16 only" in first[1]
    assert served == ("empty", None, [-1.0])


def test_an_unknown_route(address):
    with pytest.raises(
        weightbus.SpecError, match="route: expected one of auto, peer, broadcast, reshard, got 'rdma"
    ):
        weightbus.Publisher(tensors(0), address=address, route="rdma")


def virtual_trainer(rank, size, *, address, shares):
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    if not shares:
        driver._HANDLE_TYPES = driver._HAS_HANDLE  # which virtual memory does not have
    return trainer(rank, size, address=address, device="cuda", route="auto")


@pytest.mark.cuda
@pytest.mark.parametrize("shares", [True, False])
def test_virtual_memory_is_read_in_place_if_it_may_be_shared(address, shares):
    """Expandable segments have no IPC handle, but files; memory of other allocators may have neither."""
    (seen,), (served,) = run_jobs(
        Job(run=virtual_trainer, arguments={"address": address, "shares": shares}),
        Job(run=server, arguments={"address": address, "device": "cuda"}),
    )
    assert [row[:2] for row in seen] == [("verified", "peer" if shares else "broadcast")] * 2
    assert shares or "did not make to be shared" in seen[0][2]
    assert served == ("ready", 2, [2.0])


# -- memory that moves ---------------------------------------------------------------------------------


def moving_trainer(rank, size, *, address, device, virtual=False):
    """Storage is given up and made anew between updates; once under the old addresses, as far as may be."""
    if virtual:
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    source = torch.nn.ParameterDict({n: torch.nn.Parameter(t) for n, t in tensors(0, device)})
    words = []
    with weightbus.Publisher(source, address=address, route="peer", join_timeout_s=20) as publisher:
        for version in range(1, 6):
            for name, parameter in source.items():
                if version in (2, 3):
                    parameter.data = torch.empty_like(parameter)
                if version == 4:
                    storage = parameter.untyped_storage()
                    nbytes = storage.nbytes()
                    storage.resize_(0)
                    if device == "cuda":
                        torch.cuda.empty_cache()
                    storage.resize_(nbytes)
                parameter.data.fill_(version + len(name))
            report = publisher.update(version)
            words.append((report.word, report.route))
    return words


def test_moved_memory_is_exchanged_again(address, device):
    (words,), (served,) = run_jobs(
        Job(run=moving_trainer, arguments={"address": address, "device": device}),
        Job(run=server, arguments={"address": address, "device": device}),
    )
    assert words == [("verified", "peer")] * 5
    assert served == ("ready", 5, [6.0])


@pytest.mark.cuda
def test_moved_virtual_memory_is_exchanged_again(address):
    given = {"address": address, "device": "cuda"}
    (words,), (served,) = run_jobs(
        Job(run=moving_trainer, arguments=given | {"virtual": True}),
        Job(run=server, arguments=given),
    )
    assert words == [("verified", "peer")] * 5
    assert served == ("ready", 5, [6.0])


def snapshot_trainer(rank, size, *, address, device):
    source = tensors(0, device)
    words = []
    with weightbus.Publisher(source, address=address, route="peer", join_timeout_s=20) as publisher:
        for version in range(1, 7):
            for _, tensor in source:
                tensor.fill_(version)
            if version % 2:
                update = publisher.update(version, wait=False)
                for _, tensor in source:
                    tensor.fill_(-version)
                report = update.result(30)
            else:
                report = publisher.update(version)
            words.append((report.word, report.route, publisher.check().word))
    return words


def test_a_snapshot_is_read_instead_of_the_source(address, device):
    (words,), (served,) = run_jobs(
        Job(run=snapshot_trainer, arguments={"address": address, "device": device}),
        Job(run=server, arguments={"address": address, "device": device}),
    )
    assert words == [("verified", "peer", "verified")] * 6
    assert served == ("ready", 6, [6.0])


# -- ranks that die in the middle ------------------------------------------------------------------------


def dying_trainer(rank, size, *, address, pid_file, device):
    """Never gets done with its part of version 2: once it is, its end changes nothing."""
    Path(pid_file).write_text(str(os.getpid()))
    run, calls = Peer.run, []

    def slow(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            time.sleep(60)
        run(self, *arguments, **options)

    Peer.run = slow
    return publish(tensors(0, device), address, (1, 2))


def server_that_outlives(rank, size, *, address, pid_file, how, device):
    """Sends the trainer a signal while version 2 is being copied, and looks at what is left afterwards."""
    target = dict(tensors(-1, device))
    parameter = torch.nn.Parameter(target["b"])
    calls, torn = [], []

    def load(param, loaded):
        calls.extend([] if loaded.is_meta else [1])
        if len(calls) == 2:
            os.kill(int(Path(pid_file).read_text()), how)
        param.data.copy_(loaded)

    parameter.weight_loader = load
    target["b"] = parameter
    before = open_memory()
    with weightbus.Subscriber(
        list(target.items()), address=address, on_torn=lambda error: torn.append((str(error), time.monotonic()))
    ) as subscriber:
        begun = time.monotonic()
        while not torn and time.monotonic() - begun < 40:
            subscriber.poll(0.2)
        at_verdict = {name: tensor.detach().clone() for name, tensor in target.items()}
        time.sleep(1.0)
        same = all(torch.equal(at_verdict[name], tensor) for name, tensor in target.items())
        maps, _ = open_memory()
        state = subscriber.state
    if how == signal.SIGSTOP:
        os.kill(int(Path(pid_file).read_text()), signal.SIGKILL)
    return torn[0][0], torn[0][1] - begun, state, same, maps - before[0]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_trainer_that_ends_in_the_middle(address, tmp_path, how, device):
    arguments = {"address": address, "pid_file": str(tmp_path / "pid"), "device": device}
    _, (found,) = run_jobs(
        Job(run=dying_trainer, arguments=arguments, fails=1),
        Job(run=server_that_outlives, arguments=arguments | {"how": how}),
    )
    text, seconds, state, same, mappings = found
    assert "trainer rank 0" in text
    assert ("died: its connection was closed" if how == signal.SIGKILL else "died: not heard") in text
    assert (state, same, mappings) == ("torn", True, 0)
    assert seconds < 30


# -- nothing left over -----------------------------------------------------------------------------------


def restarting_trainer(rank, size, *, address, device, restarts, updates):
    memory = []
    for restart in range(restarts):
        source = tensors(0, device)
        first = restart * updates + 1
        seen = publish(source, address, range(first, first + updates))
        assert [row[:2] for row in seen] == [("verified", "peer")] * updates, seen
        memory.append(open_memory())
        if device == "cuda":
            del source
            torch.cuda.empty_cache()
            memory[-1] += (torch.cuda.mem_get_info()[0] >> 20,)
    return memory


def long_lived_server(rank, size, *, address, device, restarts):
    target, memory = tensors(-1, device), []
    with weightbus.Subscriber(target, address=address) as subscriber:
        for _ in range(restarts):
            subscriber.serve()
            memory.append((*open_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10))
    return held(target), memory


def test_updates_and_restarts_return_to_their_level(address, device):
    restarts, updates = 20, 10
    shm = shared_memory_files()
    arguments = {"address": address, "device": device, "restarts": restarts}
    (left,), (served,) = run_jobs(
        Job(run=restarting_trainer, arguments=arguments | {"updates": updates}),
        Job(run=long_lived_server, arguments=arguments),
        timeout_s=100,
    )
    values, memory = served
    assert values == [float(restarts * updates)]
    assert [row[0] for row in memory] == [0] * restarts  # nothing stays mapped while no trainer is there
    assert {row[0] for row in left} == {0}
    for rows in (memory, left):
        assert max(row[1] for row in rows[2:]) <= rows[1][1], rows  # files
    assert memory[-1][2] - memory[1][2] <= 8, memory  # MiB at the peak
    if device == "cuda":
        assert abs(left[-1][2] - left[1][2]) <= 64, left  # free MiB of the GPU
    assert shared_memory_files() <= shm


def test_copies_to_host_memory_are_told_so(monkeypatch):
    """A kernel can't write there, and a two-dimensional copy has to be told what is not pinned."""

    def flat(dst, src, nbytes, stream):
        ctypes.memmove(dst, src, nbytes)
        return 0

    def rows(pointer, stream):
        copy = pointer.contents
        assert (copy.src_type, copy.dst_type, copy.dst) == (4, 1, 0)
        for row in range(copy.height):
            ctypes.memmove(copy.dst_host + row * copy.dst_pitch, copy.src + row * copy.src_pitch, copy.width)
        return 0

    library = SimpleNamespace(cuMemcpyAsync=flat, cuMemcpy2DAsync_v2=rows)
    monkeypatch.setattr("weightbus.memory.driver._library", lambda: library)
    source, target = torch.arange(48.0).view(6, 8), [torch.zeros(6, 8), torch.zeros(6, 5)]
    opened = SimpleNamespace(near=True, addresses=[source.data_ptr()])
    place = Place(allocation=0, offset=0, strides=(8, 1))
    wave = Wave()
    for dst, box, element in ((target[0], Box((0, 0), (6, 8)), 0), (target[1], Box((0, 3), (6, 5)), 3)):
        _Compiler._add_imported(wave, opened, place, element, torch.float32, dst, box)
    assert not wave.near
    wave.seal(torch.device("cpu"))
    assert wave.to_host
    for copies in wave.by_engine:
        copies.start(SimpleNamespace(cuda_stream=0))
    assert torch.equal(target[0], source)
    assert torch.equal(target[1], source[:, 3:])


@pytest.mark.parametrize("to_host", [False, True])
def test_rows_that_overlap_are_copied_one_by_one(monkeypatch, to_host):
    """Those of an expanded source, or of sliding windows: the driver refuses a pitch below the width."""

    def flat(dst, src, nbytes, stream):
        ctypes.memmove(dst, src, nbytes)
        return 0

    def refused(pointer, stream):
        return 1

    library = SimpleNamespace(cuMemcpyAsync=flat, cuMemcpy2DAsync_v2=refused, cuGetErrorName=lambda *_: 0)
    monkeypatch.setattr("weightbus.memory.driver._library", lambda: library)
    row = torch.arange(48.0)
    for source in (row.expand(5, 48), row.as_strided((5, 40), (2, 1))):
        target = torch.zeros(source.shape)
        box = Box((0, 0), tuple(source.shape))
        runs = runs_of(
            box.sizes,
            target.stride(),
            source.stride(),
            itemsize=4,
            dst=target.data_ptr(),
            src=source.data_ptr(),
        )
        EngineCopies(runs, to_host=to_host).start(SimpleNamespace(cuda_stream=0))
        assert torch.equal(target, source)
