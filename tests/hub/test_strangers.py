"""What strangers and members may cost the hub: memory, descriptors, time; and what is not believed of them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import raw_sockets
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from namespaces import two_hosts, why_not
from processes import start_python
from seeded import seeded
from served import served, tcp
from test_hub import PAYLOADS, crowd, stage, update  # noqa: F401
from test_protocol import Room
from test_tasks import Desk

import weightbus
from weightbus.control import client_messages as a
from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.control.connection import Connection
from weightbus.control.keys import Keys
from weightbus.control.link import Link
from weightbus.control.messages import LoadTask, SaveTask
from weightbus.control.rendezvous import MAX_STRANGE_BYTES, Rendezvous
from weightbus.errors import ProtocolError
from weightbus.hub import flood_guard as guard
from weightbus.hub import reassembly as unfinished
from weightbus.hub.coordinator import MAX_LEAP
from weightbus.hub.reassembly import Unfinished
from weightbus.hub.roster import LISTED, Roster
from weightbus.hub.server import Hub

# -- the loop --------------------------------------------------------------------------------------

OLD = [
    b"\x01\x00\x02\x00a",  # ZMTP 1.0: no name, and one message
    b"\xff" + bytes(7) + b"\x01\x7f\x01\x05\x00\x00\x00\x01a",  # ZMTP 2.0
    b"\xff" + bytes(7) + b"\x01\x7f\x01\x06\x00\x00\x01\x01a\x00\x01b",
]


@pytest.mark.parametrize("greeting", [*OLD, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_connections_of_old_protocols_are_closed(stage, crowd, greeting):  # noqa: F811
    with socket.create_connection(tcp(stage.address), timeout=10) as old, contextlib.suppress(ConnectionError):
        old.sendall(greeting)
        while old.recv(1000):
            pass
    assert update(crowd, 1)[0].ok
    assert stage.hub.counts["refused"] == stage.hub.counts["errors"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_connections_by_hand_hinder_nobody(stage, crowd, seed):  # noqa: F811
    """Greetings of every ZMTP, frames that boast, HTTP: a short run of what fuzz_hub.py does at length."""
    host, port = stage.address.removeprefix("tcp://").split(":")
    rng = seeded(seed)
    for number in range(100):
        sent = raw_sockets.zmtp(rng, PAYLOADS) if number % 4 else raw_sockets.http(rng)
        raw_sockets.connect((host, int(port)), sent)
        if number % 20 == 0:
            assert update(crowd, number + 1)[0].ok
    assert update(crowd, 1000)[0].ok
    assert stage.hub.counts["errors"] == 0


@pytest.mark.parametrize("where", ["_tick", "_watch", "_bound", "_flush", "_take", "_tick_job"])
def test_a_fault_anywhere_in_the_loop_is_counted_and_ends_nothing(stage, crowd, monkeypatch, where):  # noqa: F811
    broken, right = [], getattr(stage.hub, where)

    def fails(*arguments):
        if len(broken) < 3:
            broken.append(1)
            raise RuntimeError("a fault")
        return right(*arguments)

    monkeypatch.setattr(stage.hub, where, fails)
    crowd.run(lambda: len(broken) == 3, 10)
    assert update(crowd, 1, timeout_s=20)[0].ok
    assert stage.hub.counts["errors"] == 3


# -- memory ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.booleans()), max_size=60))
def test_unfinished_messages_never_take_more_than_their_room(pieces):
    """Whatever comes from whom: what is kept is counted, and what comes whole is what was sent."""
    room: Unfinished[int] = Unfinished(together=100)
    sent: dict[int, bytes] = {}
    for number, (key, nbytes, last) in enumerate(pieces):
        blob = bytes([number]) * nbytes
        try:
            whole = room.add(key, blob, last=last, each=60, now=float(number))
        except ProtocolError:
            sent.pop(key, None)
        else:
            expected = sent.pop(key, b"") + blob
            assert len(expected) <= 60
            if last:
                assert whole == expected
            else:
                sent[key] = expected
        assert room.nbytes == sum(map(len, sent.values())) <= 100
    room.expire(len(pieces) + unfinished.STALLED_S + 1.0)
    assert (len(room), room.nbytes) == (0, 0)


def test_what_nobody_waits_for_is_short(stage, crowd):  # noqa: F811
    """Pieces of a rank that is in no round are refused where they would be long."""
    for _ in range(unfinished.MAX_IDLE_BYTES // m.PIECE_BYTES + 2):
        piece = m.Piece(peer=crowd.trainer.peer, blob=bytes(m.PIECE_BYTES), last=False)
        crowd.trainer.socket.send_multipart(wire.encode(piece))
    assert crowd.run(lambda: stage.hub.counts["refused"] > 0, 20)
    assert stage.hub.members.pieces.nbytes <= unfinished.MAX_IDLE_BYTES


def test_answers_that_nobody_reads_are_bounded_in_bytes(stage, crowd, monkeypatch):  # noqa: F811
    """By a member that asks for a long value again and again: the others go on."""
    monkeypatch.setattr(guard, "MAX_UNREAD_BYTES", 4 << 20)
    deaf = stage.connect(rcvhwm=1, rcvbuf=4096)
    value = m.StoreSet(peer=crowd.trainer.peer, call=1, key="0/k", value=bytes(200_000))
    deaf.send_multipart(wire.encode(value))
    for call in range(2, 200):
        deaf.send_multipart(wire.encode(m.StoreGet(peer=crowd.trainer.peer, call=call, key="0/k")))
    assert crowd.run(lambda: stage.hub.counts["unread"] > 0, 20)
    most = max(connection.unread for connection in stage.hub._guard._connections.values())
    assert most <= 4 << 20
    assert update(crowd, 1)[0].ok


def test_a_store_has_little_room_for_ranks_without_a_group():
    store = Rendezvous()
    value = bytes(1 << 20)
    for number in range((MAX_STRANGE_BYTES >> 20) - 1):
        store.call(m.StoreSet(peer="p", call=1, key=f"0/{number}", value=value), 0, member=False)
    with pytest.raises(ProtocolError, match="without a group"):
        store.call(m.StoreSet(peer="p", call=1, key="0/more", value=value), 0, member=False)
    assert store.nbytes <= MAX_STRANGE_BYTES
    store.call(m.StoreSet(peer="p", call=1, key="0/own", value=value), 0, member=True)


def test_a_round_notes_only_so_much(monkeypatch):
    monkeypatch.setattr("weightbus.hub.round.MAX_FAILURES", 5)
    room = Room(trainers=2)
    for version in range(20):
        room.enter("t0", version=version)
    assert len(room.hub.round.failures) == 5


# -- work ------------------------------------------------------------------------------------------


def hello(number, **changes):
    given = {"role": "server", "rank": 0, "size": 1, "replica": number} | changes
    return m.Hello(process=f"p{number}", host="h", pid=1, device="cpu", **given)


def test_sizes_that_are_only_named_cost_nothing():
    roster = Roster(dead_after_s=10.0)
    for number in range(50):
        roster.admit(hello(number, size=1 << 20), f"s{number}", 0.0)
    roster.admit(hello(99, role="trainer", size=1 << 20), "t", 0.0)
    begun = time.process_time()
    for _ in range(100):
        lines = [": ".join(line) for line in roster.missing((), 1)]
    assert time.process_time() - begun < 1.0
    assert sum(map(len, lines)) < 4000
    assert len(lines) <= LISTED + 3
    assert f"{(1 << 20) - 1 - LISTED} more of {1 << 20} have not joined" in "\n".join(lines)


def test_many_joins_are_quick():
    room = Room()
    room.enter("t0", min_replicas=20_000)
    begun = time.process_time()
    for number in range(3000):
        peer = room.hub.roster.admit(hello(number + 1), f"x{number}", 0.0)
        room.hub.joined(peer, 0.0)
    assert time.process_time() - begun < 10.0
    assert len(room.hub.roster.complete()) == 3001


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 2)), max_size=60))
def test_the_roster_knows_what_its_peers_say(moves):
    """Its tables are those that its peers' roles give, whoever comes and goes."""
    roster = Roster(dead_after_s=10.0)
    for comes, number, rank in moves:
        name = f"p{number}"
        if comes and name not in roster.peers:
            roster.admit(hello(number, rank=rank, size=2, replica=number % 2), name, 0.0)
        elif not comes and name in roster.peers:
            roster.remove(roster.peers[name])
        ranks: dict[int, set[int]] = {}
        for peer in roster.peers.values():
            ranks.setdefault(peer.server.replica, set()).add(peer.server.rank)
        assert {replica: set(found) for replica, found in roster.replicas().items()} == ranks
        assert roster.complete() == sorted(replica for replica, found in ranks.items() if len(found) == 2)
        assert all(roster.known(peer.process) is peer for peer in roster.peers.values())


