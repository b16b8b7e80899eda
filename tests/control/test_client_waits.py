"""A client that waits for the end of a request hears that the hub has gone, or is silent."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from processes import start_python

import weightbus
from weightbus.control import client, start
from weightbus.control import messages as m

ROOT = Path(__file__).resolve().parents[2]
SILENT_S = 1.0


@pytest.fixture
def hub(address):
    """A process, with one server rank of this one that does not poll."""
    process = start_python("-m", "weightbus.hub", "--address", address, cwd=ROOT)
    while not start.listens(address):
        time.sleep(0.05)
    with weightbus.Subscriber([("w", torch.zeros(3))], address=address, rank=0, replica_size=1):
        yield process
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(10)


def load(client, tmp_path):
    client.update_from_disk(tmp_path, timeout_s=600)


def check(client, tmp_path):
    client.check(wait_s=600)


@pytest.mark.parametrize("request_", [load, check])
@pytest.mark.parametrize(
    ("fault", "text"), [(signal.SIGKILL, "has closed the connection"), (signal.SIGSTOP, "has not answered for")]
)
def test_a_hub_that_has_gone_or_stands_still(hub, address, tmp_path, monkeypatch, request_, fault, text):
    monkeypatch.setattr(m, "DEAD_AFTER_S", SILENT_S)
    struck = []

    def strike():
        struck.append(time.monotonic())
        hub.send_signal(fault)

    with weightbus.Client(address, timeout_s=30) as asking:
        timer = threading.Timer(1.0, strike)
        timer.start()
        with pytest.raises(weightbus.HubError, match=f"{text}.*may have been done"):
            request_(asking, tmp_path)
        assert time.monotonic() - struck[0] < SILENT_S + 3 * client.LOOK_S + 2.0
        timer.join()


def test_a_request_may_take_longer_than_a_hub_may_be_silent(hub, address, monkeypatch):
    monkeypatch.setattr(m, "DEAD_AFTER_S", SILENT_S)
    monkeypatch.setattr(client, "LOOK_S", 0.5)
    with weightbus.Client(address, timeout_s=30) as asking:
        answer = asking.check(wait_s=5.0)
    assert not answer.ok
