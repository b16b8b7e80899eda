"""``publisher.check()``: damage to live weights is named, and nothing else is."""

from __future__ import annotations

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
