"""CURVE keys: whom the hub lets in, what a stranger learns, and what the wire shows."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
import zmq
from namespaces import Capture, two_hosts, why_not
from processes import Job, run_jobs
from zmq.utils import z85

import weightbus
from weightbus.control import client_messages as a
from weightbus.control import wire
from weightbus.control.keys import Keys, generate, host_and_port, is_loopback, load_keys
from weightbus.errors import HubError
from weightbus.hub.server import Hub
from weightbus.tools import cli

NAMES = {"secret_tensor_name": (300, 7), "layers.0.weight": (40,)}


@pytest.fixture
def keys(tmp_path):
    generate(tmp_path / "k")
    return tmp_path / "k"


def client_only(keys, directory, name="client"):
    """A directory as a host without the hub has it."""
    directory.mkdir()
    for file, found in (("hub.public", "hub.public"), ("client.secret", f"{name}.secret")):
        (directory / file).write_text((keys / found).read_text())
        (directory / file).chmod(0o600)
    return directory


# -- files and environment -------------------------------------------------------------------------


def test_keygen_writes_what_each_host_needs(tmp_path, capsys):
    directory = tmp_path / "made" / "here"
    assert cli.main(["keygen", str(directory)]) == 0
    assert cli.main(["keygen", str(directory), "--client", "servers"]) == 0
    printed = [Path(line).name for line in capsys.readouterr().out.split()]
    assert printed == ["hub.public", "hub.secret", "client.secret", "allowed", "servers.secret", "allowed"]
    assert stat.S_IMODE((directory / "hub.secret").stat().st_mode) == 0o600
    assert stat.S_IMODE((directory / "client.secret").stat().st_mode) == 0o600
    keys = load_keys(directory)
    assert zmq.curve_public(keys.hub_secret.encode()).decode() == keys.hub_public
    assert zmq.curve_public(keys.client_secret.encode()).decode() == next(iter(keys.allowed))
    assert len(keys.allowed) == 2
    assert cli.main(["keygen", str(directory)]) == 2  # never overwritten
    assert load_keys(directory) == keys
    assert keys.hub_secret not in repr(keys)


def test_keys_from_the_environment(keys, monkeypatch):
    found = load_keys(keys)
    monkeypatch.setenv("WEIGHTBUS_KEYS", str(keys))
    assert load_keys() == found
    monkeypatch.delenv("WEIGHTBUS_KEYS")
    assert load_keys() == Keys()
    monkeypatch.setenv("WEIGHTBUS_HUB_PUBLIC", found.hub_public)
    monkeypatch.setenv("WEIGHTBUS_CLIENT_SECRET", found.client_secret)
    monkeypatch.setenv("WEIGHTBUS_ALLOWED", "a" * 40 + "," + "b" * 40)
    assert load_keys() == Keys(
        hub_public=found.hub_public, client_secret=found.client_secret, allowed={"a" * 40: "", "b" * 40: ""}
    )


@pytest.mark.parametrize("given", ["HUB_PUBLIC", "CLIENT_SECRET", "ALLOWED"])
def test_a_part_of_the_variables_is_no_way_to_have_no_keys(keys, monkeypatch, given):
    found = load_keys(keys)
    value = {"HUB_PUBLIC": found.hub_public, "CLIENT_SECRET": found.client_secret, "ALLOWED": "a" * 40}[given]
    monkeypatch.setenv(f"WEIGHTBUS_{given}", value)
    with pytest.raises(HubError, match=f"expected WEIGHTBUS_.* beside WEIGHTBUS_{given} in the"):
        load_keys()


def test_a_hub_needs_no_key_of_a_client_in_the_environment(keys, monkeypatch):
    monkeypatch.setenv("WEIGHTBUS_HUB_SECRET", load_keys(keys).hub_secret)
    monkeypatch.setenv("WEIGHTBUS_ALLOWED", "a" * 40)
    assert load_keys() == Keys(hub_secret=load_keys(keys).hub_secret, allowed={"a" * 40: ""})


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620, 0o640 | 0o001])
@pytest.mark.parametrize("name", ["client.secret", "hub.secret"])
def test_secrets_that_others_can_read_are_refused(keys, name, mode):
    (keys / name).chmod(mode)
    with pytest.raises(HubError, match=f"can read, got mode {mode:04o}; chmod 600 .*{name}"):
        load_keys(keys)


@pytest.mark.parametrize("name", ["hub.public", "client.secret", "hub.secret", "allowed"])
def test_what_is_no_file_of_keys_is_refused(keys, name):
    (keys / name).unlink()
    os.mkfifo(keys / name)
    with pytest.raises(HubError, match=f"expected a file of at most .*{name}"):
        load_keys(keys)
    (keys / name).unlink()
    (keys / name).symlink_to("/dev/zero")
    with pytest.raises(HubError, match=f"expected a file of at most .*{name}"):
        load_keys(keys)


@pytest.mark.parametrize("rest", ["two words", "name admin", "name server more"])
def test_a_line_that_gives_no_rights_is_refused_by_number(keys, rest):
    with open(keys / "allowed", "a") as file:
        file.write(f"# servers\n{'a' * 40} {rest}\n")
    with pytest.raises(HubError, match=r"allowed: line 3: expected a key, a name of one word, a role"):
        load_keys(keys)


def test_what_is_no_key_is_refused(tmp_path):
    with pytest.raises(HubError, match=r"expected hub\.public and client\.secret"):
        load_keys(tmp_path)
    (tmp_path / "hub.public").write_text("short\n")
    (tmp_path / "client.secret").write_text("~" * 40)
    (tmp_path / "client.secret").chmod(0o600)
    with pytest.raises(HubError, match="hub_public: expected a key of 40 characters of Z85, got 5"):
        load_keys(tmp_path)
    with pytest.raises(HubError, match="client_secret"):
        Keys(client_secret="~" * 40)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:5757", "tcp://192.0.2.1:5757", "tcp://example.org:5757"])
def test_without_keys_only_loopback(address):
    with pytest.raises(HubError, match=r"address: expected a loopback address, or keys"):
        Hub(address)
    with pytest.raises(HubError, match=r"address: expected a loopback address, or keys"):
        weightbus.Client(address)
    with pytest.raises(HubError, match=r"address: expected a loopback address, or keys"):
        weightbus.Subscriber([("a", torch.zeros(1))], address=address, rank=0, replica_size=1)
    Keys(insecure=True).check(address)


@pytest.mark.parametrize("address", ["tcp://h", "tcp://:1", "ipc://x", "tcp://h:99999", "tcp://[::1", "h:1"])
def test_addresses_that_are_none(address):
    with pytest.raises(HubError, match="address: expected tcp://host:port"):
        host_and_port(address)


def test_loopback_addresses():
    assert all(
        map(is_loopback, ("tcp://127.0.0.1:1", "tcp://[::1]:1", "tcp://localhost:1", "tcp://127.9.9.9:1"))
    )
    assert not any(map(is_loopback, ("tcp://0.0.0.0:1", "tcp://[::]:1", "tcp://10.0.0.1:1", "tcp://h:1")))


def test_a_key_may_hold_the_character_of_comments(keys):
    key = z85.encode(bytes([0, 0, 0, 84] * 8)).decode()
    assert "#" in key
    (keys / "allowed").write_text(f"# a comment\n\n{key} someone\n")
    assert load_keys(keys).allowed == {key: ""}


# -- one host --------------------------------------------------------------------------------------


@pytest.fixture
def hub(address, keys):
    hub = Hub(address, keys=load_keys(keys))
    thread = threading.Thread(target=hub.serve)
    thread.start()
    yield hub
    hub.stop()
    thread.join(5)
    assert not thread.is_alive()


def test_only_keys_on_the_list_get_an_answer(hub, address, keys, tmp_path):
    """And the list is read anew: a client is let in, or shut out, without a restart."""
    with weightbus.Client(address, keys=keys) as client:
        assert client.status().counts["not_allowed"] == 0
    generate(keys, "second")
    second = client_only(keys, tmp_path / "second", "second")
    with weightbus.Client(address, keys=second) as client:
        client.status()
    lines = (keys / "allowed").read_text().splitlines(keepends=True)
    (keys / "allowed").write_text("# none of them\n" + lines[0])
    with (
        weightbus.Client(address, keys=second, timeout_s=2) as client,
        pytest.raises(HubError, match="no hub answered"),
    ):
        client.status()
    with weightbus.Client(address, keys=keys) as client:
        assert client.status().counts["not_allowed"] >= 1


@pytest.mark.parametrize("what", ["no keys", "another hub's key", "another client's key"])
def test_a_stranger_learns_nothing(hub, address, keys, tmp_path, what):
    generate(tmp_path / "other")
    mine, other = load_keys(keys), load_keys(tmp_path / "other")
    wrong = {
        "no keys": Keys(),
        "another hub's key": Keys(hub_public=other.hub_public, client_secret=mine.client_secret),
        "another client's key": Keys(hub_public=mine.hub_public, client_secret=other.client_secret),
    }[what]
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    wrong.protect_client(socket)
    socket.connect(address)
    socket.send_multipart(wire.encode(a.AskStatus(id="1")))
    assert not socket.poll(1500)
    socket.close()
    context.term()
    with weightbus.Client(address, keys=keys) as client:
        counts = client.status().counts
    assert counts["messages"] == 1  # the status just asked for: nothing of the stranger's came through
    assert counts["not_allowed"] == (1 if what == "another client's key" else 0) or counts["not_allowed"] > 1


def trainer(rank, size, *, address, keys=None, insecure=False, host=None, timeout_s=20):
    if host is not None:
        host.enter()
    source = [(name, torch.full(shape, 5.0)) for name, shape in NAMES.items()]
    try:
        with weightbus.Publisher(
            source,
            address=address,
            keys=keys,
            insecure=insecure,
            connect_timeout_s=timeout_s,
            join_timeout_s=20,
        ) as publisher:
            return publisher.update(1).word, publisher.check().word
    except weightbus.WeightbusError as error:
        return type(error).__name__, str(error)


def server(rank, size, *, address, keys=None, insecure=False, host=None, timeout_s=20):
    if host is not None:
        host.enter()
    target = [(name, torch.zeros(shape)) for name, shape in NAMES.items()]
    try:
        with weightbus.Subscriber(
            target, address=address, keys=keys, insecure=insecure, connect_timeout_s=timeout_s
        ) as subscriber:
            subscriber.serve()
            return subscriber.state, all((tensor == 5).all() for _, tensor in target)
    except weightbus.WeightbusError as error:
        return type(error).__name__, str(error)


def test_a_whole_job_with_keys(address, keys, tmp_path):
    """Trainer rank 0 starts the hub and passes the keys on; a server host has a client's only."""
    trained, served = run_jobs(
        Job(run=trainer, arguments={"address": address, "keys": keys}),
        Job(run=server, size=2, arguments={"address": address, "keys": client_only(keys, tmp_path / "host")}),
    )
    assert trained == [("verified", "verified")]
    assert served == [("ready", True)] * 2


