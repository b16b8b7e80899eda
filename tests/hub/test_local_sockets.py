"""Ranks of the hub's host talk to it by a Unix socket that the hub has connected to (hub/local_sockets.py)."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time

import pytest

from weightbus.control import keys as key_files
from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.control.keys import load_keys
from weightbus.control.link import HubLost, Link
from weightbus.control.local_socket import LocalListener, connect
from weightbus.errors import ProtocolError
from weightbus.hub.server import Hub

LIMITS = {"max_frames": 4, "max_bytes": 1 << 20}


@contextlib.contextmanager
def serving(address, keys=None):
    hub = Hub(address, keys=keys)
    thread = threading.Thread(target=hub.serve)
    thread.start()
    try:
        yield hub
    finally:
        hub.stop()
        thread.join(10)


@pytest.fixture
def hub(address):
    with serving(address) as hub:
        yield hub


@contextlib.contextmanager
def joined(address, replica=0, keys=None):
    link = Link(address, keys)
    try:
        link.join(role="server", rank=0, size=1, replica=replica, device="cpu", timeout_s=10)
        yield link
    finally:
        link.close()


def local_of(link):
    return link._connection._local


def listening():
    """Unix sockets of this process that can be connected to."""
    mine = set()
    for one in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            mine.add(os.readlink(f"/proc/self/fd/{one}"))
    with open("/proc/net/unix") as lines:
        table = [line.split() for line in lines][1:]
    return {row[-1] for row in table if int(row[3], 16) & 0x10000 and f"socket:[{row[6]}]" in mine}


def long_offer(nbytes):
    frames = [m.Frame(place=0, module=None, nbytes=nbytes)]
    return m.TaskOffer(
        update=1, task=m.LoadTask(), members=[], run_s=1.0, frames=frames, payloads=[bytes(nbytes)]
    )


def test_a_rank_goes_by_it_from_its_welcome_on(hub, address):
    with joined(address) as link:
        assert local_of(link) is not None
        assert link._connection._listener is None
        hub.coordinator.outbox.append((link.peer, long_offer(3)))
        offer = link.receive(5)
        assert isinstance(offer, m.TaskOffer)
        link.send(m.Facts(peer=link.peer, blob=bytes(1 << 20)))  # in pieces
        deadline = time.monotonic() + 5
        while hub.counts["stale"] + hub.counts["late"] == 0:
            assert time.monotonic() < deadline
            link.receive(0.01)
        # Another role of the same process goes the same way.
        link.join(role="trainer", rank=0, size=1, replica=0, device="cpu", timeout_s=10)
        assert len(hub._local) == 1
    deadline = time.monotonic() + 5
    while len(hub._local):
        assert time.monotonic() < deadline


def test_a_rank_that_only_looks_gets_a_long_message_soon(hub, address):
    """An engine polls without waiting."""
    with joined(address) as link:
        hub.coordinator.outbox.append((link.peer, long_offer(16 << 20)))
        found, deadline = None, time.monotonic() + 20
        while found is None:
            assert time.monotonic() < deadline
            found = link.receive(0)
        assert isinstance(found, m.TaskOffer)


def test_the_hub_has_no_door_of_that_kind(hub, address):
    """It listens by ZeroMQ alone; and a rank only while it joins."""
    before = listening()
    with joined(address) as link:
        assert local_of(link) is not None
        assert listening() == before == set()
        with contextlib.closing(LocalListener()) as listener:
            assert listening() == {f"@{listener.name}"}


def test_who_has_read_the_name_is_not_taken_for_the_hub(hub, address, monkeypatch):
    """Any process of the host may connect to it before the hub does."""
    intruders = []
    forged = wire.encode(m.Alive(peer="guessed", hub=hub.token, known=True))

    class Watched(LocalListener):
        def __init__(self):
            super().__init__()
            for said in (None, [b"\xff"] * 9, [b"rubbish", b""], forged):
                intruders.append(connect(self.name, **LIMITS))
                if said:
                    intruders[-1].send(said)

    monkeypatch.setattr("weightbus.control.connection.LocalListener", Watched)
    with joined(address) as link:
        assert len(intruders) == 4
        assert local_of(link) is not None
        for one in intruders:
            with contextlib.suppress(OSError):
                one.send(wire.encode(long_offer(3)))
            one.close()
        assert link.receive(0.3) is None
        hub.coordinator.outbox.append((link.peer, long_offer(3)))
        assert isinstance(link.receive(5), m.TaskOffer)


def test_the_hub_connects_for_members_only_and_to_such_names_only(hub, address):
    """It is no way to have the hub talk to another service, nor to have it hold descriptors."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as service:
        service.bind("\0weightbus-test-service")
        service.listen()
        service.settimeout(0.5)
        link = Link(address)
        connection = link._connection
        for name in ("weightbus-test-service", "a/b", "weightbus-" + "0" * 31):
            connection.send(m.Beat(peer="nobody", local_socket=name))
            answer = connection.receive(5)
            assert isinstance(answer, m.Refused)
            assert "local_socket" in answer.reason
        connection.send(m.Beat(peer="nobody", local_socket="weightbus-" + "0" * 32))
        assert isinstance(connection.receive(5), m.Alive)
        with pytest.raises(TimeoutError):
            service.accept()
        assert len(hub._local) == 0
        link.close()


