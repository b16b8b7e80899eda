"""Names: tied tensors under each of theirs, names that nobody wants, renamed and excluded ones; versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Job, run_jobs
from torch import nn

import weightbus
from weightbus.errors import SpecError, UpdateError
from weightbus.tensors.ranks import rank_and_size


def parameter(*shape, fill=None):
    values = torch.randn(shape) if fill is None else torch.full(shape, float(fill))
    return nn.Parameter(values, requires_grad=False)


NAMES = ("a.w", "b.w", "c.w", "d")


def tree(ties, fill=None):
    """Tensors ``NAMES``, of which those in one of ``ties`` are one object."""
    model = nn.Module()
    for key in ("a", "b", "c"):
        setattr(model, key, nn.Module())
    held = {name: parameter(5, 3, fill=fill) for name in NAMES}
    for tie in ties:
        for name in tie:
            held[name] = held[tie[0]]
    for name, tensor in held.items():
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, tensor)
    return model


def values(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters(remove_duplicate=False)}


class Skips(nn.Module):
    """Loading code that takes some names only, as engines do of tied heads."""

    def __init__(self, inner, skipped):
        super().__init__()
        self.inner, self.skipped = inner, skipped

    def load_weights(self, weights):
        mine = dict(self.inner.named_parameters(remove_duplicate=False))
        for name, tensor in weights:
            if name in mine and name not in self.skipped:
                mine[name].data.copy_(tensor)


def groups(ties):
    return {frozenset(tie) for tie in ties} | {frozenset([n]) for n in NAMES if not any(n in t for t in ties)}


ties = st.sampled_from(
    [(), (("a.w", "b.w"),), (("a.w", "d"),), (("a.w", "b.w", "d"),), (("a.w", "c.w"), ("b.w", "d"))]
)


@settings(max_examples=60, deadline=None)
@given(source_ties=ties, target_ties=ties, loader=st.booleans(), data=st.data())
def test_every_destination_of_tied_tensors_is_fed(source_ties, target_ties, loader, data):
    """Each name's destination holds its bytes, whichever names loading code takes; else it is refused."""
    source, inner = tree(source_ties), tree(target_ties, fill=9)
    skipped = set()
    if loader:
        for tie in target_ties:
            skipped |= set(data.draw(st.sets(st.sampled_from(tie), max_size=len(tie) - 1)))
    target = Skips(inner, skipped) if loader else inner
    finer = all(any(tie <= other for other in groups(source_ties)) for tie in groups(target_ties))
    before = values(inner)
    refused = ""
    with weightbus.colocate(source, target) as pair:
        try:
            word = pair.update(1).word
        except UpdateError as error:
            refused = str(error)
        else:
            assert pair.check().word == word == "verified"
    if refused:
        assert not finer, refused
        assert all(torch.equal(before[name], tensor) for name, tensor in values(inner).items())
        return
    sent = values(source)
    for name, tensor in values(inner).items():
        feeds = next(tie for tie in groups(target_ties) if name in tie)
        assert any(torch.equal(tensor, sent[other]) for other in feeds), name
        assert not finer or torch.equal(tensor, sent[name]), name


def trainer(rank, size, *, address, route, **options):
    torch.manual_seed(5)
    with weightbus.Publisher(
        tree((("a.w", "b.w", "d"),)), address=address, rank=rank, size=size, route=route, **options
    ) as publisher:
        report = publisher.update(1)
        return report.word, report.nbytes, dict(report.skipped), publisher.check().word


def server(rank, size, *, address, name_map=None, dtype=torch.float32):
    model = tree((), fill=9)
    model.b.w = nn.Parameter(model.b.w.detach().to(dtype), requires_grad=False)
    with weightbus.Subscriber(
        model, address=address, rank=rank, replica_size=size, name_map=name_map
    ) as subscriber:
        subscriber.serve()
    return values(model)


