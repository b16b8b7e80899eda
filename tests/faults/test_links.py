"""A data link that is cut, while the hub is heard: it is named by both ends, and its replica left out."""

from __future__ import annotations

import errno
import socket
import time
from dataclasses import replace

import pytest
import torch
from namespaces import second_link, two_hosts, why_not
from processes import Job, free_port, run_jobs

import weightbus
from weightbus.control import messages as m
from weightbus.routes import reach
from weightbus.routes.reach import unreached

SHAPE = (512, 1024)
TRANSFER_S = 4.0
ROUNDS = 40


def trainer(rank, size, *, address, hosts, links, cut):
    """(replicas, left out, seconds) of each update until both replicas have one again.

    cut: before the first update, which needs both and makes the group, or before the second.
    """
    hosts[0].enter()
    here, there = links
    source, seen = torch.zeros(SHAPE), []
    with weightbus.Publisher(
        [("w", source)], address=address, insecure=True, join_timeout_s=60, ready_timeout_s=5,
        transfer_timeout_s=TRANSFER_S, dead_after_s=2.0, route="broadcast", catch_up=False,
    ) as publisher:  # fmt: skip
        terms = publisher._terms
        publisher._terms = replace(terms, min_replicas=2)  # both are there at first
        for version in range(1, ROUNDS):
            if version == cut:
                here.lose(there)
            source.fill_(version)
            begun = time.monotonic()
            try:
                report = publisher.update(version)
            except weightbus.TornError as error:
                seen.append(((), {1: str(error)}, time.monotonic() - begun))
            else:
                seen.append((report.replicas, dict(report.left_out), time.monotonic() - begun))
            publisher._terms = terms
            if version == cut:
                here.find(there)
            if version > cut and seen[-1][0] == (0, 1):
                return seen
            time.sleep(0.5)
    return seen


def server(rank, size, *, address, host, replica):
    """State, version, values."""
    host.enter()
    target = torch.zeros(SHAPE)
    with weightbus.Subscriber([("w", target)], address=address, insecure=True, replica=replica) as subscriber:
        while not subscriber.left:
            subscriber.poll(0.05)
        return subscriber.state, subscriber.version, target.unique().tolist()


@pytest.mark.parametrize("cut", [1, 2])
def test_the_replica_behind_it_is_left_out_and_comes_back(cut):
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts() as hosts:
        links = second_link(*hosts)
        address = f"tcp://{hosts[0].address}:{free_port()}"
        names = [{"GLOO_SOCKET_IFNAME": link.interface} for link in links]
        common = {"address": address}
        (seen,), *served = run_jobs(
            Job(run=trainer, arguments={**common, "hosts": hosts, "links": links, "cut": cut}, env=names[0]),
            Job(run=server, arguments={**common, "host": hosts[0], "replica": 0}, env=names[0]),
            Job(run=server, arguments={**common, "host": hosts[1], "replica": 1}, env=names[1]),
            timeout_s=90,
        )
    replicas, left_out, seconds = seen[cut - 1]
    assert replicas == ((0,) if cut == 2 else ()), "as long as min_replicas are left"
    assert "no data connection with trainer rank 0" in left_out[1]
    assert seconds < TRANSFER_S + m.REACH_S + 8.0
    assert seen[-1][0] == (0, 1)
    assert [state for ((state, *_),) in served] == ["ready"] * 2
    assert [values for ((*_, values),) in served] == [[float(len(seen))]] * 2


def test_who_refuses_a_connection_is_reached():
    with socket.socket() as listening, socket.socket() as closed:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        closed.bind(("127.0.0.1", 0))
        begun = time.monotonic()
        assert unreached({0: listening.getsockname(), 1: closed.getsockname()}) == []
        assert time.monotonic() - begun < m.REACH_S / 2


def test_where_nothing_can_be_tried_nobody_is_named(monkeypatch):
    def no_more(*arguments):
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(reach.socket, "socket", no_more)
    assert unreached({0: ("127.0.0.1", 9)}) == []


def test_who_does_not_answer_is_not_reached():
    """A listener whose queue is full drops what comes."""
    with socket.socket() as full, socket.socket() as one, socket.socket() as two:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for other in (one, two):
            other.setblocking(False)
            other.connect_ex(full.getsockname())
        begun = time.monotonic()
        assert unreached({3: full.getsockname()}) == [3]
        assert m.REACH_S <= time.monotonic() - begun < m.REACH_S + 1.0
    assert unreached({}) == []