def test_where_the_hub_can_not_connect_a_rank_goes_by_zeromq(hub, address, monkeypatch):
    monkeypatch.setattr("weightbus.hub.local_sockets.connect", lambda *_, **__: None)
    with joined(address) as link:
        assert local_of(link) is None
        assert link._connection._listener is None
        hub.coordinator.outbox.append((link.peer, long_offer(3)))
        assert isinstance(link.receive(5), m.TaskOffer)


def test_a_connection_that_the_hub_ends_is_no_loss(hub, address):
    """The rank goes on by ZeroMQ: nothing that it says afterwards is lost."""
    with joined(address) as link:
        hub._local._by_identity[hub.members.identities[link.peer]].socket._socket.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + 5
        while local_of(link) is not None:
            assert time.monotonic() < deadline
            link.receive(0)
        link.send(m.Facts(peer=link.peer, blob=b"x"))
        while hub.counts["stale"] + hub.counts["late"] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_new_hub_connects_again(address):
    with serving(address):
        link = Link(address)
        link.join(role="server", rank=0, size=1, replica=0, device="cpu", timeout_s=10)
        assert local_of(link) is not None
    with pytest.raises(HubLost):
        link.receive(20)
    assert local_of(link) is None
    with serving(address):
        assert link.rejoin(10)
        assert local_of(link) is not None
        assert link.receive(0) is None
        link.close()


def test_a_rank_that_was_dropped_joins_again_at_once(hub, address):
    """By ZeroMQ: what it would say by the former socket might be lost when the hub closes that."""
    with joined(address) as link:
        former = local_of(link)
        (job,) = hub.jobs
        hub._contained(hub.members.drop, job, job.coordinator.roster.peers[link.peer], "a test's doing", 0.0)
        with pytest.raises(HubLost):
            link.receive(5)
        begun = time.monotonic()
        assert link.rejoin(10)
        assert time.monotonic() - begun < 2.5
        assert local_of(link) is not former
        hub.coordinator.outbox.append((link.peer, long_offer(3)))
        assert isinstance(link.receive(5), m.TaskOffer)


def test_a_key_that_is_retired_is_good_for_nothing_here_either(tmp_path, address, monkeypatch):
    key_files.generate(tmp_path / "keys")
    keys = load_keys(tmp_path / "keys")
    with serving(address, keys) as hub, joined(address, keys=keys) as link:
        assert local_of(link) is not None
        assert hub._local._by_identity[hub.members.identities[link.peer]].user in keys.allowed
        monkeypatch.setattr(hub._listener.auth, "role", lambda user: None)
        link.send(m.Facts(peer=link.peer, blob=b"x"))
        with pytest.raises(ProtocolError, match="key was retired"):
            link.receive(5)
        assert hub.counts["not_allowed"] > 0


def test_a_role_allows_the_same_here(tmp_path, address, monkeypatch):
    key_files.generate(tmp_path / "keys")
    keys = load_keys(tmp_path / "keys")
    with serving(address, keys) as hub, joined(address, keys=keys) as link:
        monkeypatch.setattr(hub._listener.auth, "role", lambda user: "server")
        link.send(m.AskTask(id="i", hub=hub.token, task=m.LoadTask(), wait_s=1.0, run_s=1.0))
        with pytest.raises(ProtocolError, match="not allowed with a server's key"):
            link.receive(5)
