"""Real model classes, without options: updated in process and tensor-parallel, saved and loaded, all proved."""

from __future__ import annotations

import socket
import time

import processes
import pytest
import torch
from processes import Job, run_jobs, start_python
from zoo import MODELS, different, make, state

import weightbus

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("default")]
processes._context.set_forkserver_preload(["torch.distributed.tensor", "weightbus.session", "transformers"])

NAMES = sorted(MODELS)
TENSOR_PARALLEL = sorted(n for n in NAMES if make(n, 0)._tp_plan)


def proved(told) -> None:
    assert told.word == "verified", str(told)
    assert not told.partial


@pytest.mark.parametrize("name", NAMES)
def test_in_process(name):
    source, target = make(name, 1), make(name, 2)
    before = state(target)
    with weightbus.colocate(source, target) as pair:
        proved(pair.update(1))
        proved(pair.check())
    assert different(state(target), state(source)) == []
    assert different(state(target), before), "the weights were others before"


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_server(name):
    """A trainer's fp32 masters, a server that was loaded as bfloat16 throughout."""
    source, target = make(name, 1), make(name, 2).to(torch.bfloat16)
    with weightbus.colocate(source, target) as pair:
        proved(pair.update(1))
        proved(pair.check())
    expected = {n: t.to(state(target)[n].dtype) for n, t in state(source).items()}
    assert different(state(target), expected) == []


def trainer(rank, size, *, address, name):
    with weightbus.Publisher(make(name, 1), address=address, rank=rank, size=size) as publisher:
        reports = [publisher.update(1), publisher.check()]
    return [(report.word, report.partial) for report in reports]


def server(rank, size, *, address, name):
    """Tensor-parallel by the class's own plan."""
    torch.distributed.init_process_group("gloo")
    from transformers.distributed import DistributedConfig
    from transformers.distributed.utils import initialize_distributed_mesh

    model = make(name, 2)
    head = model.get_output_embeddings()
    if head is not None:  # plans name a tied head too: it is sharded by itself, and tied again
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    config = DistributedConfig(tp_size=size, tp_plan="auto")
    _, mesh = initialize_distributed_mesh(config)
    model = model.maybe_distribute_model(model, config, mesh)
    model.tie_weights()
    sharded = sum(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    with weightbus.Subscriber(model, address=address, rank=rank, replica_size=size) as subscriber:
        subscriber.serve()
        assert subscriber.state == "ready", subscriber.error
    return sharded, state(model)


@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_tensor_parallel(name, address):
    trained, served = run_jobs(
        Job(run=trainer, arguments={"address": address, "name": name}),
        Job(run=server, size=2, arguments={"address": address, "name": name}),
        timeout_s=100,
    )
    assert trained == [[("verified", {}), ("verified", {})]]
    expected = state(make(name, 1))
    for sharded, held in served:
        assert sharded, "the plan shards something"
        assert different(held, expected) == []


@pytest.fixture
def hub(address):
    host, port = address.removeprefix("tcp://").split(":")
    process = start_python("-m", "weightbus", "hub", "--address", address)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                break
        time.sleep(0.05)
    yield address
    process.terminate()
    process.wait(10)


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(name, hub, tmp_path):
    """What the publisher saves, weightbus loads into a live model, and from_pretrained into a new one."""
    source, target, path = make(name, 1), make(name, 2), tmp_path / "saved"
    with weightbus.Publisher(source, address=hub, rank=0, size=1) as publisher:
        publisher.save(path, version=1)
    with weightbus.Subscriber(target, address=hub, rank=0, replica_size=1) as subscriber:
        proved(subscriber.update_from_disk(path))
    assert different(state(target), state(source)) == []
    source.config.save_pretrained(path)
    again = type(source).from_pretrained(path)
    assert different(state(again), state(source)) == []
