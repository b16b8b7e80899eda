"""The Unix socket between the hub and ranks of its host (weightbus/local.py)."""

import contextlib
import os
import resource
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
import zmq

from weightbus import asks as a
from weightbus import local, wire
from weightbus import messages as m
from weightbus.errors import ProtocolError
from weightbus.hub import Hub
from weightbus.link import MAX_BYTES, HubLost, Link
from weightbus.local import LocalServer, connect

LIMITS = {"max_frames": 4, "max_bytes": 4 << 20}


@pytest.fixture
def server():
    server = LocalServer(**LIMITS, max_unsent=3)
    yield server
    server.close_all()


@pytest.fixture
def reach(server):
    """Connects to the server, with these limits; all connections are closed in the end."""
    ends = []

    def reach(**limits):
        ends.append(connect(server.name, **LIMITS | limits))
        return ends[-1]

    yield reach
    for end in ends:
        end.close()


def take(server, count, timeout_s=5.0):
    """What the server receives, until it is ``count``."""
    found, deadline = [], time.monotonic() + timeout_s
    while len(found) < count:
        assert time.monotonic() < deadline, found
        found += server.receive()
    return found


def take_messages(end, count, timeout_s=5.0):
    found, deadline = [], time.monotonic() + timeout_s
    while len(found) < count:
        assert time.monotonic() < deadline
        found += end.receive()
    return found


def test_messages_of_any_length_come_whole_and_in_order(server, reach):
    end = reach()
    sent = [[b"a"], [b"", b"b" * 5], [os.urandom(3 << 20), b"c"], []]
    for frames in sent:
        end.send(frames)
    found = []
    while len(found) < len(sent):  # what is too long for the kernel is sent as it is read
        end.flush()
        found += server.receive()
    assert [frames for _, frames in found] == sent
    (identity,) = {identity for identity, _ in found}
    assert server.send(identity, sent[2])
    answers = []
    while not answers:
        list(server.receive())  # flushes
        answers = end.receive()
    assert answers == [sent[2]]
    end.close()


def test_the_end_of_a_connection_is_told_once(server, reach):
    end = reach()
    end.send([b"last"])
    end.close()
    (one, frames), (two, nothing) = take(server, 2)
    assert (one, frames, nothing) == (two, [b"last"], None)
    assert one not in server
    assert list(server.receive()) == []


def test_a_message_beyond_the_limits_ends_the_connection(server, reach):
    for head in (struct.pack("<I", 5), struct.pack("<II", 1, (4 << 20) + 1), b"\xff" * 64):
        end = reach()
        end._socket.send(head)
        ((_, frames),) = take(server, 1)
        assert frames is None
        with pytest.raises(ConnectionError):
            take_messages(end, 1)


def test_a_rank_refuses_a_message_beyond_its_limits(server, reach):
    end = reach(max_bytes=10)
    end.send([b"x"])
    ((identity, _),) = take(server, 1)
    server.send(identity, [b"x" * 11])
    with pytest.raises(ProtocolError, match="expected at most 10 bytes, got 11"):
        take_messages(end, 1)


def test_who_does_not_read_is_told_apart(server, reach):
    end = reach()
    end.send([b"x"])
    ((identity, _),) = take(server, 1)
    answers = [server.send(identity, [b"y" * (1 << 20)]) for _ in range(8)]
    assert answers == [True] * 3 + [False] * 5
    # Two read, and there is room for two: what counts is what is still unread.
    found = []
    while len(found) < 2:
        list(server.receive())  # flushes
        found += end.receive()
    answers = [server.send(identity, [b"y" * (1 << 20)]) for _ in range(3)]
    assert answers == [True, True, False]
    end.close()


def test_strangers_are_few_and_do_not_stay(server, reach, monkeypatch):
    ends = [reach() for _ in range(local.MAX_STRANGERS + 1)]
    for _ in ends:
        list(server.receive())
    with pytest.raises(ConnectionError):
        take_messages(ends[0], 1)
    assert ends[1].receive() == []
    ends[1].send([b"x"])
    ((identity, _),) = take(server, 1)
    server.admit(identity)
    monkeypatch.setattr(local, "STRANGER_S", -1.0)
    server.expire()
    assert ends[1].receive() == []
    with pytest.raises(ConnectionError):
        take_messages(ends[2], 1)


