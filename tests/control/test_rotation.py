"""Keys that are rotated while ranks run: no update fails, and a key that was retired is good for nothing."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time

import pytest
import torch
import zmq
from processes import Job, run_jobs

import weightbus
from weightbus.control.keys import generate, load_keys, retire, rotate
from weightbus.errors import HubError
from weightbus.hub.server import Hub
from weightbus.tools import cli


@pytest.fixture
def keys(tmp_path):
    generate(tmp_path / "k", "trainers", "trainer")
    generate(tmp_path / "k", "servers", "server")
    return tmp_path / "k"


def hand_out(keys, host, name):
    """What a host of this name needs; the secret last, as an operator would copy it."""
    host.mkdir(exist_ok=True)
    for file, found in (("hub.public", "hub.public"), ("client.secret", f"{name}.secret")):
        shutil.copy(keys / found, host / f".{file}")
        (host / f".{file}").rename(host / file)
    return host


@pytest.fixture
def hub(address, keys):
    hub = Hub(address, keys=load_keys(keys))
    thread = threading.Thread(target=hub.serve)
    thread.start()
    yield hub
    hub.stop()
    thread.join(5)
    assert not thread.is_alive()


# -- files -----------------------------------------------------------------------------------------


def test_a_client_has_two_keys_until_the_old_one_is_retired(keys):
    old = load_keys(keys).allowed
    before = (keys / "servers.secret").read_text()
    assert cli.main(["keygen", str(keys), "--rotate", "servers"]) == 0
    both = load_keys(keys).allowed
    assert both.items() > old.items()
    (new,) = both.keys() - old.keys()
    assert both[new] == "server"
    secret = (keys / "servers.secret").read_text().strip()
    assert zmq.curve_public(secret.encode()).decode() == new
    assert before.strip() != secret
    assert (keys / "servers.secret").stat().st_mode & 0o777 == 0o600
    assert cli.main(["keygen", str(keys), "--retire", "servers"]) == 0
    assert cli.main(["keygen", str(keys), "--retire", "servers"]) == 0  # once more changes nothing
    old_one = next(key for key, role in old.items() if role == "server")
    assert load_keys(keys).allowed == {key: role for key, role in both.items() if key != old_one}


def test_the_hub_has_two_public_keys_until_the_old_one_is_retired(keys):
    old = load_keys(keys)
    rotate(keys, "hub")
    both = load_keys(keys)
    assert both.hub_publics[1:] == old.hub_publics
    assert zmq.curve_public(both.hub_secret.encode()).decode() == both.hub_publics[0]
    retire(keys, "hub")
    assert load_keys(keys).hub_publics == both.hub_publics[:1]


def test_names_without_keys_are_refused(keys, capsys):
    for step in ("--rotate", "--retire"):
        assert cli.main(["keygen", str(keys), step, "nobody"]) == 2
        assert "expected a line of 'nobody'" in capsys.readouterr().err
    with pytest.raises(HubError, match="name without spaces and slashes, other than 'hub'"):
        generate(keys, "hub")
    with pytest.raises(HubError, match="expected a client's name without spaces"):
        generate(keys, "two words")


def test_files_that_are_half_changed_change_nothing(keys, caplog):
    found = load_keys(hand_out(keys, keys.parent / "host", "servers"))
    (keys.parent / "host" / "client.secret").write_text("half")
    renewed = found.renewed()
    assert renewed == found
    assert "keys are not renewed: client_secret: expected a key of 40 characters" in caplog.text
    assert renewed.renewed() is renewed  # said once
    hand_out(keys, keys.parent / "host", "servers")
    assert renewed.renewed().client_secret == found.client_secret


# -- ranks that run --------------------------------------------------------------------------------


def trainer(rank, size, *, address, keys, updates):
    source = [("a", torch.zeros(1000)), ("b", torch.zeros(7, 3))]
    with weightbus.Publisher(source, address=address, keys=keys, join_timeout_s=30) as publisher:
        words = []
        for version in range(1, updates + 1):
            for _, tensor in source:
                tensor.fill_(version)
            words.append(publisher.update(version).word)
            time.sleep(0.1)
        return words, publisher.check().word


def server(rank, size, *, address, keys, updates):
    target = [("a", torch.zeros(1000)), ("b", torch.zeros(7, 3))]
    with weightbus.Subscriber(target, address=address, keys=keys) as subscriber:
        while subscriber.version != updates:
            subscriber.poll(0.2)
            time.sleep(0.01)
        subscriber.serve()
        return subscriber.state, all(bool((tensor == updates).all()) for _, tensor in target)


def test_no_update_fails_while_keys_are_rotated(hub, address, keys, tmp_path):
    """100 updates; meanwhile servers' and trainers' keys are rotated and retired, and the hub's own twice."""
    hosts = {name: hand_out(keys, tmp_path / name, name) for name in ("trainers", "servers")}
    steps, failed = [], []

    def operate():
        try:
            for name in ("servers", "hub", "trainers", "hub"):
                time.sleep(0.5)
                rotate(keys, name)
                for host in hosts:
                    hand_out(keys, hosts[host], host)
                time.sleep(1.5)
                retire(keys, name)
                for host in hosts:
                    hand_out(keys, hosts[host], host)
                steps.append(name)
        except BaseException as error:
            failed.append(error)

    operator = threading.Thread(target=operate)
    operator.start()
    (trained,), served = run_jobs(
        Job(run=trainer, arguments={"address": address, "keys": hosts["trainers"], "updates": 100}),
        Job(run=server, size=2, arguments={"address": address, "keys": hosts["servers"], "updates": 100}),
        timeout_s=90,
    )
    operator.join()
    assert not failed
    assert steps == ["servers", "hub", "trainers", "hub"]
    assert trained == (["verified"] * 100, "verified")
    assert served == [("ready", True)] * 2
    assert hub.counts["dropped"] == 0  # nobody had to join again
    assert hub.coordinator.epoch == 1