# -- time ------------------------------------------------------------------------------------------


def test_a_task_that_cannot_start_keeps_none_behind_it():
    desk = Desk(servers=1)
    desk.hub.tasks.ask(b"gone", ask(SaveTask(path="/p", modules=None, version=None, file_bytes=1)), 0.0)
    desk.join("r1", "server", 1, 2, replica=1)
    desk.ask(LoadTask(path="/m", replica=1), wait_s=1e6)
    desk.ask(LoadTask(path="/m", replica=0))
    assert "s0" in {peer for peer, _ in desk.heard()}


def ask(task, wait_s=1e6):
    return m.AskTask(id="i", hub="h", task=task, wait_s=wait_s, run_s=1e6)


@pytest.mark.parametrize("step", ["waiting", "PREPARE", "READY", "RUN"])
def test_a_task_whose_client_has_gone_ends_where_nothing_is_written(step):
    desk = Desk(servers=1)
    replica = 1 if step == "waiting" else 0
    if step == "waiting":
        desk.join("r1", "server", 1, 2, replica=1)
    desk.ask(LoadTask(path="/m", replica=replica), wait_s=1e6, run_s=1e6)
    if step in ("READY", "RUN"):
        desk.tell(m.Facts, "s0", blob=b"")
    if step == "RUN":
        desk.tell(m.Ready, "s0")
    desk.hub.tasks.gone(b"client", desk.now)
    assert bool(desk.hub.tasks.running) == (step == "RUN")
    assert not desk.hub.tasks.waiting