def test_a_trainer_without_the_hubs_secret_can_start_none(address, keys, tmp_path):
    ((kind, text),) = run_jobs(
        Job(run=trainer, arguments={"address": address, "keys": client_only(keys, tmp_path / "host")})
    )[0]
    assert kind == "HubError"
    assert "has no hub.secret to start one with" in text


# -- two hosts -------------------------------------------------------------------------------------


@pytest.fixture
def hosts():
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts() as hosts:
        yield hosts


def two_host_run(hosts, trainer_keys, server_keys, fails=False, **more):
    one, two = hosts
    address = f"tcp://{one.address}:5757"
    more = {"timeout_s": 4 if fails else 20} | more
    with Capture(two) as capture:
        results = run_jobs(
            Job(run=trainer, arguments={"address": address, "host": one, "keys": trainer_keys, **more}),
            Job(run=server, arguments={"address": address, "host": two, "keys": server_keys, **more}),
            timeout_s=60,
        )
        time.sleep(0.5)
    return results, capture.of_port(5757)


# What a control message can't do without: the protocol, types of messages, field names, names of tensors.
READABLE = (
    b"weightbus/2",
    b"hello",
    b"offer",
    b"outcome",
    b"peer",
    b"secret_tensor_name",
    b"verified",
    b"trainer",
)


