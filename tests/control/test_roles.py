"""What a key of each role may do, at a hub with CURVE."""

from __future__ import annotations

import threading

import pytest
import zmq

from weightbus.control import client_messages as a
from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.control.keys import KEY_ROLES, Keys, generate, load_keys
from weightbus.control.roles import may_send
from weightbus.errors import HubError
from weightbus.hub.server import Hub

JOINS = {"": {"trainer", "server"}, "trainer": {"trainer", "server"}, "server": {"server"}}


def hello(role):
    return m.Hello(process="p" * 32, host="h", pid=1, device="cpu", role=role, rank=0, size=1, replica=0)


@pytest.fixture
def hub(address, tmp_path):
    generate(tmp_path)
    for role in sorted(KEY_ROLES - {""}):
        generate(tmp_path, f"{role}s", role)
    hub = Hub(address, keys=load_keys(tmp_path))
    thread = threading.Thread(target=hub.serve)
    thread.start()
    yield hub
    hub.stop()
    thread.join(5)
    assert not thread.is_alive()


def ask(address, directory, role, *messages, identity=b""):
    """The answer to each, with the role's key."""
    secret = (directory / f"{role}s.secret" if role else directory / "client.secret").read_text().strip()
    public = (directory / "hub.public").read_text().strip()
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        if identity:
            socket.setsockopt(zmq.ROUTING_ID, identity)
        Keys(hub_public=public, client_secret=secret).protect_client(socket)
        socket.connect(address)
        answers = []
        for message in messages:
            socket.send_multipart(wire.encode(message))
            assert socket.poll(5000)
            answers.append(wire.decode_from_hub(socket.recv_multipart()))
        return answers


@pytest.mark.parametrize("key_role", sorted(KEY_ROLES))
@pytest.mark.parametrize("role", ["trainer", "server"])
def test_who_may_join(hub, address, tmp_path, key_role, role):
    answer, status = ask(address, tmp_path, key_role, hello(role), a.AskStatus(id="s"))
    allowed = role in JOINS.get(key_role, set())
    assert isinstance(answer, m.Welcome if allowed else m.Refused)
    assert isinstance(status, a.Status)
    assert status.counts["not_allowed"] == (not allowed)
    if not allowed:
        assert f"not allowed with a {key_role}'s key" in answer.reason


@pytest.mark.parametrize("key_role", ["server", "status"])
def test_who_may_not_ask_for_changes(hub, address, tmp_path, key_role):
    task = m.AskTask(
        id="t",
        task=m.SaveTask(path="/nowhere", modules=None, version=None, file_bytes=1),
        hub="h",
        wait_s=1.0,
        run_s=1.0,
    )
    pieced = m.Piece(peer="", blob=wire.encode(task)[1], last=True)
    for message in (task, a.AskPause(id="p", hub="h", for_s=1.0), pieced):
        (answer,) = ask(address, tmp_path, key_role, message, identity=b"one")
        assert isinstance(answer, m.Refused)
        assert "not allowed" in answer.reason


@pytest.mark.parametrize("word", ["trainers", "any", "Trainer", "sèrver"])
def test_a_line_with_a_role_that_is_none_gives_no_rights(hub, address, tmp_path, word):
    lines = (tmp_path / "allowed").read_text().splitlines()
    (tmp_path / "allowed").write_text(f"{lines[0]} {word}\n")
    with pytest.raises(HubError, match="line 1: expected a key, a name of one word, a role"):
        load_keys(tmp_path)
    with pytest.raises(AssertionError):  # no answer comes
        ask(address, tmp_path, "", hello("server"))


def test_a_role_that_is_not_known_may_send_nothing():
    assert not may_send("trainers", a.AskStatus(id="s"))
    assert not may_send("server", hello("trainer"))