@pytest.mark.parametrize(
    ("route", "size", "dtype"),
    [
        ("broadcast", 1, torch.float32),
        ("broadcast", 2, torch.float32),
        ("broadcast", 2, torch.bfloat16),
        ("reshard", 2, torch.float32),
        ("reshard", 2, torch.bfloat16),
        ("peer", 2, torch.float32),
    ],
)
def test_a_tied_trainer_to_an_untied_server(address, route, size, dtype):
    ((told, *_), (held,)) = run_jobs(
        Job(run=trainer, size=size, arguments={"address": address, "route": route}),
        Job(run=server, arguments={"address": address, "dtype": dtype}),
    )
    torch.manual_seed(5)
    sent = values(tree((("a.w", "b.w", "d"),)))
    assert (told[0], told[2], told[3]) == ("verified", {}, "verified")
    if route != "peer":
        assert told[1] == 2 * 60 + (30 if dtype is torch.bfloat16 else 0), "bytes of one dtype travel once"
    for name, tensor in held.items():
        assert torch.equal(tensor, sent[name].to(tensor.dtype)), name


# -- tensors that nobody wants -------------------------------------------------------------------------


class Head(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
        self.value = nn.Linear(3, 1)


class Picky(nn.Linear):
    def load_weights(self, weights):
        for name, tensor in weights:
            if not name.startswith("value."):
                self.get_parameter(name).data.copy_(tensor)


@pytest.mark.parametrize("how", ["exclude", "name_map", "loader"])
def test_extra_tensors_are_left_out_and_said(how):
    source, target = Head(), (Picky if how == "loader" else nn.Linear)(3, 3)
    options = {}
    if how == "exclude":
        options = {"exclude": ["value.*"]}
    elif how == "name_map":
        options = {"name_map": lambda name: None if name.startswith("value.") else name}
    with weightbus.colocate(source, target, **options) as pair:
        report = pair.update(1)
    assert torch.equal(source.weight, target.weight)
    assert report.word == "verified"
    assert set(report.skipped) == (set() if how == "exclude" else {"value.weight", "value.bias"})
    if how != "exclude":
        assert "not taken: value.bias: replica 0:" in str(report)


def test_a_plain_target_is_not_guessed_for():
    with weightbus.colocate(Head(), nn.Linear(3, 3)) as pair:
        with pytest.raises(UpdateError, match=r"value.bias: unknown name.*exclude=.*such as value.weight"):
            pair.update(1)
        assert pair.state == "empty"


def test_rename():
    source, target = nn.ModuleDict({"old": nn.Linear(3, 3)}), nn.ModuleDict({"new": nn.Linear(3, 3)})
    with weightbus.colocate(source, target, rename=lambda name: name.replace("old", "new")) as pair:
        assert pair.update(1).word == "verified"
    assert torch.equal(source["old"].weight, target["new"].weight)
    with pytest.raises(SpecError, match="once, got it twice"):
        weightbus.colocate(source, target, rename=lambda name: "same")


def test_a_wrong_prefix_of_many_names_is_seen_from_both_sides():
    many = [f"layers.{i}.mlp.experts.{j}.gate_proj.weight" for i in range(40) for j in range(40)]
    source = [(f"base_model.{name}", torch.zeros(2)) for name in many]
    with weightbus.colocate(source, [(name, torch.zeros(2)) for name in many]) as pair:
        with pytest.raises(UpdateError) as caught:
            pair.update(1)
        text = str(caught.value)
        assert len(text) < 3000
        assert "layers.0.mlp.experts.0.gate_proj.weight" in text
        assert "base_model.layers" in text
        assert "1600 of this rank's 1600 tensors" in text


def test_a_long_error_is_cut_and_lives(address):
    """Of whatever length an error is, the other side hears its beginning."""

    def refuse(name):
        raise ValueError("x" * 500_000)

    with weightbus.colocate(nn.Linear(2, 2), nn.Linear(2, 2), name_map=refuse) as pair:
        with pytest.raises(UpdateError, match=r"ValueError: xxx.* more characters"):
            pair.update(1)
        assert pair.state == "empty"


@pytest.mark.parametrize("kind", ["meta", "sparse", "float4"])
def test_declared_tensors_may_be_of_any_kind(kind):
    odd = {
        "meta": lambda: torch.empty(2, device="meta"),
        "sparse": lambda: torch.eye(2).to_sparse(),
        "float4": lambda: torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }[kind]()
    source, target = nn.Linear(3, 3), nn.Linear(3, 3)
    target.register_buffer("own", odd)
    with pytest.raises(SpecError, match="own: expected"):
        weightbus.colocate(source, target)
    with weightbus.colocate(source, target, local=["own"]) as pair:
        assert pair.update(1).word == "verified"
        assert pair.check().exempt["own"] == "local"
    source.register_buffer("own", odd)
    with weightbus.colocate(source, target, local=["own"], exclude=["own"]) as pair:
        assert pair.update(1).word == "verified"


def test_a_declared_view_may_share_storage():
    source, target = nn.Linear(4, 4), nn.Linear(4, 4)
    target.register_buffer("top", target.weight.detach()[:2])
    with pytest.raises(SpecError, match="shares part of its storage"):
        weightbus.colocate(source, target)
    with weightbus.colocate(source, target, derived=["top"]) as pair:
        assert pair.update(1).word == "verified"
    assert torch.equal(target.top, source.weight[:2])


def test_destinations_without_elements_are_no_exception():
    source, target = nn.Linear(3, 3), nn.Linear(3, 3)
    target.register_buffer("packed", torch.empty(0))
    with weightbus.colocate(source, target) as pair:
        report = pair.update(1)
        assert (report.word, list(report.partial)) == ("partial", ["packed"])
        assert list(pair.check().partial) == ["packed"]
    with weightbus.colocate(source, target, local=["packed"]) as pair:
        assert pair.update(1).word == "verified"
    source.register_buffer("packed", torch.empty(0))
    with weightbus.colocate(source, target) as pair:
        assert pair.update(1).word == "verified"


# -- ranks and versions --------------------------------------------------------------------------------

VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "PMI_RANK", "PMI_SIZE")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "5"}, (3, 5)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_PROCID": "3", "SLURM_NTASKS": "5"}, (3, 5)),
        ({"RANK": "2"}, "only rank 2"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK: expected an integer"),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "5"}, "SLURM_PROCID"),
    ],
)
def test_the_launcher_says_the_rank(monkeypatch, variables, expected):
    for name in (*VARIABLES, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, tuple):
        assert rank_and_size(nn.Linear(1, 1)) == expected
    else:
        with pytest.raises(SpecError, match=expected):
            rank_and_size(nn.Linear(1, 1))
    assert rank_and_size(nn.Linear(1, 1), 1, 2) == (1, 2)


def grouped(rank, size, *, port, odd):
    import os

    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    if odd:
        os.environ |= {"RANK": str(rank + 1), "WORLD_SIZE": "7"}
    try:
        return rank_and_size(nn.Linear(1, 1))
    except SpecError as error:
        return str(error)


@pytest.mark.parametrize("odd", [False, True])
def test_the_default_group_says_the_rank(odd):
    from processes import free_port

    (told,) = run_jobs(Job(run=grouped, size=2, bare=True, arguments={"port": free_port(), "odd": odd}))
    if odd:
        assert all("one answer" in text and "of 2" in text and "of 7" in text for text in told)
    else:
        assert told == [(0, 2), (1, 2)]


@pytest.mark.parametrize("version", [True, 1.0, "1", -1, 1 << 62])
def test_versions_are_integers(version):
    with weightbus.colocate(nn.Linear(2, 2), nn.Linear(2, 2)) as pair:
        with pytest.raises(SpecError, match="version: expected"):
            pair.update(version)
        assert pair.update(np.int64(3)).version == 3


def test_modules_that_users_name_in_full():
    assert callable(weightbus.http.router)
    with pytest.raises(AttributeError):
        weightbus.https  # noqa: B018
