"""``publisher.check()``: damage to live weights is named, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from models import fill, make, values
from processes import Job, run_jobs

import weightbus


def trainer(rank, size, *, address):
    model = make("fsdp2", rank, size)
    with weightbus.Publisher(model, address=address, min_replicas=2, join_timeout_s=30) as publisher:
        verdicts = []
        for version in (1, 2, 3):
            fill(model, values(version))
            publisher.update(version)
            # The source moves on: the version's sums were kept.
            fill(model, values(100 + version))
            verdict = publisher.check()
            verdicts.append((verdict.word, [(m.tensor, m.rank) for m in verdict.mismatches], str(verdict)))
        return verdicts


def server(rank, size, *, address, replica):
    model = make("tp", rank, size)

    def damage(version):
        if version == 2 and (replica, rank) == (1, 1):
            model.big._local_tensor.view(torch.int32)[5, 7] ^= 1 << 3
        if version == 3 and rank == 0:
            model.mask.logical_not_()

    with weightbus.Subscriber(model, address=address, replica=replica, on_commit=damage) as subscriber:
        subscriber.serve()


def test_one_flipped_bit_is_named(address):
    jobs = [Job(run=server, size=2, arguments={"address": address, "replica": replica}) for replica in (0, 1)]
    trainers, *_ = run_jobs(Job(run=trainer, size=2, arguments={"address": address}), *jobs)
    for verdicts in trainers:
        (first, second, third) = verdicts
        assert first[:2] == ("verified", [])
        assert second[:2] == ("mismatch", [("big", "replica 1 server rank 1")])
        assert "big: expected digest grid61:" in second[2]
        assert third[0] == "mismatch"
        assert sorted(third[1]) == [("mask", "replica 0 server rank 0"), ("mask", "replica 1 server rank 0")]


# -- an update that is wrong at once ---------------------------------------------------------------


def small_trainer(rank, size, *, address, min_replicas=1):
    source = [("a", torch.zeros(64, 48)), ("b", torch.zeros(20))]
    found = []
    with weightbus.Publisher(
        source, address=address, min_replicas=min_replicas, join_timeout_s=30
    ) as publisher:
        for version in (1, 2, 3):
            for i, (_, tensor) in enumerate(source):
                tensor.copy_(
                    torch.arange(tensor.numel(), dtype=torch.float32).view(tensor.shape) * version + 1 + i
                )
            try:
                report = publisher.update(version)
                verdict = publisher.check()
                found.append((report.word, verdict))
            except weightbus.WeightbusError as error:
                found.append((type(error).__name__, str(error)))
    return found


def lying_server(rank, size, *, address):
    """A hook that does for real data, in version 2, what it does not do when it is traced."""
    calls = []
    a = torch.nn.Parameter(torch.zeros(64, 48))

    def load(param, loaded):
        param.data.copy_(loaded)
        calls.extend([] if loaded.is_meta else [1])
        if len(calls) == 2:
            param.data[9, 3:5] = 0.0

    a.weight_loader = load
    with weightbus.Subscriber([("a", a), ("b", torch.zeros(20))], address=address) as subscriber:
        subscriber.serve()
        return subscriber.state, a[9, 3].item()


def test_an_update_that_arrives_wrong_is_torn_with_the_place_and_the_next_one_mends(address):
    (found,), (served,) = run_jobs(
        Job(run=small_trainer, arguments={"address": address}),
        Job(run=lying_server, arguments={"address": address}),
    )
    assert found[0][0] == "verified"
    kind, text = found[1]
    assert kind == "TornError"
    assert "a: expected digest grid61:" in text
    assert "zeros: row 9, columns 3:5 of [64, 48]: its digest there is zero; 2 of its 2 elements differ" in text
    assert "b:" not in text
    assert (found[2][0], found[2][1].word) == ("verified", "verified")
    assert served == ("ready", (9 * 48 + 3) * 3 + 1.0)


def interleaved_server(rank, size, *, address):
    """``a`` in every other row of a parameter: a box for each row."""
    both = torch.nn.Parameter(torch.zeros(600, 4))
    both.weight_loader = lambda param, loaded, which: param.data[which::2].copy_(loaded)

    def committed(version):
        both.data[2 * 77, 1] += 1

    with weightbus.Subscriber(
        [("both", both)], address=address, name_map={"a": ("both", 0), "b": ("both", 1)}, on_commit=committed
    ) as subscriber:
        subscriber.serve()


def interleaved_trainer(rank, size, *, address):
    with weightbus.Publisher(
        [("a", torch.ones(300, 4)), ("b", torch.ones(300, 4))], address=address, join_timeout_s=30
    ) as publisher:
        return publisher.update(1).word, publisher.check()


def test_a_tensor_in_very_many_pieces_is_named_but_not_narrowed(address):
    ((found,), _) = run_jobs(
        Job(run=interleaved_trainer, arguments={"address": address}),
        Job(run=interleaved_server, arguments={"address": address}),
    )
    word, verdict = found
    assert word == "verified"
    ((name, where),) = [(m.tensor, m.where) for m in verdict.mismatches]
    assert (name, where) == ("a", "not narrowed, as it lies in 300 pieces")


# -- what no wire tensor's digest tells of ---------------------------------------------------------


def opaque_server(rank, size, *, address, replica, spoil, declare):
    """``a`` behind a hook that computes; ``c`` is the engine's own, ``d`` made of others."""
    a = torch.nn.Parameter(torch.zeros(64, 48))
    a.weight_loader = lambda param, loaded: param.data.copy_(loaded.neg().neg())
    target = [("a", a), ("b", torch.zeros(20)), ("c", torch.zeros(3)), ("d", torch.zeros(4, 4))]

    def committed(version):
        if spoil and version == 2 and replica == 1:
            a.data[5, 5] += 1

    with weightbus.Subscriber(
        target,
        address=address,
        replica=replica,
        local=["c", *(["a"] if declare else [])],
        derived=["d"],
        on_commit=committed,
    ) as subscriber:
        subscriber.serve()


