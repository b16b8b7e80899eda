"""Floods: what strangers' connections cost the hub in memory and descriptors, and that none ends it."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import raw_sockets
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import start_python
from seeded import seeded
from served import FULL, served, tcp
from simulated import Crowd
from test_hub import PAYLOADS, crowd, stage, update  # noqa: F401

import weightbus
from weightbus.control import client_messages as a
from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.hub import flood_guard as guard
from weightbus.hub.flood_guard import Guard
from weightbus.hub.turns import MAX_ANSWERS_PER_S

# -- descriptors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spoken", [False, True])
def test_idle_connections_leave_descriptors_for_others(address, spoken):
    """More connections than a hub may have descriptors: whoever comes and speaks is answered."""
    limits = (256, 256)
    hub = start_python(
        "-c",
        FULL,
        address,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits),
        stderr=subprocess.DEVNULL,
    )
    host, port = address.removeprefix("tcp://").split(":")
    idle = []
    try:
        deadline = time.monotonic() + 30
        while len(idle) < 400:
            assert time.monotonic() < deadline
            try:
                idle.append(socket.create_connection((host, int(port)), timeout=5))
                if spoken:
                    idle[-1].sendall(raw_sockets.opening())
                    idle[-1].recv(1000)
                    idle[-1].sendall(raw_sockets.framed(wire.encode(a.AskStatus(id="i", past=0))))
            except OSError:
                time.sleep(0.05)
        time.sleep(guard.RECENT_S)
        crowd = Crowd(address)
        rank = crowd.join("server", 0, 2)
        assert crowd.run(lambda: rank.is_member, 10)
        assert len(os.listdir(f"/proc/{hub.pid}/fd")) < limits[0]
        crowd.close()
    finally:
        for connection in idle:
            connection.close()
        hub.kill()
        hub.wait(10)


def test_silent_strangers_go_before_members(monkeypatch):
    monkeypatch.setattr(guard, "_room", lambda: 2)
    shut = []
    watch = Guard.__new__(Guard)
    one = guard.Connection
    watch._connections = {
        1: one(number=1, since=1.0, heard=1.0, peer="member"),
        2: one(number=2, since=2.0, heard=9.0),
        3: one(number=3, since=3.0),
        4: one(number=4, since=4.0, heard=5.0),
        5: one(number=5, since=9.5),  # could not speak yet
        6: one(number=6, since=4.0, heard=9.9),
    }
    monkeypatch.setattr(Guard, "shut", lambda self, connection, now: shut.append(connection.number))
    assert watch.spare(10.5) == 4
    assert shut == [3, 4, 5, 2]


@pytest.mark.parametrize("pings", [0, 10])
def test_names_that_move_to_other_connections_leave_no_descriptors(address, pings):
    """What the former connection sends is read no more, and so libzmq would not find that it has ended."""
    much = raw_sockets.framed([wire.HEADER, b"hello"]) * 200
    with served(address) as hub, weightbus.Client(address) as client:
        client.status()
        before = len(os.listdir(f"/proc/{hub.pid}/fd"))
        for number in range(100):
            pair = []
            for _ in range(2):
                pair.append(socket.create_connection(tcp(address), timeout=5))
                pair[-1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                pair[-1].sendall(raw_sockets.named(b"n%d" % number))
                assert pair[-1].recv(1000)
                for one in pair:
                    with contextlib.suppress(OSError):
                        one.sendall(much + pings * raw_sockets.PING)
            for one in pair:
                one.close()
        deadline = time.monotonic() + 20
        # libzmq loses sight of some all the same: the next test is of what becomes of them.
        while (left := len(os.listdir(f"/proc/{hub.pid}/fd"))) > before + 20:
            assert time.monotonic() < deadline, f"expected {before} descriptors, got {left}"
            time.sleep(0.1)
        client.status()


def test_connections_that_libzmq_has_lost_are_freed_between_rounds(stage, crowd, caplog):  # noqa: F811
    """By listening again; no rank has to join anew."""
    caplog.set_level("INFO", "weightbus.hub")
    assert update(crowd, 1)[0].ok
    before = {one.inode for one in stage.hub._guard._connections.values()}
    deadline = time.monotonic() + 10
    while "listening again" not in caplog.text:
        assert time.monotonic() < deadline
        stage.hub._guard.ghosts = 1 << 16  # a sweep may just have counted
        time.sleep(0.01)
    assert crowd.run(lambda: not stage.hub._anew, 20)  # members are back
    assert update(crowd, 2)[0].ok
    assert not before & {one.inode for one in stage.hub._guard._connections.values()}
    assert stage.hub.counts["dropped"] == 0


def test_what_speaks_no_zmtp_leaves_no_descriptors(address):
    """HTTP was taken for ZMTP 1.0, and what several connections begin with for the name that all have."""
    place = tcp(address)
    rng = seeded(0)
    with served(address) as hub, weightbus.Client(address) as client:
        client.status()
        before = len(os.listdir(f"/proc/{hub.pid}/fd"))
        for _ in range(1000):
            raw_sockets.connect(place, raw_sockets.http(rng))
        deadline = time.monotonic() + 20
        while (left := len(os.listdir(f"/proc/{hub.pid}/fd"))) > before + 2:
            assert time.monotonic() < deadline, f"expected {before} descriptors, got {left}"
            time.sleep(0.1)
        client.status()


# -- what is inside the socket ---------------------------------------------------------------------


def resident(pid):
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def test_floods_that_come_again_and_again_are_held_back(address):
    """More than is read, from connections that are closed and opened anew, with pings behind it and resets:
    the hub lives, stays small, updates its members, and serves who comes."""
    stop = threading.Event()
    tiny = raw_sockets.framed([wire.HEADER, b"x"])

    def flood(number):
        while not stop.is_set():
            with contextlib.suppress(OSError), socket.create_connection(tcp(address), timeout=2) as one:
                one.settimeout(1)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.sendall(raw_sockets.opening())
                one.recv(1000)
                for _ in range(1 if number % 5 == 0 else 50):
                    one.sendall(300 * tiny + 20 * raw_sockets.PING)

    with served(address) as hub, ThreadPoolExecutor(40) as floods:
        members, updates = Crowd(address), 0
        members.trainer = members.join("trainer", 0, 1)
        members.join("server", 0, 1)
        assert members.run(lambda: all(rank.is_member for rank in members.ranks.values()), 10)
        begun = resident(hub.pid)
        try:
            for number in range(40):
                floods.submit(flood, number)
            most, until = 0, time.monotonic() + 6
            while time.monotonic() < until:
                most, updates = max(most, resident(hub.pid)), updates + 1
                assert update(members, updates)[0].ok
            with weightbus.Client(address, timeout_s=60) as client:
                counts = client.status().counts
        finally:
            stop.set()
            members.close()
        assert hub.poll() is None
        assert updates > 3
        assert counts["messages"] > 10_000
        assert most - begun < 160 << 20, f"expected at most 160 MiB more, got {(most - begun) >> 20}"


def test_many_endless_messages_are_held_back(address):
    """Of one-byte frames, of which each takes 64 bytes of libzmq's memory."""
    stop = threading.Event()

    def endless():
        while not stop.is_set():
            with contextlib.suppress(OSError), socket.create_connection(tcp(address), timeout=2) as one:
                one.settimeout(2)
                one.sendall(raw_sockets.opening())
                one.recv(1000)
                while not stop.is_set():
                    one.sendall(b"\x01\x01x" * 5000)

    with served(address) as hub, ThreadPoolExecutor(20) as threads, weightbus.Client(address) as client:
        client.status()
        begun, most = resident(hub.pid), 0
        try:
            for _ in range(20):
                threads.submit(endless)
            until = time.monotonic() + 5
            while time.monotonic() < until:
                most = max(most, resident(hub.pid))
                time.sleep(0.02)
            counts = client.status().counts
        finally:
            stop.set()
        assert counts["cut"] > 0
        assert most - begun < 128 << 20, f"expected at most 128 MiB more, got {(most - begun) >> 20}"