def test_tasks_of_different_replicas_go_on_side_by_side():
    desk = Desk(servers=1)
    desk.join("r1", "server", 0, 1, replica=1)
    for replica in (0, 1, 0):
        desk.ask(LoadTask(path="/m", replica=replica))
    assert [one.members[0].server.replica for one in desk.hub.tasks.running] == [0, 1]
    assert desk.hub.tasks.waiting == 1


def test_no_task_starts_while_an_update_waits_for_nothing_else():
    desk = Desk(servers=1)
    desk.ask(LoadTask(path="/m"))
    desk.enter("t0")
    desk.ask(LoadTask(path="/m"))
    desk.tell(m.Refuse, "s0", reason="no")
    desk.wait(1.0)
    assert not desk.hub.tasks.running
    assert desk.hub.round.phase.name != "ENTER"


# -- what is believed ------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    version=st.integers(0, (1 << 62) - 1),
    epoch=st.integers(0, (1 << 62) - 1),
    size=st.integers(1, 2),
    group=st.sampled_from(["", "other"]),
    stays=st.booleans(),
)
def test_a_stranger_says_nothing_of_versions_and_leaves_room_for_epochs(version, epoch, size, group, stays):
    room = Room()
    held = m.Held(version=version, epoch=epoch, group=group, members=2)
    peer = room.hub.roster.admit(hello(9, size=size, held=held), "x", 0.0)
    room.hub.joined(peer, 0.0)
    if not stays:
        room.drop("x")
    room.enter("t0", version=1)
    assert not room.hub.round.failures
    assert room.hub.epoch < 1 << 61


def test_the_trainer_and_its_group_are_believed():
    room = Room(trainers=0, servers=0)
    for number, (role, version) in enumerate((("server", 9), ("trainer", 7))):
        said = m.Held(version=version, epoch=3, group="g", place=number, members=2, incarnation=1)
        peer = room.hub.roster.admit(hello(number, role=role, replica=0, held=said), role, 0.0)
        room.hub.joined(peer, 0.0)
    room.enter("trainer", version=9)
    (outcome,) = [message for _, message in room.heard() if isinstance(message, m.Outcome)]
    assert "expected one above 9" in str(outcome.failures[0])


def test_of_its_own_updates_a_hub_believes_nobody():
    """A member that has heard the seed says that it was committed: another one that asks is not told so."""
    room = Room(servers=2)
    room.hub._rebuilt.drawn(b"s" * 32)
    for number, seed in enumerate(("sealed", "unheard")):
        held = m.Held(epoch=1, group="g", members=2, place=number, **{seed: b"s" * 32})
        room.hub.joined(room.hub.roster.admit(hello(5 + number, held=held), f"x{number}", 0.0), 0.0)
    assert not room.heard()


@pytest.mark.parametrize("version", [MAX_LEAP + 1, (1 << 62) - 1])
def test_a_label_leaves_room_for_versions(version):
    room = Room()
    assert f"expected at most {MAX_LEAP}" in room.hub.unfit_version(version)
    assert not room.hub.unfit_version(MAX_LEAP)


