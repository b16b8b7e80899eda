"""A hub that is stopped (SIGSTOP): it listens, and answers nobody."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import torch
from processes import Job, run_jobs, start_python

import weightbus
from weightbus.control import link, start
from weightbus.control.joining import HELLO_AGAIN_S
from weightbus.hub.server import Hub
from weightbus.session import round

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (300, 400)
SILENT_S = 2.0


def shorter():
    """In a rank's process: what it waits for, a hub's silence and an unheard outcome, is shorter than it is."""
    link.DEAD_AFTER_S, round.UNHEARD_S = SILENT_S, 2.0


def trainer(rank, size, *, address, pid=0):
    """What became of each of four updates, and its seconds; the hub goes on after the end of the second."""
    shorter()
    source = torch.zeros(SHAPE)
    seen = []
    with weightbus.Publisher(
        [("w", source)], address=address, join_timeout_s=20, dead_after_s=5.0, transfer_timeout_s=3
    ) as publisher:
        for version in range(1, 5):
            source.fill_(version)
            begun = time.monotonic()
            try:
                word = publisher.update(version).word
            except weightbus.WeightbusError as error:
                word = type(error).__name__
            seen.append((word, time.monotonic() - begun))
            if version == 2 and pid and rank == 0:
                threading.Timer(1.0, os.kill, (pid, signal.SIGCONT)).start()  # while the next call looks for it
    return seen


def server(rank, size, *, address, pid=0):
    """Versions as which other bits were served, state and values. It stops the hub as the second arrives."""
    shorter()
    target = torch.nn.Parameter(torch.zeros(SHAPE), requires_grad=False)
    wrong = []

    def load(parameter, loaded):
        if not loaded.is_meta and rank == 0 and loaded[0, 0] == 2:
            os.kill(pid or hub_of(address), signal.SIGSTOP)
        parameter.data.copy_(loaded)

    target.weight_loader = load
    with weightbus.Subscriber([("w", target)], address=address, rank=rank, replica_size=size) as subscriber:
        while not subscriber.left:
            subscriber.poll(0.05)
            held = subscriber.version
            if subscriber.state == "ready" and held is not None and not target.eq(held).all():
                wrong.append((held, target.unique().tolist()))
        return wrong, subscriber.state, target.unique().tolist()


def hub_of(address):
    """The pid of the hub that the trainer has started there."""
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
            if b"--ephemeral" in words and address.encode() in words:
                return int(name)
    raise AssertionError("no hub")


def run(address, **arguments):
    return run_jobs(
        Job(run=trainer, size=2, arguments={"address": address, **arguments}),
        Job(run=server, size=2, arguments={"address": address, **arguments}),
        timeout_s=100,
    )


def test_one_that_the_trainer_has_started_is_replaced(address):
    trained, served = run(address)
    for seen in trained:
        assert [word for word, _ in seen[2:]] == ["verified"] * 2
        assert seen[1][1] < SILENT_S + 2.0 + 8.0
    for wrong, state, values in served:
        assert (wrong, state, values) == ([], "ready", [4.0])


def test_one_that_goes_on_later_says_nothing_that_is_taken_for_the_next_call(address):
    """The trainer has given up its call by then, and makes the next: another version, and other weights."""
    hub = start_python("-m", "weightbus.hub", "--address", address, "--dead-after", 5.0, cwd=ROOT)
    while not start.listens(address):
        time.sleep(0.05)
    try:
        trained, served = run(address, pid=hub.pid)
    finally:
        hub.send_signal(signal.SIGCONT)
        hub.kill()
        hub.wait(10)
    for seen in trained:
        assert seen[1][0] != "verified"
        assert seen[3][0] == "verified"
    assert trained[0][2][0] == trained[1][2][0], "one end for both"
    for wrong, state, values in served:
        assert (wrong, state, values) == ([], "ready", [4.0])


def test_one_is_ended_in_time_though_this_rank_tries_to_join_it_again(address, monkeypatch):
    """Between updates: then the heartbeats' thread also joins again, and waits for an answer to that."""
    monkeypatch.setattr(link, "DEAD_AFTER_S", SILENT_S)
    ended = []
    monkeypatch.setattr(
        link, "end_hub", lambda address: ended.append(time.monotonic()) or start.end_hub(address)
    )
    with weightbus.Publisher([("w", torch.zeros(SHAPE))], address=address, rank=0, size=1):
        hub = start._started[address]
        time.sleep(1.0)
        begun = time.monotonic()
        hub.send_signal(signal.SIGSTOP)
        while not ended:
            assert time.monotonic() - begun < 15.0
            time.sleep(0.05)
        assert ended[0] - begun < SILENT_S + HELLO_AGAIN_S + 2.0
        hub.wait(5)


def test_a_hub_of_another_process_is_not_ended(address):
    start.end_hub(address)
    hub = Hub(address)
    try:
        start.end_hub(address)
    finally:
        hub._close()