def test_what_was_said_before_the_end_is_heard(server, reach):
    """Also by one that has not read all it was sent."""
    end = reach()
    end.send([b"x"])
    ((identity, _),) = take(server, 1)
    server.send(identity, [bytes(4 << 20)])
    end.send([b"last"])
    end.close()
    assert [frames for _, frames in take(server, 2)] == [[b"last"], None]


def test_who_reads_no_more_keeps_nobody_busy(server, reach):
    end = reach()
    end.send([b"x"])
    ((identity, _),) = take(server, 1)
    server.send(identity, [bytes(4 << 20)])
    end._socket.shutdown(socket.SHUT_RD)
    assert list(server.receive()) == []
    assert select.select([server], [], [], 0)[0] == []
    end.send([b"y"])
    assert take(server, 1) == [(identity, [b"y"])]


def test_nothing_is_heard_behind_what_a_connection_was_closed_for(server, reach):
    end = reach()
    end._socket.send(struct.pack("<IIs", 1, 1, b"x") * 3)
    heard, deadline = [], time.monotonic() + 5
    while not heard:
        assert time.monotonic() < deadline
        for identity, frames in server.receive():
            heard.append(frames)
            server.close(identity)
    assert heard == [[b"x"]]


def test_a_long_message_is_written_in_parts(reach):
    """While one rank reads as fast as it is written to, the others wait for one part only."""
    end, written = reach(), []

    class Greedy:
        def send(self, data):
            written.append(len(data))
            return min(len(data), 1000)

    end._socket, kept = Greedy(), end._socket
    end.send([bytes(1 << 20)])
    assert len(written) <= 64
    while not end.flush():
        assert end.unsent == 1
    assert end.unsent == 0
    assert len(written) > 1000
    end._socket = kept


def test_a_look_at_a_part_does_not_cost_its_number_of_frames(server, reach):
    end = reach(max_frames=1 << 20)
    end.send([b"x"])
    ((identity, _),) = take(server, 1)
    frames = [b"12345"] * 400_000
    assert server.send(identity, frames)
    begun, found = time.process_time(), []
    while not found:
        list(server.receive())
        found = end.receive()
    assert found == [frames]
    assert time.process_time() - begun < 5


def test_too_many_open_files_keep_nobody_busy(server):
    """A connection that can't be accepted is not reported again and again."""
    with contextlib.ExitStack() as opened:
        late = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        late.connect(f"\0{server.name}")
        assert select.select([server], [], [], 5)[0]
        assert list(server.receive()) == []
        assert select.select([server], [], [], 0)[0] == []
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        server.expire()
        late.send(struct.pack("<IIs", 1, 1, b"x"))
        assert [frames for _, frames in take(server, 1)] == [[b"x"]]


def test_a_hub_that_accepts_nobody_makes_nobody_wait(server):
    """One that was stopped, say: a rank that joins meanwhile goes by ZeroMQ."""
    ends = [connect(server.name, **LIMITS) for _ in range(200)]
    assert None in ends
    for end in filter(None, ends):
        end.close()


def test_without_epoll_there_is_none(monkeypatch):
    monkeypatch.delattr(select, "epoll")
    server = LocalServer(**LIMITS, max_unsent=3)
    assert server.name == ""
    assert list(server.receive()) == []
    server.expire()
    server.close_all()


# -- hub and rank ----------------------------------------------------------------------------------


@pytest.fixture
def hub(address):
    hub = Hub(address)
    thread = threading.Thread(target=hub.serve)
    thread.start()
    yield hub
    hub.stop()
    thread.join(10)


@pytest.fixture
def link(hub, address):
    link = Link(address)
    link.join(role="server", rank=0, size=1, replica=0, device="cpu", timeout_s=10)
    assert link._local is not None
    yield link
    link.close()


