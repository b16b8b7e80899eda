"""The Unix socket between the hub and a rank of its host, each end by itself (control/local_socket.py)."""

from __future__ import annotations

import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from weightbus.control import local_socket
from weightbus.control.connection import MAX_BYTES, MAX_FRAMES
from weightbus.control.local_socket import LocalListener, LocalSocket, connect
from weightbus.control.messages import MAX_MESSAGE_BYTES
from weightbus.control.messages.tasks import MAX_PAYLOAD_BYTES, MAX_PAYLOADS
from weightbus.errors import ProtocolError
from weightbus.hub.local_sockets import LocalSockets

MOST = 200
LIMITS = {"max_frames": 4, "max_bytes": 4 << 20}


@pytest.fixture
def hub() -> Iterator[LocalSockets]:
    sockets = LocalSockets(**LIMITS, max_unsent=3, max_unsent_bytes=64 << 20)
    yield sockets
    sockets.close()


@pytest.fixture
def rank_of(hub: LocalSockets) -> Iterator[Callable[..., LocalSocket]]:
    """Has the hub connect to a new rank; that rank's end. All are closed in the end."""
    ends: list[LocalSocket] = []

    def rank_of(identity: bytes, **limits: int) -> LocalSocket:
        listener = LocalListener()
        hub.open(identity, listener.name, "user")
        end = listener.accept(**LIMITS | limits)
        assert end is not None
        listener.close()
        ends.append(end)
        return end

    yield rank_of
    for end in ends:
        end.close()


def take(hub: LocalSockets, count: int, timeout_s: float = 5.0) -> list[tuple[bytes, list[bytes]]]:
    found: list[tuple[bytes, list[bytes]]] = []
    deadline = time.monotonic() + timeout_s
    while len(found) < count:
        assert time.monotonic() < deadline, found
        if hub.is_ready():
            found += [(identity, frames) for identity, _, frames in hub.receive(MOST)]
    return found


def is_left(hub: LocalSockets, identity: bytes) -> bool:
    """Whether the hub keeps a connection, after a look at all of them."""
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        hub.is_ready()
        list(hub.receive(MOST))
    return identity in hub


def test_messages_of_any_length_come_whole_and_in_order(hub, rank_of):
    end = rank_of(b"a")
    sent = [[b"a"], [b"", b"b" * 5], [os.urandom(3 << 20), b"c"], [b"", os.urandom(1 << 20)], []]
    for frames in sent:
        end.send(frames)
    found = []
    while len(found) < len(sent):  # what is too long for the kernel is sent as it is read
        end.flush()
        if hub.is_ready():
            found += hub.receive(MOST)
    assert found == [(b"a", "user", frames) for frames in sent]
    assert (end.unsent, end.unsent_bytes) == (0, 0)
    assert hub.send(b"a", sent[2])
    answers = []
    while not answers:
        hub.is_ready()
        list(hub.receive(MOST))  # flushes
        answers = end.receive()
    assert answers == [sent[2]]


def test_ranks_are_told_apart(hub, rank_of):
    ends = {name: rank_of(name) for name in (b"a", b"b", b"c")}
    for name, end in ends.items():
        end.send([name])
    assert sorted(take(hub, 3)) == [(name, [name]) for name in ends]
    for name, end in ends.items():
        hub.send(name, [name * 2])
        assert end.wait(5)
        assert end.receive() == [[name * 2]]


def test_who_sends_much_does_not_keep_others_waiting(hub, rank_of):
    flooding, quiet = rank_of(b"a"), rank_of(b"b")
    for number in range(100):
        flooding.send([b"%d" % number])
    quiet.send([b"x"])
    assert hub.is_ready()
    first = [(identity, frames) for identity, _, frames in hub.receive(10)]
    assert len(first) == 10
    assert (b"b", [b"x"]) in first[:2]
    assert hub.is_ready()  # also of what has been read, and waits for its turn
    rest = take(hub, 91)
    assert [frames for identity, frames in first + rest if identity == b"a"] == [
        [b"%d" % number] for number in range(100)
    ]


def test_what_was_said_before_the_end_is_heard(hub, rank_of):
    """Also of one that has not read all it was sent."""
    end = rank_of(b"a")
    hub.send(b"a", [bytes(4 << 20)])
    end.send([b"last"])
    end.close()
    assert take(hub, 1) == [(b"a", [b"last"])]
    assert not is_left(hub, b"a")


def test_a_message_beyond_the_limits_ends_the_connection(hub, rank_of):
    for head in (struct.pack("<I", 5), struct.pack("<II", 1, (4 << 20) + 1), b"\xff" * 64):
        end = rank_of(b"a")
        end._socket.send(head)
        assert not is_left(hub, b"a")
        assert end.wait(5)
        with pytest.raises(ConnectionError):
            end.receive()


def test_a_rank_refuses_a_message_beyond_its_limits(hub, rank_of):
    end = rank_of(b"a", max_bytes=10)
    hub.send(b"a", [b"x" * 11])
    assert end.wait(5)
    with pytest.raises(ProtocolError, match="expected at most 10 bytes, got 11"):
        end.receive()


def test_who_does_not_read_is_told_apart(hub, rank_of):
    end = rank_of(b"a")
    assert [hub.send(b"a", [b"y" * (1 << 20)]) for _ in range(8)] == [True] * 3 + [False] * 5
    found = []
    while len(found) < 2:  # two read, and there is room for two: what counts is what is still unread
        hub.is_ready()
        list(hub.receive(MOST))
        found += end.receive()
    assert [hub.send(b"a", [b"y" * (1 << 20)]) for _ in range(3)] == [True, True, False]