def test_no_member_is_told_by_what_the_hub_knows_another():
    room = Room(trainers=2, servers=2)
    for rank in range(2):
        room.enter(f"t{rank}")
    told = {member.peer for _, offer in room.heard() if isinstance(offer, m.Offer) for member in offer.members}
    assert told == {m.member_id(peer) for peer in room.hub.roster.peers}
    assert not told & room.hub.roster.peers.keys()


# -- names of connections ---------------------------------------------------------------------------

# Where libzmq begins to count where C's rand() is not seeded.
UNSEEDED = 0x6B8B4567


def test_a_peer_that_takes_the_next_name_ends_no_hub(address):
    """libzmq ends the process where a name that it gives is taken: it must not be known beforehand."""
    taken, nameless = [], zmq.Context()
    with served(address) as hub:
        try:
            for number in range(64):
                taken.append(socket.create_connection(tcp(address), timeout=5))
                taken[-1].sendall(raw_sockets.named(b"\0" + (UNSEEDED + number).to_bytes(4, "big")))
                assert taken[-1].recv(64, socket.MSG_WAITALL)
            for _ in range(80):
                with nameless.socket(zmq.DEALER) as one:
                    one.connect(address)
                    one.send_multipart(wire.encode(a.AskStatus(id="i", past=0)))
                    assert one.poll(5000), f"no answer; the hub has ended with {hub.poll()}"
            assert hub.poll() is None
        finally:
            nameless.destroy(linger=0)
            for connection in taken:
                connection.close()


def test_what_is_for_a_rank_goes_to_nobody_who_guesses_its_name(stage):  # noqa: F811
    """All connections of ranks and clients have names of their own."""
    link = Link(stage.address)
    client = weightbus.Client(stage.address)
    try:
        link.join(role="server", rank=0, size=2, replica=0, device="cpu", timeout_s=20)
        client.status()
        with contextlib.closing(link.connect()) as further:
            further.send(m.StoreCount(peer=link.peer, call=1))
            assert further.receive(5)
            beaten = time.monotonic() + 5
            while len(names := set(stage.hub._guard._of)) < 4:
                assert time.monotonic() < beaten
                time.sleep(0.05)
        assert all(len(name) == 16 for name in names), names
    finally:
        client.close()
        link.close()


# -- who has gone ----------------------------------------------------------------------------------

HELD = """
import os, sys, time
from weightbus.control.link import Link
link = Link(sys.argv[1])
link.join(role="server", rank=0, size=2, replica=0, device="cpu", timeout_s=20)
if len(sys.argv) > 2 and not os.fork():
    time.sleep(20)  # holds what it was left with
    os._exit(0)
print("here", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("forks", [False, True])
def test_a_rank_that_is_killed_is_missed_at_once(stage, forks):  # noqa: F811
    arguments = (stage.address, "forks") if forks else (stage.address,)
    rank = start_python("-c", HELD, *arguments, stdout=subprocess.PIPE, start_new_session=True)
    assert rank.stdout is not None
    try:
        assert rank.stdout.readline() == b"here\n"
        rank.kill()
        begun = time.monotonic()
        while stage.hub.coordinator.roster.peers:
            assert time.monotonic() - begun < 5.0
            time.sleep(0.01)
    finally:
        os.killpg(rank.pid, 9)
        rank.wait(10)
        rank.stdout.close()


def test_a_host_that_vanishes_is_missed_on_both_ends():
    """Nothing says that it has gone: no packet comes or goes any more."""
    if reason := why_not():
        pytest.skip(reason)
    insecure = Keys(insecure=True)
    with two_hosts() as (one, two), ThreadPoolExecutor(1) as here, ThreadPoolExecutor(1) as there:
        here.submit(one.enter).result()
        there.submit(two.enter).result()
        address = f"tcp://{one.address}:5757"
        hub = here.submit(Hub, address, keys=insecure).result()
        served = here.submit(hub.serve)
        context = zmq.Context()
        idle = there.submit(Connection, context, address, insecure, watched=True).result()
        try:
            idle.send(a.AskStatus(id="i", past=0))
            assert idle.receive(10)
            one.vanish()
            deadline = time.monotonic() + 50
            while len(hub._guard) or not idle.closed_s():
                assert time.monotonic() < deadline
                time.sleep(0.2)
        finally:
            hub.stop()
            served.result(10)
            idle.close()
            context.term()
