"""Saves and loads over real processes: bits, all or none, what is read, what the trainer's check says after."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import threading

import msgspec
import pytest
import torch
from models import fill, full, make, values
from pipeline import SHAPES, Sharded, bits, pipeline, shard, versions_held, write_pipeline
from pipeline import fill as fill_pipeline
from processes import Job, free_address, run_jobs
from safetensors.torch import load_file, save_file
from torch import nn

import weightbus
from weightbus.control.client import Client
from weightbus.hub import server as hub_module
from weightbus.storage import ranges
from weightbus.storage.digest_list import NAME as LIST
from weightbus.storage.digest_list import load_saved, saved_of


def serve_hub(rank, size, *, address, dead_after_s=10.0):
    hub_module.Hub(address, dead_after_s=dead_after_s).serve()


def hub(address):
    return Job(run=serve_hub, arguments={"address": address}, never_ends=True)


def assert_state(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(bits(tensor.to(state[name].dtype)), bits(state[name])), name


def saver(rank, size, *, address, kind, path, file_bytes=4 << 30, version=3):
    model = make(kind, rank, size)
    fill(model, values(3))
    with weightbus.Publisher(model, address=address, rank=rank, size=size) as publisher:
        report = publisher.save(path, version=version, file_bytes=file_bytes)
        with pytest.raises(weightbus.UpdateError, match="expected a path where nothing is yet"):
            publisher.save(path)
    return str(report), report.nbytes


def loader(rank, size, *, address, kind, path, dtype=torch.float32, arguments=None):
    model = make(kind, rank, size, dtype=dtype)
    fill(model, values(1, dtype))
    before = full(model)
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    with weightbus.Subscriber(model, address=address, rank=rank, replica_size=size) as subscriber:
        try:
            report = subscriber.update_from_disk(path, **(arguments or {}))
            outcome = report.word, report.version, report.nbytes, dict(report.partial)
        except weightbus.WeightbusError as error:
            outcome = type(error).__name__, str(error)
        state = subscriber.state, subscriber.version
    assert pointers == [tensor.data_ptr() for tensor in model.state_dict().values()]
    return outcome, state, full(model), before


@pytest.mark.parametrize(("trainers", "servers"), [(("fsdp2", 2), ("tp", 2)), (("plain", 1), ("tp", 3))])
def test_what_was_saved_is_loaded_bit_for_bit(address, tmp_path, trainers, servers):
    """Files that safetensors' own library reads too, one digest list, no scratch left."""
    path = tmp_path / "version-3"
    ((said, *_),) = run_jobs(
        Job(
            run=saver,
            size=trainers[1],
            arguments={"address": address, "kind": trainers[0], "path": path, "file_bytes": 1 << 18},
        ),
    )
    assert "saved 13 tensors" in said[0]
    assert [p.name for p in tmp_path.iterdir()] == ["version-3"]
    expected = values(3)
    found = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    assert_state(found, expected)
    assert len(list(path.glob("*.safetensors"))) == 2
    assert json.loads((path / "model.safetensors.index.json").read_text())["weight_map"].keys() == found.keys()
    saved = load_saved(path / LIST)
    assert saved.version == 3
    digests = {name: weightbus.tensor_digest(tensor) for name, tensor in found.items()}
    assert {name: entry.digest for name, entry in saved.tensors.items()} == {
        n: str(d) for n, d in digests.items()
    }
    address = free_address()  # the trainer's own hub lingers
    loaded, _ = run_jobs(
        Job(run=loader, size=servers[1], arguments={"address": address, "kind": servers[0], "path": path}),
        hub(address),
    )
    for outcome, state, now, before in loaded:
        assert outcome[:2] == ("verified", 3)
        assert state == ("ready", 3)
        assert_state(now, expected)
        assert not torch.equal(before["big"], now["big"])


# -- a pipeline of several modules -------------------------------------------------------------------


def pipeline_server(rank, size, *, address):
    modules = pipeline(rank, size)
    calls = []
    subscriber = weightbus.Subscriber(
        modules,
        address=address,
        rank=rank,
        replica_size=size,
        on_update=lambda version: calls.append(("update", version)),
        on_commit=lambda version: calls.append(("commit", version, versions_held(modules, rank, size))),
        on_refused=lambda error: calls.append(("refused", str(error))),
        on_torn=lambda error: calls.append(("torn", str(error))),
    )
    with subscriber:
        subscriber.serve()
        return calls, subscriber.state, subscriber.version, versions_held(modules, rank, size)


def corrupt(folder):
    """One bit of the data of the last file of the second module; its header is fine, the digest list is not."""
    path = folder / "vae" / "part-1.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)