def test_a_key_that_was_retired_is_good_for_nothing(hub, address, keys, tmp_path):
    """A client that is connected already is told, and one that comes is not let in."""
    host = hand_out(keys, tmp_path / "host", "trainers")
    with weightbus.Client(address, keys=host) as client:
        client.status()
        rotate(keys, "trainers")
        client.status()
        retire(keys, "trainers")
        time.sleep(1.0)
        with pytest.raises(weightbus.WeightbusError, match=r"was retired; expected the newest of its name"):
            client.status()
    with (
        weightbus.Client(address, keys=host, timeout_s=1) as client,
        pytest.raises(HubError, match=r"no hub answered .* or keys do not match"),
    ):
        client.status()
    with weightbus.Client(address, keys=hand_out(keys, host, "trainers")) as client:
        client.status()


def test_a_member_with_a_retired_key_is_dropped_by_name(hub, address, keys, tmp_path):
    host = hand_out(keys, tmp_path / "host", "servers")
    target = [("a", torch.zeros(3))]
    more = {"address": address, "keys": host, "rank": 0, "replica_size": 1, "reconnect_timeout_s": 1}
    with weightbus.Subscriber(target, **more) as one:
        rotate(keys, "servers")
        retire(keys, "servers")
        deadline = time.monotonic() + 10
        while hub.coordinator.roster.peers and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not hub.coordinator.roster.peers
        with pytest.raises(HubError, match="was retired"):
            one.serve()
        hand_out(keys, host, "servers")  # and comes back with the new one
        deadline = time.monotonic() + 10
        while not hub.coordinator.roster.peers and time.monotonic() < deadline:
            with contextlib.suppress(HubError):
                one.poll(0.2)
        assert hub.coordinator.roster.peers


def test_a_rank_that_comes_while_the_hub_has_its_old_key_still(hub, address, keys, tmp_path):
    """``hub.public`` is handed out before the hub has its new secret: either key will do."""
    host = hand_out(keys, tmp_path / "host", "trainers")
    secret = (keys / "hub.secret").read_text()
    rotate(keys, "hub")
    new = (keys / "hub.secret").read_text()
    (keys / "hub.secret").write_text(secret)  # as on a host to which it has not been copied
    time.sleep(0.5)
    hand_out(keys, host, "trainers")
    assert len(load_keys(host).hub_publics) == 2
    with weightbus.Client(address, keys=host) as client:
        client.status()
        with weightbus.Publisher(
            [("a", torch.zeros(3))], address=address, keys=host, rank=0, size=1
        ) as publisher:
            (keys / "hub.secret").write_text(new)
            time.sleep(2.0)
            client.status()
            assert publisher.poll() is False