def test_a_stranger_is_heard_only_as_a_member(hub, link):
    """No key was asked for on this way: it joins no rank, asks for nothing, and is closed at its first word."""
    hello = m.Hello(process="p", host="h", pid=1, device="cpu", role="server", rank=0, size=1, replica=1)
    pause = a.AskPause(id="i", hub=hub.token, for_s=60.0)
    beats = [m.Beat(peer=link.peer), m.Beat(peer="p" * 32)]  # it has its socket; there is none
    for message in (hello, pause, a.AskStatus(id="i"), *beats):
        stranger = connect(hub._local.name, max_frames=4, max_bytes=1 << 20)
        stranger.send(wire.encode(message))
        with contextlib.suppress(OSError):
            stranger.send(wire.encode(pause))
        (answer,) = map(wire.decode_from_hub, take_messages(stranger, 1))
        assert answer.reason == f"local: expected a beat of a member first, got {type(message).__name__}"
        with pytest.raises(ConnectionError):
            take_messages(stranger, 1)
        stranger.close()
    assert hub.coordinator.paused_until == 0.0
    assert len(hub.coordinator.roster.peers) == 1
    link.send(m.Facts(peer=link.peer, update=1, blob=b""))
    assert link.receive(0.2) is None


def test_no_zeromq_client_is_taken_for_a_rank(hub, link, address):
    """Its messages would be answered there, and a refusal ends a rank."""
    (identity,) = hub._local._sockets
    context = zmq.Context()
    for name in (b"local 1", b"1", b"\x01"):
        client = context.socket(zmq.DEALER)
        client.linger = 0
        client.setsockopt(zmq.ROUTING_ID, name)
        client.connect(address)
        client.send_multipart([b"rubbish", b""])
        assert client.poll(5000)
        client.close()
    context.term()
    assert len(identity) == 16
    assert link.receive(0.2) is None


def long_offer(nbytes):
    frames = [m.Frame(place=0, module=None, nbytes=nbytes)]
    return m.TaskOffer(
        update=1, task=m.LoadTask(), members=[], run_s=1.0, frames=frames, payloads=[bytes(nbytes)]
    )


def test_a_rank_that_only_looks_gets_a_long_message_soon(hub, link):
    """An engine polls without waiting; what it finds begun it takes in one go."""
    hub.coordinator.outbox.append((link.peer, long_offer(16 << 20)))
    looks, found = 0, None
    while found is None and looks < 100:
        found = link.receive(0)
        looks += 1
        time.sleep(0.02)
    assert isinstance(found, m.TaskOffer)
    assert looks < 50


def test_a_rank_with_many_open_files_sends_long_messages(hub, address):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
        for _ in range(1100):
            opened.enter_context(open(os.devnull))
        link = Link(address)
        opened.callback(link.close)
        link.join(role="server", rank=0, size=1, replica=0, device="cpu", timeout_s=10)
        assert link._local.fileno() > 1024
        link.send(m.Facts(peer=link.peer, update=1, blob=bytes(16 << 20)))


def test_a_look_does_not_wait_for_a_hub_that_has_gone(address):
    """Until another has answered the beats, there is none to join again."""
    hub = Hub(address)
    thread = threading.Thread(target=hub.serve)
    thread.start()
    link = Link(address)
    link.join(role="server", rank=0, size=1, replica=0, device="cpu", timeout_s=10)
    hub.stop()
    thread.join(10)
    with pytest.raises(HubLost, match="closed the connection"):
        link.receive(5)
    begun = time.monotonic()
    assert not link.rejoin(0)
    assert time.monotonic() - begun < 0.5
    hub = Hub(address)
    thread = threading.Thread(target=hub.serve)
    thread.start()
    assert link.rejoin(10)
    assert link.receive(0) is None
    link.close()
    hub.stop()
    thread.join(10)


FORKS = """
import os, sys, time
from weightbus.local import connect
end = connect(sys.argv[1], max_frames=4, max_bytes=100)
end.send([b"x"])
if not os.fork():
    end.close()
    time.sleep(60)
time.sleep(0.5)
end.send([b"y"])
os._exit(0)
"""


def test_a_forked_process_does_not_hold_the_connection(server):
    """Nor does it end it."""
    rank = subprocess.Popen([sys.executable, "-c", FORKS, server.name], start_new_session=True)
    try:
        assert [frames for _, frames in take(server, 3, timeout_s=20)] == [[b"x"], [b"y"], None]
    finally:
        rank.wait(10)
        os.killpg(rank.pid, signal.SIGKILL)


def test_nobody_listens():
    assert connect(f"weightbus-{secrets.token_hex(16)}", **LIMITS) is None


def test_a_length_has_room_for_the_longest_message():
    assert m.MAX_FRAME_BYTES < MAX_BYTES < 1 << 32