def shorten(folder):
    path = folder / "vae" / "part-1.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def reshape(folder):
    save_file({"decoder.bias": torch.zeros(49)}, folder / "vae" / "part-1.safetensors")
    (folder / "vae" / LIST).unlink()


def repeat(folder):
    save_file({"decoder.bias": torch.zeros(48)}, folder / "vae" / "part-9.safetensors")


def add(folder):
    save_file({"decoder.scale": torch.zeros(48)}, folder / "vae" / "part-9.safetensors")
    (folder / "vae" / LIST).unlink()


def lack(folder):
    (folder / "vae" / "part-1.safetensors").unlink()
    (folder / "vae" / LIST).unlink()


def lose(folder):
    shutil.rmtree(folder / "vae")


def unlist(folder):
    path = folder / "vae" / LIST
    path.write_text(path.read_text().replace("decoder.bias", "decoder.bios"))


def garble(folder):
    (folder / "vae" / LIST).write_text("{")


SPOILS = {
    corrupt: "decoder.bias: expected grid61:",
    shorten: r"decoder.bias: expected data up to byte \d+, got a file of \d+; truncated",
    reshape: r"vae.decoder.bias: expected shape \[48\] of vae.decoder.bias, got \[49\]",
    repeat: "decoder.bias: expected each name once, got it in",
    add: "vae.decoder.scale: unknown name",
    lack: "vae.decoder.bias: missing name",
    lose: "vae: expected a sub-folder",
    unlist: "decoder.bias: expected the list to fit its files",
    garble: "expected a list that",
}


def driver(rank, size, *, address, good, bad):
    """A trainer that sends version 1 over the group; then loads that must fail, and one that must not."""
    modules = pipeline()
    fill_pipeline(modules, 1)
    failures, words = [], []
    with weightbus.Publisher(modules, address=address, rank=rank, size=size, join_timeout_s=30) as publisher:
        words.append(publisher.update(1).word)
        with Client(address) as client:
            for path in bad:
                end = client.update_from_disk(path, timeout_s=20)
                failures.append((end.ok, end.moved, [str(failure) for failure in end.failures]))
            words.append(publisher.check().word)
            (info,) = client.replicas().replicas
            words.append((info.state, info.version, info.joined))
            end = client.update_from_disk(good, modules=["vae"], timeout_s=20)
            words.append((end.ok, end.verdict, end.version, end.ranks))
            words.append(str(publisher.check()))
            end = client.update_from_disk(good, atomic=True, timeout_s=20)
            words.append((end.ok, end.verdict, end.version))
            words.append(str(publisher.check()))
            words.append(publisher.update(4).word)
            words.append(publisher.check().word)
    return failures, words


def test_a_failure_in_the_second_module_leaves_all_bits(address, tmp_path):
    """Whatever is wrong with one file of one module: refused on both ranks, named, nothing changed; the version
    that had come over the group can still be proved. A load that succeeds is no version of the trainer's, as
    its check says, until the next update."""
    good = write_pipeline(tmp_path / "good", 2)
    bad = []
    for spoil in SPOILS:
        bad.append(write_pipeline(tmp_path / spoil.__name__, 3))
        spoil(bad[-1])
    ((failures, words),), servers = run_jobs(
        Job(run=driver, arguments={"address": address, "good": good, "bad": [*bad, tmp_path / "nowhere"]}),
        Job(run=pipeline_server, size=2, arguments={"address": address}),
    )
    for (ok, moved, reasons), expected in zip(failures, [*SPOILS.values(), "nowhere"], strict=True):
        assert (ok, moved) == (False, False)
        assert re.search(expected, reasons[0]), (expected, reasons)
        assert "server rank" in reasons[0]
    word, checked, info, vae, after_vae, whole, after_whole, updated, rechecked = words
    assert (word, checked, info) == ("verified", "verified", ("ready", 1, 2))
    assert vae == (True, "verified", 2, 2)
    for text in (after_vae, after_whole):
        assert text.startswith("mismatch")
        assert f"got version 2, loaded from {good}; this rank is ready" in text
    assert whole == (True, "verified", 2)
    assert (updated, rechecked) == ("verified", "verified")
    everything = dict.fromkeys(SHAPES, 1)
    for calls, state, version, now in servers:
        assert calls == [
            ("update", 1),
            ("commit", 1, everything),
            ("update", 2),
            ("commit", 2, everything | {"vae": 2}),
            ("update", 2),
            ("commit", 2, dict.fromkeys(SHAPES, 2)),
            ("update", 4),
            ("commit", 4, everything),
        ]
        assert (state, version, now) == ("ready", 4, everything)


# -- what is read, and what memory that takes ----------------------------------------------------------

BIG = {"rows.weight": (2048, 2048), "out.weight": (2048, 2048), "norm.weight": (2048,)}