@pytest.mark.parametrize(
    ("spoil", "declare"), [(False, False), (True, False), (True, True)], ids=["whole", "spoiled", "declared"]
)
def test_replicas_are_compared_where_the_trainer_cannot_say(address, spoil, declare):
    arguments = {"address": address, "spoil": spoil, "declare": declare}
    (found,), *_ = run_jobs(
        Job(run=small_trainer, arguments={"address": address, "min_replicas": 2}),
        *(Job(run=opaque_server, arguments={**arguments, "replica": replica}) for replica in (0, 1)),
    )
    differ = spoil and not declare
    assert [word for word, _ in found] == ["partial"] * 3
    assert [verdict.word for _, verdict in found] == ["partial", "mismatch" if differ else "partial", "partial"]
    verdict = found[1][1]
    assert verdict.exempt == {"c": "local", "d": "derived"}
    assert "2 names not fed in full: derived, local" in str(verdict)
    assert list(verdict.partial) == ["a"]
    assert 0 < verdict.digest_s <= verdict.seconds
    if differ:
        ranks = [f"replica {replica} server rank 0" for replica in (0, 1)]
        assert [(m.tensor, m.rank, m.kind) for m in verdict.mismatches] == [
            ("a", rank, "replicas differ") for rank in ranks
        ]
        assert f"on {ranks[1]} grid61:" in verdict.mismatches[0].reason
        assert "which is right is not known" in verdict.mismatches[0].reason


def both_ends(rank, size, *, address):
    """A process that is trainer rank and server rank is its own witness."""
    source, target = [("a", torch.arange(300.0).view(20, 15))], [("a", torch.zeros(20, 15))]
    publisher = weightbus.Publisher(source, address=address, join_timeout_s=30)
    subscriber = weightbus.Subscriber(target, address=address)
    publisher.update(1)
    verdicts = [publisher.check()]
    target[0][1][3, 4] = -1.0
    verdicts.append(publisher.check())
    source[0][1].zero_()
    verdicts.append(publisher.check())
    publisher.close()
    subscriber.close()
    return verdicts


def test_a_process_with_both_ends(address):
    ((verdicts,),) = run_jobs(Job(run=both_ends, arguments={"address": address}))
    whole, damaged, moved = verdicts
    assert (whole.word, whole.exempt) == ("verified", {})
    (mismatch,) = damaged.mismatches
    assert (mismatch.kind, mismatch.where) == ("element", "row 3, column 4 of [20, 15]: nothing else differs")
    assert mismatch.rank == "trainer rank 0 and replica 0 server rank 0"
    (mismatch,) = moved.mismatches
    assert mismatch.where == "not narrowed: the source has moved on, and no replica has the right bytes"


def trainer_of_two_versions(rank, size, *, address):
    with weightbus.Publisher(
        [("a", torch.ones(8))], address=address, rank=rank, size=size, join_timeout_s=30
    ) as publisher:
        publisher.update(1)
        publisher.version = 1 + rank
        with pytest.raises(weightbus.UpdateError) as caught:
            publisher.check()
        publisher.version = 1
        return str(caught.value), publisher.check().word


def server_of_one(rank, size, *, address):
    with weightbus.Subscriber([("a", torch.zeros(8))], address=address) as subscriber:
        subscriber.serve()


def test_trainer_ranks_that_call_otherwise_are_no_mismatch(address):
    """Nothing was compared: it is no verdict about the servers."""
    *trainers, _ = run_jobs(
        Job(run=trainer_of_two_versions, size=2, arguments={"address": address}),
        Job(run=server_of_one, arguments={"address": address}),
    )
    for text, word in trainers[0]:
        assert "as on the first rank that called" in text
        assert word == "verified"
