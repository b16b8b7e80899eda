"""Numbers of versions: a trainer that takes up a hub learns the last one, and goes on from there."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest
import torch
from processes import Job, run_jobs

import weightbus
from weightbus.control import messages as m
from weightbus.hub.coordinator import Coordinator


def trainer(rank, size, *, address, folder, turn, numbers, **options):
    """Its turn comes when those before it have left. What it knows at first, and what came of each update."""
    while len(list(Path(folder).glob(f"left-{turn - 1}-*"))) < (size if turn else 0):
        time.sleep(0.01)
    source = [("a", torch.zeros(300)), ("b", torch.zeros(8, 4))]
    with weightbus.Publisher(source, address=address, join_timeout_s=30, **options) as publisher:
        found = [publisher.version]
        for number in numbers:
            for _, tensor in source:
                tensor.fill_(turn + 1)
            try:
                report = publisher.update(number) if rank or number else publisher.update()
                assert report.version == publisher.version
                found.append((report.version, report.incarnation, report.word))
            except weightbus.UpdateError as error:
                found.append(str(error))
    Path(folder, f"left-{turn}-{rank}").touch()
    return found


def server(rank, size, *, address, folder, turns):
    target = {"a": torch.zeros(300), "b": torch.zeros(8, 4)}
    with weightbus.Subscriber(
        list(target.items()), address=address, rank=rank, replica_size=size
    ) as subscriber:
        while len(os.listdir(folder)) < 2 * turns:
            subscriber.poll(0.1)
        return subscriber.version, {v for t in target.values() for v in t.unique().tolist()}


def test_a_restarted_trainer_goes_on_from_the_last_version(address, tmp_path):
    turns = [
        {"numbers": [None, None, 7]},
        {"numbers": [None, 9]},
        {"numbers": [None, None, 41], "resume": 41},
        {"numbers": [3]},
    ]
    arguments = {"address": address, "folder": str(tmp_path)}
    *trained, served = run_jobs(
        *(Job(run=trainer, size=2, arguments={**arguments, "turn": i, **turn}) for i, turn in enumerate(turns)),
        Job(run=server, size=2, arguments={**arguments, "turns": len(turns)}),
        timeout_s=90,
    )
    for first, second, third, fourth in zip(*trained, strict=True):
        assert first == [None, (1, 1, "verified"), (2, 1, "verified"), (7, 1, "verified")]
        assert second == [7, (8, 2, "verified"), (9, 2, "verified")]
        assert third[:3] == [41, (42, 3, "verified"), (43, 3, "verified")]
        assert "version 41: expected one above 43" in third[3]
        assert fourth == [43, (3, 4, "verified")], "a number that is given is taken as it is"
    assert served == [(3, {4.0})] * 2


class Stop(BaseException):
    pass


def interrupted(rank, size, *, address):
    """What comes of updates after one that its caller has broken off in mid-transfer."""

    def stop(nbytes, of):
        if broken:
            broken.clear()
            raise Stop

    broken = [1]
    source = [("a", torch.ones(3000))]
    with weightbus.Publisher(source, address=address, progress=stop, join_timeout_s=30) as publisher:
        found = []
        with contextlib.suppress(Stop):
            publisher.update()
        assert not broken, "it was broken off"
        for _ in range(2):
            report = publisher.update()
            found.append((report.version, report.word))
    return found


def test_an_update_without_a_number_after_one_that_was_broken_off(address):
    """It is one call as any other: nothing is left of the former one that would be taken for it, or refused."""
    (found,), _ = run_jobs(
        Job(run=interrupted, arguments={"address": address}),
        Job(run=listener, arguments={"address": address}),
    )
    versions = [version for version, _ in found]
    assert [word for _, word in found] == ["verified"] * 2
    assert versions == [versions[0], versions[0] + 1]


def listener(rank, size, *, address):
    target = [("a", torch.zeros(3000))]
    with weightbus.Subscriber(target, address=address, rank=0, replica_size=1) as subscriber:
        subscriber.serve()


def test_a_resume_that_is_no_version():
    with pytest.raises(weightbus.SpecError, match="version: expected 0 <= version"):
        weightbus.Publisher([("a", torch.zeros(2))], address="tcp://127.0.0.1:1", resume=-1)


def test_a_resume_that_leaves_no_room_is_refused_and_a_number_below_it_is_not(address):
    last = m.MAX_COUNT
    trained, _ = run_jobs(
        Job(run=trainer_of_no_room, size=1, arguments={"address": address, "resume": last}),
        Job(run=listener, size=1, arguments={"address": address}),
        timeout_s=60,
    )
    refusal, word = trained[0]
    assert f"expected a last one below {last}" in refusal
    assert word == "verified"


def trainer_of_no_room(rank, size, *, address, resume):
    source = [("a", torch.ones(3000))]
    with weightbus.Publisher(source, address=address, join_timeout_s=30, resume=resume) as publisher:
        with pytest.raises(weightbus.UpdateError) as refused:
            publisher.update()
        return str(refused.value), publisher.update(5).word


def joined(hub, role, rank, size, **fields):
    hello = m.Hello(
        process=f"{role}{rank}", host="h", pid=1, device="cpu", role=role, rank=rank, size=size, **fields
    )
    peer = hub.roster.admit(hello, f"{role}{rank}", 0.0)
    hub.joined(peer, 0.0)
    return peer


def enter(hub, rank, **changes):
    fields = {
        "version": 0,
        "follows": True,
        "modules": None,
        "facts": "f",
        "settings": m.Settings(bucket_bytes=64),
        "min_replicas": 1,
    }
    times = {"join_s": 10.0, "ready_s": 5.0, "transfer_s": 20.0}
    peer = f"trainer{rank}"
    hub.enter(m.Enter(peer=peer, kind="update", verify=True, **{**fields, **times, **changes}), 0.0)


@pytest.mark.parametrize(("said", "known"), [(7, 7), (None, None), (1 << 61, None)])
def test_a_new_hub_knows_what_servers_say(said, known):
    """Its predecessor has gone with the trainer. Nobody ends all updates by a number that leaves no room."""
    hub = Coordinator(dead_after_s=10.0)
    joined(hub, "server", 0, 1).version = said
    joined(hub, "trainer", 0, 2)
    assert [message.version for _, message in hub.outbox if isinstance(message, m.Known)] == [known]
    joined(hub, "trainer", 1, 2)
    enter(hub, 0)
    hub.roster.peers["server0"].version = 20  # it does not matter what is heard between two ranks' calls
    enter(hub, 1)
    assert hub.round.enter.version == (known or 0) + 1
    assert not hub.round.failures


def test_ranks_that_go_on_from_others_versions_are_refused():
    hub = Coordinator(dead_after_s=10.0)
    joined(hub, "trainer", 0, 2)
    joined(hub, "trainer", 1, 2)
    enter(hub, 0, after=3)
    enter(hub, 1, after=4)
    assert "expected after 3, got 4" in hub.round.failures[0].reason


def test_a_call_that_nobody_waits_for_any_more_refuses_nobody():
    """Its only rank has left it, as one does that gives up a call; it comes again before servers are there."""
    hub = Coordinator(dead_after_s=10.0)
    joined(hub, "server", 0, 2)
    trainer = joined(hub, "trainer", 0, 1)
    enter(hub, 0)
    hub.roster.remove(trainer)
    hub.lost(trainer, "left", 0.0)
    joined(hub, "trainer", 0, 1)
    enter(hub, 0)
    assert hub.round.failures == []


def test_what_is_waited_for_is_said_more_and_more_rarely():
    hub = Coordinator(dead_after_s=1e9)
    joined(hub, "trainer", 0, 1)
    joined(hub, "server", 0, 2)
    enter(hub, 0, join_s=1000.0)
    waiting = m.Await(peer="server0", number=1, version=1, wait_s=900.0)
    waiting.stamp(hub.header())
    hub.answer(waiting, 0.0)
    hub.outbox.clear()
    told = []
    for now in range(200):
        hub.advance(float(now))
        told += [(now, peer, said.lines) for peer, said in hub.outbox if isinstance(said, m.Missing)]
        hub.outbox.clear()
    assert [(now, peer) for now, peer, _ in told] == [
        (now, peer) for now in (5, 15, 45, 135) for peer in ("trainer0", "server0")
    ]
    text = "replicas: expected 1 complete, got 0; replica 0 misses server ranks [1] of 2"
    assert all(lines == [text] for *_, lines in told)