class Kernel(guard.Connection):
    """One of which the test says what has been received."""

    received = 0
    ended = False

    def look(self):
        return self.received

    def hold(self, what):
        return True

    def release(self):
        pass

    def shut(self):
        self.ended = True


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2 * m.MAX_FRAME_BYTES), st.booleans()), min_size=60, max_size=120),
    st.sampled_from(["", "member"]),
)
def test_who_sends_whole_messages_is_never_cut_and_who_does_not_is(moves, peer):
    """However slowly the hub reads: between two looks that find nothing left, a whole message has come out."""
    watch = Guard.__new__(Guard)
    watch._is_large, watch._held, watch._late, watch._listener = False, {}, set(), None
    watch._let_in, watch._is_shut, watch._next_in, watch._next_trim = 0, False, 0.0, 0.0
    whole = Kernel(number=1, since=0.0, peer=peer)
    endless = Kernel(number=2, since=0.0, peer=peer)
    watch._connections, cut, now = {1: whole, 2: endless}, 0, 0.0
    for nbytes, read in moves:
        now += 0.1
        whole.received += nbytes
        endless.received += 50_000
        if read:
            whole.taken = whole.received
        if not endless.ended:
            cut += watch.bound(now, drained=read, behind=not read, alert=True)
    assert not whole.ended
    assert cut == endless.ended
    if sum(read for _, read in moves) > guard.ENDLESS_LOOKS + 20:
        assert endless.ended


