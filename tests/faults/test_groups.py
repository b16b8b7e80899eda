"""Process groups of ranks that die or stop: who makes one, or is in one, waits for the hub, not for torch."""

from __future__ import annotations

import os
import signal
import struct
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from processes import Job, run_jobs

import weightbus
from weightbus.routes import torch_group
from weightbus.routes.group import Group
from weightbus.routes.waves import Waves
from weightbus.session import context

WAVES = 40
TRANSFER_S = 40.0


def tensors(value):
    return {f"a{i:02}": torch.full((64, 1024), float(value)) for i in range(WAVES)}


def trainer(rank, size, *, address, updates, route):
    """Word and seconds of each update."""
    source, seen = tensors(0), []
    options = {"bucket_bytes": 128 << 10, "route": route, "transfer_timeout_s": TRANSFER_S}
    with weightbus.Publisher(
        list(source.items()), address=address, min_replicas=2, dead_after_s=2.0, join_timeout_s=60, **options
    ) as publisher:
        for version in range(1, updates + 1):
            for tensor in source.values():
                tensor.fill_(version)
            begun = time.monotonic()
            try:
                word = publisher.update(version).word
            except weightbus.WeightbusError as error:
                word = str(error)
            seen.append((word, time.monotonic() - begun))
            publisher._terms = replace(publisher._terms, min_replicas=1)
    return seen


def server(rank, size, *, address, replica, fault=None, at=None):
    """Longest poll, state and values.

    fault: a signal for itself, as wave ``at`` of its second update is started, or while its group is made.
    """
    if fault is not None and at is None:
        context.Group = lambda *a, **k: os.kill(os.getpid(), fault)
    elif fault is not None:
        started = []
        old = Waves._start

        def start(self, index, wave, seed):
            started.append(index)
            if index == at and started.count(index) == 2:
                os.kill(os.getpid(), fault)
            return old(self, index, wave, seed)

        Waves._start = start
    target, longest = tensors(-1), 0.0
    with weightbus.Subscriber(list(target.items()), address=address, replica=replica) as subscriber:
        while not subscriber.left:
            begun = time.monotonic()
            subscriber.poll(0.1)
            longest = max(longest, time.monotonic() - begun)
        values = {value for tensor in target.values() for value in tensor.unique().tolist()}
        return longest, subscriber.state, values


def run_with(address, fault, at, updates, route="broadcast"):
    ends = {"fails": 1} if fault == signal.SIGKILL else {"never_ends": True}
    return run_jobs(
        Job(run=trainer, size=2, arguments={"address": address, "updates": updates, "route": route}),
        Job(run=server, arguments={"address": address, "replica": 0}),
        Job(run=server, arguments={"address": address, "replica": 1, "fault": fault, "at": at}, **ends),
        timeout_s=100,
    )[:2]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_death_while_the_group_forms(address, fault):
    trained, ((longest, state, values),) = run_with(address, fault, None, 2)
    for (first, seconds), (second, _) in trained:
        assert "replica 1 server rank 0" in first
        assert "died" in first
        assert seconds < 15  # of 40: the hub knows after 2 s at most
        assert second == "verified"
    assert longest < 15
    assert (state, values) == ("ready", {2.0})


@pytest.mark.parametrize(
    ("route", "at"), [("broadcast", 5), ("broadcast", 20), ("broadcast", 33), ("reshard", 1), ("reshard", 4)]
)
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_death_between_two_waves(address, fault, route, at):
    """And nothing of the group that was given up arrives later."""
    trained, ((longest, state, values),) = run_with(address, fault, at, 3, route)
    for seen in trained:
        assert [word for word, _ in seen] == ["verified"] * 3  # without it, in the same call
        assert seen[1][1] < 15
    assert longest < 15
    assert (state, values) == ("ready", {3.0})


def _told(name, ip):
    """As gloo's ranks say it: name and address, each behind its length; then numbers of its own."""
    address = torch_group._sockaddr((ip, 258, 0, 0)).ljust(136, b"\0")
    return struct.pack("=Q", len(name)) + name.encode() + struct.pack("=Q", len(address)) + address + bytes(32)


class Slow:
    """A backend whose end waits for an operation's timeout."""

    def abort(self):
        time.sleep(3.0)


@pytest.mark.parametrize("open_s", [0.0, 0.8])
def test_a_group_that_is_given_up_is_not_waited_for_once_nothing_can_arrive(monkeypatch, open_s):
    begun = time.monotonic()
    monkeypatch.setattr(torch_group, "cut", lambda addresses: int(time.monotonic() < begun + open_s))
    closed = []
    one = Group.__new__(Group)
    one.device, one._backend = torch.device("cpu"), Slow()
    one._store = SimpleNamespace(values={"0": b""}, close=lambda: closed.append(True))
    one.close(abort=True)
    assert open_s <= time.monotonic() - begun < open_s + 1.0
    assert closed == [True]
    assert one._backend is None


def test_where_a_rank_listens_is_read_from_what_it_tells():
    told = _told("vm", "127.0.0.1")
    assert torch_group.told_address(told) == ("127.0.0.1", 258)
    assert torch_group.told_address(_told("a.longer.name", "::1")) == ("::1", 258)
    for cut in range(22):
        assert torch_group.told_address(told[:cut]) is None
    assert torch_group.told_address(b"\xff" * 200) is None
    assert torch_group.told_address(bytes(200)) is None


def test_addresses_are_found_as_gloo_tells_them():
    told = torch_group._sockaddr(("127.0.0.1", 258))
    assert told == b"\x02\x00\x01\x02\x7f\x00\x00\x01"
    assert torch_group._sockaddr(("::1%lo", 258, 0, 0)) == b"\x0a\x00\x01\x02" + bytes(4) + bytes(15) + b"\x01"
    with pytest.raises(OSError, match="not an IP address"):
        torch_group._sockaddr("/run/a")
    assert torch_group.cut([]) == 0
