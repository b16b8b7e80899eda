"""What can't be moved is refused with a reason, on both ends, before a byte of a weight moves."""

from __future__ import annotations

import time

import pytest
import torch
import zmq
from processes import Job, run_jobs

import weightbus
from weightbus.control import messages as m
from weightbus.control import wire

BEFORE = 7.0


def tensors(**changes):
    """A small source or target, each tensor filled with BEFORE; a change of None drops the tensor."""
    shapes = {"a": (4, 6), "b": (3,), "c": (2, 2)} | changes
    made = []
    for name, shape in shapes.items():
        if isinstance(shape, torch.Tensor):
            made.append((name, shape))
        elif shape is not None:
            made.append((name, torch.full(shape, BEFORE)))
    return made


def trainer(rank, size, *, address, source, modules=None, min_replicas=1, join_timeout_s=10.0, version=1):
    with weightbus.Publisher(
        source[rank] if isinstance(source, dict) else source,
        address=address,
        min_replicas=min_replicas,
        join_timeout_s=join_timeout_s,
    ) as publisher:
        try:
            return publisher.update(version, modules=modules).word
        except weightbus.WeightbusError as error:
            return type(error).__name__, str(error)


def server(rank, size, *, address, target, replica_size=None, **options):
    calls = []
    subscriber = weightbus.Subscriber(
        target,
        address=address,
        rank=rank,
        replica_size=replica_size or size,
        on_commit=lambda version: calls.append("commit"),
        on_torn=lambda error: calls.append("torn"),
        on_refused=lambda error: calls.append("refused"),
        **options,
    )
    with subscriber:
        subscriber.serve()
    state = {name: tensor.clone() for name, tensor in target}
    return calls, str(subscriber.error), subscriber.state, state


def double(wire):
    return "a" if wire == "c" else wire