# -- ends of connections -----------------------------------------------------------------------------

BUSY = """
import os, sys, time, zmq
from weightbus.control.keys import Keys
from weightbus.control.link import Connection
from weightbus.hub.server import Hub
what, address = sys.argv[1:]
kept = Hub(address) if what == "hub" else Connection(zmq.Context(), address, Keys())
print("here", flush=True)
time.sleep(4.0)
print("still here", flush=True)
os._exit(0)
"""


READS = """
import sys, threading, time
from weightbus.hub.server import Hub
hub = Hub(sys.argv[1])
print("here", flush=True)
time.sleep(1.5)
threading.Timer(1.5, hub.stop).start()
hub.serve()
print("still here", hub.counts["messages"], flush=True)
"""


def test_pings_behind_messages_that_wait_end_no_hub(address):
    """libzmq would answer them as soon as there is room: on a connection that has been reset, an assertion."""
    hub = start_python("-c", READS, address, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert hub.stdout.readline() == "here\n"
        with socket.create_connection(tcp(address), timeout=10) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.sendall(raw_sockets.opening())
            assert one.recv(1000)
            one.sendall(100 * raw_sockets.framed([wire.HEADER, b"x"]) + 20 * raw_sockets.PING)
            time.sleep(0.5)
        assert hub.communicate(timeout=60)[0] == "still here 100\n"
    finally:
        hub.kill()
        hub.wait()


@pytest.mark.parametrize("what", ["hub", "rank"])
def test_a_connection_that_ends_while_its_messages_wait_ends_no_process(address, what):
    """Neither a busy hub, nor a rank, which reads when its caller comes to it; libzmq would, at a heartbeat."""
    host, port = address.removeprefix("tcp://").split(":")
    listener = socket.create_server((host, int(port))) if what == "rank" else None
    process = start_python("-c", BUSY, what, address, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "here\n"
        other = listener.accept()[0] if listener else socket.create_connection((host, int(port)), timeout=10)
        other.settimeout(1.0)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # without a farewell
        with other:
            other.sendall(raw_sockets.opening(b"DEALER" if what == "hub" else b"ROUTER"))
            assert other.recv(1000)
            with contextlib.suppress(TimeoutError):  # as many as the process takes unread
                other.sendall(20_000 * raw_sockets.framed([b"weightbus/2", b"x" * 100]))
            time.sleep(0.3)
        assert process.communicate(timeout=60)[0] == "still here\n"
    finally:
        process.kill()
        process.wait()
        if listener:
            listener.close()


def test_peers_that_close_with_much_unread_end_no_hub(address):
    """A heartbeat of ZeroMQ's that was due then did."""
    much = (b"\x01\x0bweightbus/2" + b"\x00\x05hello") * 200
    with served(address) as hub, weightbus.Client(address) as client:
        former = None
        for _ in range(50):
            connection = socket.create_connection(tcp(address), timeout=5)
            connection.sendall(raw_sockets.named(b"same"))
            assert connection.recv(64, socket.MSG_WAITALL)
            connection.sendall(much[:200])
            time.sleep(0.01)
            if former is not None:  # its name is another's now, so that nobody reads what it sends
                with contextlib.suppress(OSError):
                    former.sendall(much)
                former.close()
            former = connection
        former.close()
        time.sleep(2.5)
        assert hub.poll() is None
        client.status()


def test_a_request_that_has_begun_is_read_to_its_end(stage, crowd):  # noqa: F811
    """Also where its sender has nothing more to say for this second, by a fault or in a flood."""
    client = stage.connect()
    piece = m.Piece(peer="", blob=bytes(1000), last=False)
    client.send_multipart(wire.encode(piece))
    for _ in range(MAX_ANSWERS_PER_S + 50):
        client.send_multipart([wire.HEADER, b"no message"])
    for _ in range(4):
        client.send_multipart(wire.encode(piece))
    assert crowd.run(lambda: stage.hub.counts["muted"] > 0 and stage.hub.clients.asked.nbytes == 5000, 10)