def test_two_hosts_without_keys_are_refused(hosts):
    (trained, served), seen = two_host_run(hosts, None, None, fails=True)
    for kind, text in (*trained, *served):
        assert kind == "HubError"
        assert "address: expected a loopback address, or keys (weightbus keygen), got 'tcp://10.77.0.1" in text
    assert seen == b""


def test_two_hosts_with_keys_and_nothing_to_read_on_the_wire(hosts, keys, tmp_path):
    (trained, served), seen = two_host_run(hosts, keys, client_only(keys, tmp_path / "host"))
    assert trained == [("verified", "verified")]
    assert served == [("ready", True)]
    assert b"CURVE" in seen
    assert len(seen) > 5000
    assert not [word for word in READABLE if word in seen]


def test_the_capture_can_see(hosts):
    """The same run in the clear: every word that the test above looks for is there."""
    (trained, served), seen = two_host_run(hosts, None, None, insecure=True)
    assert trained == [("verified", "verified")]
    assert served == [("ready", True)]
    assert [word for word in READABLE if word not in seen] == []


def test_two_hosts_with_a_wrong_key(hosts, keys, tmp_path):
    """A server host with another installation's keys: neither side learns anything of the other."""
    generate(tmp_path / "other")
    wrong = client_only(tmp_path / "other", tmp_path / "host")
    (wrong / "hub.public").write_text((keys / "hub.public").read_text())
    _, (served,) = two_host_run(hosts, keys, wrong, fails=True)[0]
    assert served[0] == "HubError"
    assert "no hub answered at tcp://10.77.0.1:5757" in served[1]
    assert "keys do not match" in served[1]
