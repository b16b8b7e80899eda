"""The Unix socket between the hub and ranks of its host (weightbus/local.py)."""

import os
import secrets
import struct
import time

import pytest

from weightbus import local
from weightbus import messages as m
from weightbus.errors import ProtocolError
from weightbus.link import MAX_BYTES
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


def test_nobody_listens():
    assert connect(f"weightbus-{secrets.token_hex(16)}", **LIMITS) is None


def test_a_length_has_room_for_the_longest_message():
    assert m.MAX_FRAME_BYTES < MAX_BYTES < 1 << 32