def rchar():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def big_server(rank, size, *, address, folder, staged, arguments):
    """``staged``: live memory that a file can't be read into directly, so that bytes pass through buffers."""
    ranges.BUFFER_BYTES = 1 << 20
    model = Sharded(BIG, rank, size)
    if staged:
        for parameter in model.parameters():
            parameter.data = torch.ones((*parameter.shape, 2))[..., 0]
    held = sum(parameter.numel() * 4 for parameter in model.parameters())
    with weightbus.Subscriber(model, address=address, rank=rank, replica_size=size) as subscriber:
        subscriber.update_from_disk(folder)  # what is imported at first use is there from now on
        before, peak = rchar(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        report = subscriber.update_from_disk(folder, **arguments)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
        asked = rchar() - before
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return report.word, asked, held, grown, state


@pytest.mark.parametrize(
    ("listed", "staged", "arguments", "word", "times", "kept"),
    [
        (False, False, {}, "unverified", 1.0, 0.0),
        (False, True, {}, "unverified", 1.0, 0.0),
        (True, False, {"atomic": True}, "verified", 1.0, 1.0),
        (True, False, {}, "verified", 2.0, 0.0),
        (True, True, {"verify": False}, "unverified", 1.0, 0.0),
    ],
    ids=["in place", "through buffers", "atomic", "verified", "unverified"],
)
def test_ranks_ask_files_for_what_they_hold_and_memory_is_bounded(
    address, tmp_path, listed, staged, arguments, word, times, kept
):
    """Row shards and column shards of two ranks, in bytes requested of files by both together."""
    generator = torch.Generator().manual_seed(5)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in BIG.items()}
    save_file(whole, tmp_path / "m.safetensors")
    if listed:
        saved = saved_of({name: weightbus.tensor_digest(tensor) for name, tensor in whole.items()})
        (tmp_path / LIST).write_bytes(msgspec.json.encode(saved))
    given = {"address": address, "folder": tmp_path, "staged": staged, "arguments": arguments}
    servers, _ = run_jobs(Job(run=big_server, size=2, arguments=given), hub(address))
    asked, held = sum(row[1] for row in servers), sum(row[2] for row in servers)
    assert held <= asked / times <= 1.02 * held
    for rank, (said, _, own, grown, state) in enumerate(servers):
        assert said == word
        assert grown <= kept * own + (8 << 20)
        for name, tensor in whole.items():
            assert torch.equal(bits(shard(name, tensor, rank, 2)), bits(state[name]))


# -- failures after the first write --------------------------------------------------------------------


class Breaks(nn.Module):
    """Its second parameter's loader computes, so that it can't be traced, and raises or dies on rank 1."""

    def __init__(self, rank, dies=False):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(6, 4))
        self.second = nn.Parameter(torch.zeros(6, 4))
        self.fails, self.dies = rank == 1, dies
        self.second.weight_loader = self.load

    def load(self, parameter, loaded):
        if self.fails and not loaded.is_meta:
            if self.dies:
                os._exit(1)
            raise ValueError("no room")
        parameter.data.copy_(loaded * 2)


def breaking_server(rank, size, *, address, folder):
    model = Breaks(rank)
    torn = []
    with weightbus.Subscriber(
        model, address=address, rank=rank, replica_size=size, on_torn=lambda error: torn.append(str(error))
    ) as subscriber:
        with pytest.raises(
            weightbus.TornError, match=r"second: weight_loader of second raised ValueError: no room"
        ):
            subscriber.update_from_disk(folder)
        states = [subscriber.state]
        model.fails = False
        report = subscriber.update_from_disk(folder)
        states.append(subscriber.state)
    return states, torn, report.word, dict(report.partial), model.first.detach(), model.second.detach()


def test_a_hook_that_raises_leaves_ranks_torn_until_a_whole_load(address, tmp_path):
    tensors = {"first": torch.randn(6, 4), "second": torch.randn(6, 4)}
    save_file(tensors, tmp_path / "m.safetensors")
    saved = saved_of({name: weightbus.tensor_digest(tensor) for name, tensor in tensors.items()})
    (tmp_path / LIST).write_bytes(msgspec.json.encode(saved))
    servers, _ = run_jobs(
        Job(run=breaking_server, size=2, arguments={"address": address, "folder": tmp_path}), hub(address)
    )
    for states, torn, word, arrived, first, second in servers:
        assert states == ["torn", "ready"]
        assert len(torn) == 1
        assert "replica 0 server rank 1" in torn[0]
        assert word == "partial"
        assert "it computes with weights" in arrived["second"]
        assert torch.equal(first, tensors["first"])
        assert torch.equal(second, tensors["second"] * 2)


