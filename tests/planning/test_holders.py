"""What several trainer ranks hold is compared, not dropped: one byte that differs is named, at any update."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import Job, run_jobs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import weightbus
from weightbus.control import messages as m
from weightbus.errors import TornError, UpdateError
from weightbus.hub.compare import compare_folds, compare_held, name_held
from weightbus.planning.box import Box
from weightbus.planning.facts import Holding
from weightbus.planning.holders import replicated
from weightbus.planning.spec import Spec


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.BatchNorm1d(48), nn.Linear(48, 8))
    model.narrow = nn.Parameter(torch.randn(7, 5, dtype=torch.bfloat16))
    return model


def flip(tensor, element=0):
    """One bit of one element."""
    with torch.no_grad():
        tensor.detach().view(-1).view(torch.uint8)[element] ^= 1


def trainer(rank, size, *, address, odd, name, when, route="auto", only=(), cast=False):
    """Rank ``odd`` has one other bit in ``name`` at update ``when``; only: the ranks that hold any of it."""
    model = net()
    if cast:
        model = model.double()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if only and rank not in only:
        del tensors[name]
    told = []
    with weightbus.Publisher(
        list(tensors.items()), address=address, rank=rank, size=size, route=route, join_timeout_s=30
    ) as publisher:
        for version in (1, 2, 3):
            if version == when and rank == odd:
                flip(tensors[name], 3)
            try:
                told.append(publisher.update(version).word)
            except weightbus.WeightbusError as error:
                told.append((type(error).__name__, str(error)))
                break
    return told


def server(rank, size, *, address):
    model = net()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    with weightbus.Subscriber(model, address=address, rank=rank, replica_size=size) as subscriber:
        subscriber.serve()
    moved = any(bool(tensor.any()) for tensor in model.state_dict().values())
    return subscriber.state, subscriber.version, moved


def drive(address, size, **arguments):
    trainers, servers = run_jobs(
        Job(run=trainer, size=size, arguments={"address": address, **arguments}),
        Job(run=server, arguments={"address": address}),
    )
    return trainers, servers[0]


@pytest.mark.parametrize(
    ("size", "odd", "name", "more"),
    [
        (2, 1, "1.running_mean", {}),
        (3, 1, "2.weight", {"route": "broadcast"}),
        (3, 0, "narrow", {"route": "peer"}),
        (3, 2, "0.weight", {"only": (1, 2)}),
        (2, 0, "2.bias", {"cast": True}),
    ],
    ids=["buffer", "broadcast", "peer", "two of three hold it", "cast"],
)
def test_one_bit_that_differs_from_the_start_is_refused(address, size, odd, name, more):
    trainers, (state, version, moved) = drive(address, size, odd=odd, name=name, when=1, **more)
    for told in trainers:
        ((kind, text),) = told
        assert kind == "UpdateError"
        assert f"{name}: trainer ranks hold different bytes" in text
        assert text.count("different bytes") == 1, "the others are equal"
        if size == 3 and not more.get("only"):
            assert f"trainer rank {odd}" in text.rsplit(";", 1)[1], "the one against two"
        assert "trainer rank" in text.split("digest", 1)[1]
    assert (state, version, moved) == ("empty", None, False)


@pytest.mark.parametrize("odd", [0, 1, 2])
@pytest.mark.parametrize("route", ["broadcast", "peer", "reshard"])
def test_drift_that_begins_later_is_not_committed(address, route, odd):
    """Of three holders, or of two, of which one sends and the other digests."""
    size = 3 if odd == 2 else 2
    trainers, (state, version, _) = drive(address, size, odd=odd, name="1.running_var", when=2, route=route)
    for told in trainers:
        word, (kind, text) = told
        assert word == "verified"
        assert kind == "TornError"
        first, *others = [line for line in text.splitlines() if "1.running_var" in line]
        assert "1.running_var: trainer ranks hold different bytes" in first
        if size == 3:
            assert "trainer rank 2" in first
            assert not others, "the server's are those of the two that are equal"
        else:
            assert "trainer rank 1" in first
            assert "on trainer rank 0" in first
            (other,) = others
            assert "replica 0 server rank 0" in other
            assert "has the same bytes" in other
            # Of the rank that has drifted, or of the other one, which holds what it held.
            assert "element 0 of [48]: nothing else differs" in other or "stale" in other
    assert (state, version) == ("torn", 1)


def test_equal_holders_are_verified(address):
    trainers, (state, version, _) = drive(address, 3, odd=-1, name="2.weight", when=0)
    assert trainers == [["verified"] * 3] * 3
    assert (state, version) == ("ready", 3)


def hsdp(rank, size, *, address, odd):
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    weight = distribute_tensor(torch.arange(60.0).view(10, 6), mesh, [Replicate(), Shard(0)])
    if rank == odd:
        flip(weight.to_local(), 5)
    with weightbus.Publisher([("w", weight)], address=address, join_timeout_s=30) as publisher:
        try:
            return publisher.update(1).word
        except UpdateError as error:
            return str(error)


def taker(rank, size, *, address):
    with weightbus.Subscriber(
        [("w", torch.zeros(10, 6))], address=address, rank=rank, replica_size=size
    ) as subscriber:
        subscriber.serve()


@pytest.mark.parametrize("odd", [-1, 3])
def test_shards_that_are_replicated(address, odd):
    trainers, _ = run_jobs(
        Job(run=hsdp, size=4, arguments={"address": address, "odd": odd}),
        Job(run=taker, arguments={"address": address}),
    )
    if odd < 0:
        assert trainers == ["verified"] * 4
    for text in trainers if odd >= 0 else ():
        assert "w: trainer ranks hold different bytes" in text
        assert "trainer rank 1" in text, "the other holder"
        assert "trainer rank 3" in text


# -- modules ---------------------------------------------------------------------------------------


def two(tied=False):
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    if tied:
        second.weight = first.weight
    return {"text.encoder": first, "text": second}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("module", ["text", "text.encoder"])
def test_a_check_digests_all_that_it_says(tied, module):
    """Keys with dots, one the beginning of the other, updated together and apart."""
    source, target = two(tied), two(tied)
    with weightbus.colocate(source, target) as pair:
        pair.update(1)
        with torch.no_grad():
            source[module].weight.add_(1)
        assert pair.update(2, modules=[module]).word == "verified"
        assert pair.check().word == "verified"
        for damaged in ("text", "text.encoder"):
            for tensor in (target[damaged].weight, target[damaged].bias):
                before = tensor.detach().clone()
                flip(tensor, 7)
                assert pair.check().word == "mismatch"
                tensor.data.copy_(before)
        assert pair.check().word == "verified"


def test_a_module_that_is_not_proved_is_said(address):
    source, target = two(tied=True), two(tied=True)
    with weightbus.colocate(source, target) as pair:
        pair.update(1)
        pair.update(2, modules=["text"], verify=False)
        verdict = pair.check()
        assert verdict.word == "partial"
        assert list(verdict.partial) == ["text"]


def test_nothing_to_digest_is_no_proof():
    pair = weightbus.colocate([("a", torch.zeros(0, 3))], [("a", torch.ones(0, 3))])
    with pair, pytest.raises((TornError, UpdateError), match="that proves nothing"):
        pair.update(1)


# -- decisions -------------------------------------------------------------------------------------


def test_sets_of_holders():
    def facts(**boxes):
        spec = Spec(name="w", dtype="float32", shape=(4, 2))
        return {name: Holding(spec=spec, boxes=(Box((row, 0), (2, 2)),)) for name, row in boxes.items()}

    found = replicated({0: facts(w=0), 1: facts(w=2), 2: facts(w=0), 3: facts(w=2)})
    assert found.sets == ((0, 2), (1, 3))
    assert found.set_of("w", Box((1, 0), (1, 2))) == 0
    assert found.set_of("w", Box((2, 1), (1, 1))) == 1
    assert found.set_of("v", Box((0, 0), (1, 1))) is None
    assert replicated({0: facts(w=0)}).sets == ()


MEMBERS = {
    "t0": m.Member(peer="t0", trainer=0, server=None),
    "t1": m.Member(peer="t1", trainer=1, server=None),
    "s0": m.Member(peer="s0", trainer=None, server=m.ServerId(replica=0, rank=0)),
    "s1": m.Member(peer="s1", trainer=None, server=m.ServerId(replica=0, rank=1)),
}
GOOD = {
    "t0": m.Done(
        peer="t0",
        sent=[m.Fold(job=0, group=g, sums=(g + 1, 5), nbytes=8, due=12) for g in (0, 1)],
        held=[m.HeldFold(holders=0, ranks=2, group=g, sums=(7, g), nbytes=4) for g in (0, 1)],
    ),
    "t1": m.Done(
        peer="t1",
        sent=[m.Fold(job=0, group=g, sums=(3, g), nbytes=4, due=12) for g in (0, 1)],
        held=[m.HeldFold(holders=0, ranks=2, group=g, sums=(7, g), nbytes=4) for g in (0, 1)],
    ),
    "s0": m.Done(peer="s0", live=[m.Fold(job=0, group=0, sums=(4, 5), nbytes=12, due=12)]),
    "s1": m.Done(peer="s1", live=[m.Fold(job=0, group=1, sums=(5, 6), nbytes=12, due=12)]),
}


def judged(dones):
    wrong, complaints = compare_folds(MEMBERS, dones, 1)
    differ, more = compare_held(MEMBERS, {peer: done.held for peer, done in dones.items()})
    return bool(wrong or complaints or differ or more)


@given(st.data())
def test_an_answer_that_is_changed_in_any_way_is_no_proof(data):
    """Dropped, repeated, shortened, or of other sums: each fold of each rank counts."""
    assert not judged(GOOD)
    peer = data.draw(st.sampled_from(sorted(GOOD)))
    field = data.draw(st.sampled_from([f for f in ("sent", "held", "live") if getattr(GOOD[peer], f)]))
    folds = list(getattr(GOOD[peer], field))
    place = data.draw(st.integers(0, len(folds) - 1))
    fold = folds[place]
    how = data.draw(st.sampled_from(["drop", "repeat", "sums", "nbytes", "group", "none"]))
    if how == "none":
        folds = []
    elif how == "drop":
        del folds[place]
    elif how == "repeat":
        folds.append(fold)
    elif how == "sums":
        lane = data.draw(st.integers(1, 2**60))
        folds[place] = type(fold)(
            **{**fields(fold), "sums": ((fold.sums[0] + lane) % (2**61 - 1), fold.sums[1])}
        )
    elif how == "nbytes":
        folds[place] = type(fold)(**{**fields(fold), "nbytes": data.draw(st.integers(0, fold.nbytes - 1))})
    else:
        folds[place] = type(fold)(**{**fields(fold), "group": fold.group + 2})
    changed = m.Done(
        peer=peer, **{f: getattr(GOOD[peer], f) for f in ("sent", "held", "live")} | {field: folds}
    )
    assert judged({**GOOD, peer: changed})


def fields(fold):
    return {name: getattr(fold, name) for name in fold.__struct_fields__}


def test_the_one_against_the_most_is_named():
    members = {f"t{r}": m.Member(peer=f"t{r}", trainer=r, server=None) for r in range(3)}
    sums = {0: (1, 1), 1: (2, 2), 2: (1, 1)}
    answers = {
        f"t{r}": m.Sums(peer=f"t{r}", held=[m.HeldSums(holders=0, group=0, sums={"a": (9, 9), "b": sums[r]})])
        for r in (2, 1, 0)
    }
    (failure,) = name_held(members, answers)
    assert (failure.tensor, failure.rank, failure.kind) == ("b", "trainer rank 1", "replicas differ")
    assert "on trainer rank 0" in failure.reason


def test_ranks_of_two_sets_are_not_compared_with_each_other():
    """Ranks 0 and 1 hold one half of a tensor, ranks 2 and 3 the other; one of each group's digests."""
    members = {f"t{r}": m.Member(peer=f"t{r}", trainer=r, server=None) for r in range(4)}

    def named(*digests):
        return name_held(
            members,
            {
                f"t{r}": m.Sums(
                    peer=f"t{r}", held=[m.HeldSums(holders=r // 2, group=g, sums={"w": (d, g)}) for g in (0, 1)]
                )
                for r, d in enumerate(digests)
            },
        )

    assert named(1, 1, 2, 2) == []
    (failure,) = named(1, 1, 2, 3)
    assert failure.rank == "trainer rank 3"
    assert "on trainer rank 2" in failure.reason
    assert [failure.rank for failure in named(1, 2, 3, 1)] == ["trainer rank 1", "trainer rank 3"]