def test_what_may_wait_is_bounded_in_bytes(rank_of, hub):
    hub._max_unsent_bytes = 2 << 20
    rank_of(b"a")
    assert [hub.send(b"a", [bytes(3 << 20)]) for _ in range(2)] == [True, False]


def test_what_can_not_be_said_to_one_that_has_gone_is_told(hub, rank_of):
    """Before a look has found that out: the same process may have said by ZeroMQ what this answers."""
    end = rank_of(b"a")
    end.send([b"last"])
    end.close()
    assert hub.send(b"a", [b"answer"]) is None
    assert take(hub, 1) == [(b"a", [b"last"])]
    assert not is_left(hub, b"a")


def test_who_reads_no_more_keeps_nobody_busy(hub, rank_of):
    end = rank_of(b"a")
    hub.send(b"a", [bytes(4 << 20)])
    end._socket.shutdown(socket.SHUT_RD)
    hub.is_ready()
    assert list(hub.receive(MOST)) == []
    assert select.select([hub], [], [], 0)[0] == []
    end.send([b"y"])
    assert take(hub, 1) == [(b"a", [b"y"])]


def test_nothing_is_heard_behind_what_a_connection_was_closed_for(hub, rank_of):
    end = rank_of(b"a")
    end._socket.send(struct.pack("<IIs", 1, 1, b"x") * 3)
    heard, deadline = [], time.monotonic() + 5
    while not heard:
        assert time.monotonic() < deadline
        if hub.is_ready():
            for identity, _, frames in hub.receive(MOST):
                heard.append(frames)
                hub.close_of(identity)
    assert heard == [[b"x"]]


def test_a_long_message_is_written_in_parts(rank_of):
    """While one rank reads as fast as it is written to, the others wait for one part only."""
    end, written = rank_of(b"a"), []

    class Greedy:
        def send(self, data: memoryview) -> int:
            written.append(len(data))
            return min(len(data), 1000)

    end._socket, kept = Greedy(), end._socket
    end.send([bytes(1 << 20)])
    assert len(written) <= 64
    while not end.flush():
        assert end.unsent == 1
    assert (end.unsent, end.unsent_bytes) == (0, 0)
    assert len(written) > 1000
    end._socket = kept


def test_a_look_at_a_part_does_not_cost_its_number_of_frames(hub, rank_of):
    end = rank_of(b"a", max_frames=1 << 20)
    frames = [b"12345"] * 400_000
    hub.send(b"a", frames)
    begun, found = time.process_time(), []
    while not found:
        hub.is_ready()
        list(hub.receive(MOST))
        found = end.receive()
    assert found == [frames]
    assert time.process_time() - begun < 5


def test_only_connections_of_members_are_kept(hub, rank_of):
    ends = {name: rank_of(name) for name in (b"a", b"b", b"c")}
    hub.keep([b"b", b"x"])
    assert [name in hub for name in ends] == [False, True, False]
    with pytest.raises(ConnectionError):
        ends[b"a"].receive()
    again = rank_of(b"b")  # a connection has one
    with pytest.raises(ConnectionError):
        ends[b"b"].receive()
    again.send([b"x"])
    assert take(hub, 1) == [(b"b", [b"x"])]
    assert len(hub) == 1


def test_a_rank_that_can_not_be_reached_has_none(hub):
    """As from another host, or where too many have connected before."""
    hub.open(b"a", f"weightbus-{secrets.token_hex(16)}", "")
    assert b"a" not in hub
    listener = LocalListener()
    before = [connect(listener.name, **LIMITS) for _ in range(64)]
    assert None in before
    hub.open(b"a", listener.name, "")
    assert b"a" not in hub
    for one in filter(None, before):
        one.close()
    listener.close()


def test_without_such_sockets_there_is_none(monkeypatch):
    monkeypatch.delattr(socket, "AF_UNIX")
    listener = LocalListener()
    assert listener.name == ""
    assert connect("weightbus-", **LIMITS) is None
    listener.close()
    monkeypatch.delattr(select, "epoll")
    hub = LocalSockets(**LIMITS, max_unsent=3, max_unsent_bytes=1)
    hub.open(b"a", "weightbus-", "")
    assert (hub.fileno(), hub.is_ready(), list(hub.receive(MOST)), len(hub)) == (-1, False, [], 0)
    hub.close()


FORKS = """
import os, sys, time
from weightbus.control.local_socket import LocalListener
listener = LocalListener()
print(listener.name, flush=True)
while (end := listener.accept(max_frames=4, max_bytes=100)) is None:
    time.sleep(0.01)
if not os.fork():
    end.close()
    time.sleep(60)
time.sleep(0.5)
end.send([b"y"])
os._exit(0)
"""


def test_a_forked_process_does_not_hold_the_connection(hub):
    """Nor does it end it."""
    program = [sys.executable, "-c", FORKS]
    rank = subprocess.Popen(program, start_new_session=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    try:
        assert rank.stdout
        hub.open(b"a", rank.stdout.readline().strip(), "")
        assert take(hub, 1, timeout_s=20) == [(b"a", [b"y"])]
        assert not is_left(hub, b"a")
    finally:
        rank.wait(10)
        os.killpg(rank.pid, signal.SIGKILL)
        rank.stdout.close()


def test_a_length_has_room_for_the_longest_message():
    """Each has 4 bytes. The longest carries the most payloads that a request may have, and says which."""
    assert MAX_PAYLOAD_BYTES + MAX_MESSAGE_BYTES <= MAX_BYTES < 1 << 32
    assert MAX_FRAMES > MAX_PAYLOADS + 1
    assert local_socket._NUMBER.size == 4