def widow(rank, size, *, address, folder):
    model = Breaks(rank, dies=True)
    with weightbus.Subscriber(model, address=address, rank=rank, replica_size=size) as subscriber:
        with pytest.raises(weightbus.TornError, match=r"replica 0 server rank 1 .*died: its connection"):
            subscriber.update_from_disk(folder, timeout_s=20)
        return subscriber.state


def test_a_rank_that_dies_while_it_writes_is_named_and_the_other_torn(address, tmp_path):
    save_file({"first": torch.randn(6, 4), "second": torch.randn(6, 4)}, tmp_path / "m.safetensors")
    given = {"address": address, "folder": tmp_path}
    ((state, _), _) = run_jobs(
        Job(run=widow, size=2, arguments=given, fails=1),
        Job(run=serve_hub, arguments={"address": address, "dead_after_s": 4.0}, never_ends=True),
    )
    assert state == "torn"


class Late:
    """A name map that changes a file when it is asked again: after all has been looked at."""

    def __init__(self, path):
        self.path = path

    def __call__(self, version):
        os.truncate(self.path, 200)


def late_server(rank, size, *, address, folder, atomic):
    model = nn.Linear(8, 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    shorten = Late(folder / "m.safetensors")
    with weightbus.Subscriber(model, address=address, rank=0, replica_size=1, on_update=shorten) as subscriber:
        try:
            word = subscriber.update_from_disk(folder, atomic=atomic).word
        except weightbus.WeightbusError as error:
            word = f"{type(error).__name__}: {error}"
        return word, subscriber.state, torch.equal(before["weight"], model.weight)


@pytest.mark.parametrize("atomic", [False, True])
def test_a_file_that_is_cut_after_all_were_ready(address, tmp_path, atomic):
    """``on_update`` comes when everything has been looked at, and before the first write."""
    save_file({"weight": torch.randn(8, 8), "bias": torch.randn(8)}, tmp_path / "m.safetensors")
    given = {"address": address, "folder": tmp_path, "atomic": atomic}
    ((word, state, same),), _ = run_jobs(Job(run=late_server, arguments=given), hub(address))
    if atomic:
        assert (word, state, same) == ("unverified", "ready", False)
    else:
        assert "TornError" in word
        assert "truncated" in word
        assert state == "torn"


def mapped_server(rank, size, *, address, folder):
    """A fused parameter in bfloat16 behind a name map; rank 0 calls, the others serve."""
    model = nn.Module()
    model.qkv = nn.Parameter(torch.zeros(12 // size, 4, dtype=torch.bfloat16))

    def load(parameter, loaded, part):
        rows = parameter.shape[0] // 3
        parameter.data[part * rows : (part + 1) * rows].copy_(loaded.chunk(size, 0)[rank])

    model.qkv.weight_loader = load
    done = threading.Event()
    subscriber = weightbus.Subscriber(
        model,
        address=address,
        rank=rank,
        replica_size=size,
        name_map=lambda wire: ("qkv", "qkv".index(wire[0])),
        on_commit=lambda version: done.set(),
    )
    with subscriber:
        if rank == 0:
            subscriber.update_from_disk(folder, version=5)
        while not done.is_set():
            subscriber.poll(timeout_s=0.2)
        return subscriber.version, model.qkv.detach().float()


def test_traced_hooks_take_their_boxes_only(address, tmp_path):
    tensors = {name: torch.randn(4, 4).bfloat16() for name in ("q_proj", "k_proj", "v_proj")}
    save_file(tensors, tmp_path / "m.safetensors")
    servers, _ = run_jobs(
        Job(run=mapped_server, size=2, arguments={"address": address, "folder": tmp_path}), hub(address)
    )
    for rank, (version, qkv) in enumerate(servers):
        assert version == 5
        assert torch.equal(qkv, torch.cat([t.chunk(2, 0)[rank] for t in tensors.values()]).float())


def lonely_saver(rank, size, *, address, folder, dies):
    model = make("fsdp2", rank, size)
    with weightbus.Publisher(model, address=address, rank=rank, size=size, dead_after_s=1.0) as publisher:
        if rank == 1:
            if dies:
                os._exit(1)
            with pytest.raises(weightbus.UpdateError, match="expected SaveTask"):
                publisher.save(folder / "other", timeout_s=5.0)
            return "refused"
        with pytest.raises(weightbus.UpdateError) as caught:
            publisher.save(folder / "whole", timeout_s=5.0)
        return str(caught.value)


@pytest.mark.parametrize("dies", [False, True])
def test_a_save_that_fails_leaves_nothing_behind(address, tmp_path, dies):
    ((said, *_),) = run_jobs(
        Job(
            run=lonely_saver,
            size=2,
            arguments={"address": address, "folder": tmp_path, "dies": dies},
            fails=int(dies),
        ),
    )
    assert "trainer rank 1" in said
    assert list(tmp_path.iterdir()) == []