CASES = {
    "unknown name": (tensors(extra=(2,)), tensors(), {}, "extra: unknown name"),
    "missing name": (tensors(c=None), tensors(), {}, "c: missing name"),
    "wrong shape": (tensors(a=(4, 5)), tensors(), {}, "a: expected shape [4, 6] of a, got [4, 5]"),
    "transposed": (tensors(a=(6, 4)), tensors(), {}, "a: expected shape [4, 6] of a, got [6, 4]"),
    "float to int": (
        tensors(),
        tensors(b=torch.full((3,), 7, dtype=torch.int32)),
        {},
        "b: expected a dtype that casts to int32 of b, got float32",
    ),
    "float to fp8": (
        tensors(),
        tensors(b=torch.full((3,), BEFORE).to(torch.float8_e4m3fn)),
        {},
        "b: expected a dtype that casts to float8_e4m3fn of b, got float32",
    ),
    "complex to float": (
        tensors(b=torch.full((3,), BEFORE, dtype=torch.complex64)),
        tensors(),
        {},
        "b: expected a dtype that casts to float32 of b, got complex64",
    ),
    "written twice": (
        tensors(a=(2, 2)),
        tensors(a=(2, 2)),
        {"name_map": double},
        "c: writes a, which a writes already",
    ),
    "mapped to nothing": (
        tensors(),
        tensors(),
        {"name_map": {"a": "z"}},
        "a: name_map gives 'z', which this rank's model does not have",
    ),
    "arguments without a hook": (
        tensors(),
        tensors(),
        {"name_map": {"a": ("a", "q")}},
        "a has no weight_loader",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_before_a_byte_moves(address, case):
    source, target, options, reason = CASES[case]
    for _, tensor in source:
        tensor.zero_()
    (trained,), (served,) = run_jobs(
        Job(run=trainer, arguments={"address": address, "source": source}),
        Job(run=server, arguments={"address": address, "target": target, **options}),
    )
    kind, text = trained
    assert kind == "UpdateError"
    assert reason in text
    assert "server rank 0" in text or "trainer rank 0" in text
    calls, error, state, after = served
    assert (calls, state) == (["refused"], "empty")
    assert reason in error
    for _, tensor in after.items():
        assert torch.equal(tensor.to(torch.float32), torch.full(tensor.shape, BEFORE))


def test_local_names_need_no_tensor(address):
    (trained,), (served,) = run_jobs(
        Job(run=trainer, arguments={"address": address, "source": tensors(c=None)}),
        Job(run=server, arguments={"address": address, "target": tensors(), "local": ["c*"]}),
    )
    assert trained == "verified"
    assert served[0] == ["commit"]


def test_sources_of_two_ranks_disagree(address):
    """Rank 1's tensor has another shape: both trainer ranks hear of it, and the server."""
    sources = {0: tensors(), 1: tensors(b=(4,))}
    trained, (served,) = run_jobs(
        Job(run=trainer, size=2, arguments={"address": address, "source": sources}),
        Job(run=server, arguments={"address": address, "target": tensors()}),
    )
    for kind, text in trained:
        assert kind == "UpdateError"
        assert "b: expected b float32[3] as on group rank 0, got b float32[4] on group rank 1" in text
    assert served[0] == ["refused"]


def test_trainer_ranks_call_with_different_versions(address):
    trained, _ = run_jobs(
        Job(run=_different_versions, size=2, arguments={"address": address}),
        Job(run=server, arguments={"address": address, "target": tensors()}),
    )
    for kind, text in trained:
        assert kind == "UpdateError"
        assert "expected version" in text


def _different_versions(rank, size, *, address):
    return trainer(rank, size, address=address, source=tensors(), version=rank + 1, join_timeout_s=30.0)


def test_no_complete_replica(address):
    """Rank 1 of 2 never comes: the error says so, after the deadline, and nothing is written."""
    (trained,), (served,) = run_jobs(
        Job(run=trainer, arguments={"address": address, "source": tensors(), "join_timeout_s": 2.0}),
        Job(run=server, arguments={"address": address, "target": tensors(), "replica_size": 2}),
    )
    kind, text = trained
    assert kind == "UpdateError"
    assert "expected 1 complete, got 0; replica 0 misses server ranks [1] of 2" in text
    assert served[0] == []


def _twice(rank, size, *, address):
    source = tensors()
    sizes = []
    with weightbus.Publisher(source, address=address, join_timeout_s=10) as publisher:
        for version in (1, 1, 3):
            try:
                sizes.append(publisher.update(version).version)
            except weightbus.UpdateError as error:
                sizes.append(str(error))
    return sizes


def test_a_version_only_grows(address):
    (trained,), (served,) = run_jobs(
        Job(run=_twice, arguments={"address": address}),
        Job(run=server, arguments={"address": address, "target": tensors()}),
    )
    assert trained[0] == 1
    assert "expected one above 1, the last committed" in trained[1]
    assert trained[2] == 3
    assert served[0] == ["commit", "commit"]


def _second(rank, size, *, address):
    """Joins while the first publisher lives, then says what came of it."""
    time.sleep(2)
    try:
        weightbus.Publisher(tensors(), address=address, rank=0, size=1, connect_timeout_s=10).close()
    except weightbus.WeightbusError as error:
        return type(error).__name__, str(error)
    return None


def _first(rank, size, *, address):
    with weightbus.Publisher(tensors(), address=address, rank=0, size=1):
        time.sleep(8)


def test_a_second_publisher_is_refused(address):
    _, (second,) = run_jobs(
        Job(run=_first, arguments={"address": address}), Job(run=_second, arguments={"address": address})
    )
    kind, text = second
    assert kind == "HubError"
    assert "trainer rank 0 is taken by trainer rank 0 (pid " in text


@pytest.fixture
def hub(address):
    """A hub in a thread: what it answers to hand-made messages."""
    import threading

    from weightbus.hub.server import Hub

    served = Hub(address)
    thread = threading.Thread(target=served.serve)
    thread.start()
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(address)

    def ask(*frames):
        socket.send_multipart(frames)
        assert socket.poll(5000), "no answer"
        return wire.decode_from_hub(socket.recv_multipart())

    yield ask
    socket.close()
    context.term()
    served.stop()
    thread.join(5)
    assert not thread.is_alive()


HELLO = m.Hello(process="p", host="h", pid=1, device="cpu", role="trainer", rank=0, size=1)


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([b"weightbus/1", wire.encode(HELLO)[1]], "expected protocol weightbus/2, got b'weightbus/1'"),
        ([b"GET / HTTP/1.1"], "expected protocol weightbus/2"),
        ([wire.HEADER], "expected 2 frames, got 1"),
        ([wire.HEADER, b"\x93garbage"], "message to the hub"),
        ([wire.HEADER, b"\x81\xa4type\xa4what"], "Invalid value 'what' - at `$.type`"),
        (
            [wire.HEADER, wire.encode(HELLO)[1].replace(b"cpu", b"tpu")],
            "Invalid enum value 'tpu' - at `$.device`",
        ),
        ([wire.HEADER, b"\x91" * 5000], "message to the hub"),
    ],
    ids=["version", "http", "frames", "garbage", "tag", "enum", "deep"],
)
def test_the_hub_refuses_and_lives(hub, frames, reason):
    answer = hub(*frames)
    assert isinstance(answer, m.Refused)
    assert reason in answer.reason
    assert isinstance(hub(*wire.encode(HELLO)), m.Welcome)


def test_the_hub_listens_on_loopback_only():
    from weightbus.hub.server import Hub

    for address in ("tcp://0.0.0.0:5757", "tcp://192.0.2.1:5757", "tcp://*:5757"):
        with pytest.raises(weightbus.WeightbusError, match="address: expected"):
            Hub(address)


def test_partial_placements_are_refused(address):
    (trained,), _ = run_jobs(
        Job(run=_partial, arguments={"address": address}),
        Job(run=server, arguments={"address": address, "target": tensors(b=None, c=None)}),
    )
    assert trained[0] == "SpecError"
    assert "a:" in trained[1]
    assert "Partial" in trained[1]


def _partial(rank, size, *, address):
    from models import join_world
    from torch.distributed.tensor import DTensor, Partial

    mesh = join_world(rank, size, "cpu")
    source = [("a", torch.zeros(4, 6))]
    with weightbus.Publisher(source, address=address, join_timeout_s=20) as publisher:
        publisher.update(1)
        try:
            weightbus.Publisher(
                [("a", DTensor.from_local(torch.zeros(4, 6), mesh, [Partial()]))], address=address
            )
        except weightbus.WeightbusError as error:
            return type(error).__name__, str(error)
    return None
