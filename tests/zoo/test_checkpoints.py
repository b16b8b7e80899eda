"""Checkpoints as Hugging Face writes them, into live models of the same class, and back."""

from __future__ import annotations

import msgspec
import pytest
import torch
from processes import Job, run_jobs
from safetensors.torch import load_file, save_file
from test_zoo import NAMES, TENSOR_PARALLEL, hub, proved  # hub is a fixture
from zoo import different, make, state

import weightbus
from weightbus.storage.digest_list import NAME as LIST
from weightbus.storage.digest_list import load_saved, saved_of
from weightbus.storage.disk import stored_tensors
from weightbus.tools.digest_files import digest_files

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("default")]
__all__ = ["hub"]


def write(folder, name, version):
    """What save_pretrained writes, and a list of its digests."""
    source = make(name, version)
    source.save_pretrained(folder)
    saved = saved_of(digest_files(stored_tensors(folder)), version)
    (folder / LIST).write_bytes(msgspec.json.encode(saved))
    return source


@pytest.mark.parametrize(("name", "atomic"), [*((n, False) for n in NAMES), ("qwen3-moe", True)])
def test_what_save_pretrained_wrote(name, atomic, hub, tmp_path):
    source, target = write(tmp_path, name, 1), make(name, 2)
    pointers = [tensor.data_ptr() for tensor in target.parameters()]
    with weightbus.Subscriber(target, address=hub, rank=0, replica_size=1) as subscriber:
        proved(subscriber.update_from_disk(tmp_path, atomic=atomic))
    assert different(state(target), state(source)) == []
    assert pointers == [tensor.data_ptr() for tensor in target.parameters()]


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "qwen3-vl-moe"])
def test_a_byte_that_is_wrong_in_one_of_the_files_tensors(name, hub, tmp_path):
    write(tmp_path, name, 1)
    target = make(name, 2)
    before = {n: t.clone() for n, t in state(target).items()}
    expert = next(n for n in stored_tensors(tmp_path) if ".experts." in n)
    stored = stored_tensors(tmp_path)[expert]
    raw = bytearray(stored.path.read_bytes())
    raw[stored.end - 1] ^= 1
    stored.path.write_bytes(raw)
    refused = pytest.raises(weightbus.WeightbusError, match=f"{expert}: expected grid61")
    with weightbus.Subscriber(target, address=hub, rank=0, replica_size=1) as subscriber, refused:
        subscriber.update_from_disk(tmp_path)
    assert different(state(target), before) == []


def test_an_expert_that_is_missing(hub, tmp_path):
    make("qwen3-moe", 1).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    gone = next(n for n in tensors if ".experts.2." in n)
    del tensors[gone]
    save_file(tensors, file)
    target = make("qwen3-moe", 2)
    with weightbus.Subscriber(target, address=hub, rank=0, replica_size=1) as subscriber:
        with pytest.raises(weightbus.WeightbusError, match=r"experts\.\w+: expected .*"):
            subscriber.update_from_disk(tmp_path)
        assert subscriber.state == "empty"


def server(rank, size, *, address, name, path):
    torch.distributed.init_process_group("gloo")
    from transformers.distributed import DistributedConfig
    from transformers.distributed.utils import initialize_distributed_mesh

    model = make(name, 2)
    head = model.get_output_embeddings()
    if head is not None:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    config = DistributedConfig(tp_size=size, tp_plan="auto")
    _, mesh = initialize_distributed_mesh(config)
    model = model.maybe_distribute_model(model, config, mesh)
    model.tie_weights()
    with weightbus.Subscriber(model, address=address, rank=rank, replica_size=size) as subscriber:
        report = subscriber.update_from_disk(path)
    stored = sum(tensor.spec.nbytes for tensor in stored_tensors(path).values())
    return report.word, report.nbytes / stored, state(model)


def hubs(rank, size, *, address):
    from weightbus.hub.server import Hub

    Hub(address).serve()


@pytest.mark.parametrize("name", sorted({"qwen3-moe", "mixtral", "qwen3"} & set(TENSOR_PARALLEL)))
def test_each_rank_reads_what_it_holds(name, address, tmp_path):
    source = write(tmp_path, name, 1)
    served, _ = run_jobs(
        Job(run=server, size=2, arguments={"address": address, "name": name, "path": tmp_path}),
        Job(run=hubs, arguments={"address": address}, never_ends=True),
        timeout_s=100,
    )
    for word, share, held in served:
        assert word == "verified"
        assert share < 0.9  # of the files' bytes
        assert different(held, state(source)) == []
    assert load_saved(tmp_path / LIST).version == 1


@pytest.mark.parametrize("name", [n for n in NAMES if "tied" in n or n in ("t5", "bert", "gpt2", "whisper")])
def test_the_names_of_a_save_are_those_of_save_pretrained(name, hub, tmp_path):
    """Of tied tensors; other renamings are undone by from_pretrained as well."""
    source = make(name, 1)
    with weightbus.Publisher(source, address=hub, rank=0, size=1) as publisher:
        publisher.save(tmp_path / "ours")
    source.save_pretrained(tmp_path / "theirs")
    ours, theirs = (set(load_file(tmp_path / who / "model.safetensors")) for who in ("ours", "theirs"))
    assert ours - theirs == set() or {n.split(".")[-1] for n in ours - theirs} <= {"position_ids", "inv_freq"}
