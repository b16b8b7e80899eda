"""Bad input of every kind at a live hub: refused, counted, and no hindrance to anyone else."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import broken, structured
from seeded import seeded
from simulated import Crowd, enter
from zmq.utils import z85

import weightbus
from weightbus.control import client_messages as a
from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.errors import ProtocolError
from weightbus.hub import flood_guard as guard
from weightbus.hub import listener, membership
from weightbus.hub.roster import MAX_PEERS
from weightbus.hub.server import Hub

HELLO = m.Hello(process="p", host="h", pid=1, device="cpu", role="server", rank=0, size=1)
SEED = bytes(32)

SAMPLES: list[m.Message] = [
    HELLO,
    m.Hello(
        process="q", host="h", pid=2, device="cuda", role="trainer", rank=1, size=2,
        held=m.Held(epoch=9, place=1, members=2, group="g", plans=["p"], version=3, sealed=SEED, unheard=SEED),
    ),
    m.Beat(peer="p", state="torn", version=7),
    m.Leave(peer="p", role="server"),
    m.Piece(peer="p", blob=b"x", last=True),
    m.Enter(
        peer="p", kind="check", version=1, modules=["a"], verify=True, facts="f",
        settings=m.Settings(bucket_bytes=64), min_replicas=1,
        join_s=1.0, ready_s=1.0, transfer_s=1.0, jobs=[m.Job(version=1, plan="p", seed=SEED, modules=None)],
    ),
    m.Facts(peer="p", update=1, blob=b"facts"),
    m.Ready(peer="p", update=1, plan="p"),
    m.Refuse(peer="p", update=1, reason="no"),
    m.Done(
        peer="p", update=1, sent=[m.Fold(job=0, group=0, sums=(1, 2), nbytes=3)], partial={"a": "b"},
        stages={"send": 0.1},
    ),
    m.Sums(peer="p", update=1, live=[m.TensorSums(job=0, group=0, sums={"a": (1, 2)})]),
    m.Clues(peer="p", update=1, clues=[]),
    m.Probed(peer="p", update=1, sums=[[(1, 2)]]),
    m.Poll(peer="p", number=1),
    m.Later(peer="p", update=1),
    m.Await(peer="p", number=1, version=3, wait_s=1.0),
    m.Cancel(peer="p", reason="no"),
    a.AskStatus(id="i", past=16),
    a.AskUpdate(id="i", hub="h", wait_s=1.0, version=3, modules=["a"]),
    a.AskCheck(id="i", hub="h", wait_s=1.0),
    a.AskVersion(id="i", hub="h", wait_s=1.0, version=5),
    a.AskPause(id="i", hub="h", for_s=5.0),
    a.AskResume(id="i", hub="h"),
    m.AskTask(
        id="i", hub="h", task=m.LoadTask(), wait_s=1.0, run_s=1.0,
        frames=[m.Frame(place=0, module=None, nbytes=3)], payloads=[b"abc"],
    ),
    m.AskTask(
        id="i", hub="h", task=m.SaveTask(path="p", modules=None, version=1, file_bytes=1), wait_s=1.0, run_s=1.0
    ),
    m.AskTask(id="i", hub="h", task=m.ProbeTask(replica=0, question="q"), wait_s=1.0, run_s=1.0),
    m.AskReplicas(id="i"),
    m.StoreSet(peer="p", call=1, key="k", value=b"v"),
    m.StoreGet(peer="p", call=1, key="k"),
    m.StoreAdd(peer="p", call=1, key="k", amount=1),
    m.StoreCheck(peer="p", call=1, keys=["k"]),
    m.StoreDelete(peer="p", call=1, key="k"),
    m.StoreCount(peer="p", call=1),
]  # fmt: skip
PAYLOADS = [wire.encode(sample)[1] for sample in SAMPLES]


class Stage:
    """A live hub in a thread, and connections to it."""

    def __init__(self, address, **options):
        self.address = address
        self.hub = Hub(address, **options)
        self._thread = threading.Thread(target=self.hub.serve)
        self._thread.start()
        self.context = zmq.Context()
        self._sockets = []

    def connect(self, **options):
        socket = self.context.socket(zmq.DEALER)
        socket.linger, socket.sndtimeo = 0, 10_000
        for name, value in options.items():
            setattr(socket, name, value)
        socket.connect(self.address)
        self._sockets.append(socket)
        return socket

    def counts(self):
        with weightbus.Client(self.address) as client:
            return Counter(client.status(0).counts)

    def close(self):
        for one in self._sockets:
            one.close()
        self.context.term()
        self.hub.stop()
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def stage(address):
    stage = Stage(address)
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def shared():
    from processes import free_address

    stage = Stage(free_address())
    yield stage
    stage.close()


@pytest.fixture
def crowd(stage):
    """A trainer rank and two servers that are nothing but their messages, members of the hub."""
    crowd = Crowd(stage.address)
    crowd.trainer = crowd.join("trainer", 0, 1)
    for rank in range(2):
        crowd.join("server", rank, 2)
    assert crowd.run(lambda: all(rank.is_member for rank in crowd.ranks.values()), 10)
    yield crowd
    crowd.close()


def update(crowd, version, timeout_s=10.0):
    """One update of the crowd's; its outcome and seconds."""
    heard = len(crowd.trainer.outcomes)
    begun = time.monotonic()
    crowd.trainer.send(enter(crowd.trainer, version))
    assert crowd.run(lambda: len(crowd.trainer.outcomes) > heard, timeout_s), "no outcome"
    return crowd.trainer.outcomes[-1], time.monotonic() - begun


def test_the_samples_are_all_kinds_of_messages():
    assert {type(sample) for sample in SAMPLES} == set(wire.ToHub.__args__)
    for sample, payload in zip(SAMPLES, PAYLOADS, strict=True):
        assert wire.decode_to_hub([wire.HEADER, payload]) == sample


# -- fuzz ------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@st.composite
def faulty(draw):
    """A sample with one field dropped, added or replaced by anything."""
    fields = msgspec.msgpack.decode(draw(st.sampled_from(PAYLOADS)))
    key = draw(st.sampled_from([*fields, "extra"]))
    if draw(st.booleans()):
        fields[key] = draw(values)
    else:
        fields.pop(key, None)
    return [wire.HEADER, msgspec.msgpack.encode(fields)]


frames = faulty() | st.lists(st.binary(max_size=200), max_size=4) | st.binary(max_size=300).map(
    lambda payload: [wire.HEADER, payload]
) | st.integers(0, 2**32).map(lambda seed: broken(PAYLOADS, seeded(seed))) | st.integers(0, 2**32).map(
    lambda seed: structured(PAYLOADS, seeded(seed))
)  # fmt: skip


@given(frames)
@settings(max_examples=400, deadline=None)
def test_decoding_refuses_or_returns(sent):
    try:
        message = wire.decode_to_hub(sent)
    except ProtocolError:
        return
    assert wire.decode_to_hub(wire.encode(message)) == message or "nan" in repr(message)


@given(st.lists(frames, min_size=1, max_size=20))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_hub_lives_on_whatever_it_is_sent(shared, sent):
    """It answers the next request, has had no fault of its own, and nobody has become a member."""
    socket = shared.connect()
    for one in sent:
        if one:
            socket.send_multipart(one)
    socket.send_multipart(wire.encode(a.AskStatus(id="last")))
    while True:
        assert socket.poll(10_000), "no answer"
        answer = wire.decode_from_hub(socket.recv_multipart())
        if isinstance(answer, a.Status) and answer.id == "last":
            break
    assert answer.counts.get("errors", 0) == 0
    assert (answer.peers, answer.paused_s, answer.requests) == ([], 0.0, 0)


# -- what is not believed --------------------------------------------------------------------------


def test_a_hello_alone_takes_no_place(stage, crowd):
    """Hellos that are played again get a welcome to nothing: the place is free for who answers it."""
    replay = stage.connect()
    for _ in range(5):
        replay.send_multipart(wire.encode(m.Hello(**{**fields(HELLO), "replica": 3})))
        assert replay.poll(5000)
        assert isinstance(wire.decode_from_hub(replay.recv_multipart()), m.Welcome)
    outcome, _ = update(crowd, 1)
    assert (outcome.verdict, outcome.replicas) == ("verified", [0])


def fields(message):
    return {name: getattr(message, name) for name in message.__struct_fields__}


def test_another_connection_can_not_speak_for_a_rank(stage, crowd):
    """Nor join with a welcome that was not for it."""
    thief = stage.connect()
    for message in (
        m.Leave(peer=crowd.trainer.peer, role="trainer"),
        enter(crowd.trainer, 7),
        m.Piece(peer=crowd.trainer.peer, blob=b"x" * 1000, last=False),
        m.Poll(peer=crowd.trainer.peer, number=1),
    ):
        thief.send_multipart(wire.encode(message))
        assert thief.poll(5000)
        answer = wire.decode_from_hub(thief.recv_multipart())
        assert isinstance(answer, m.Alive)
        assert not answer.known
    one, two = stage.connect(), stage.connect()
    one.send_multipart(wire.encode(HELLO))
    one.poll(5000)
    welcome = wire.decode_from_hub(one.recv_multipart())
    if isinstance(welcome, m.Welcome):
        two.send_multipart(wire.encode(m.Beat(peer=welcome.peer)))
        two.poll(5000)
        assert not wire.decode_from_hub(two.recv_multipart()).known
    assert stage.counts()["unknown"] >= 4
    assert update(crowd, 1)[0].ok


def test_requests_recorded_at_another_hub_are_not_done(stage, crowd):
    replay = stage.connect()
    for ask in SAMPLES:
        if isinstance(ask, a.Command):
            replay.send_multipart(wire.encode(ask))
            assert replay.poll(5000)
            answer = wire.decode_from_hub(replay.recv_multipart())
            assert (answer.ok, answer.reason) == (False, "hub: expected this hub's token")
    with weightbus.Client(stage.address) as client:
        status = client.status()
    assert (status.paused_s, status.requests) == (0.0, 0)


def test_answers_of_another_round_are_dropped_and_counted(stage, crowd):
    old, _ = update(crowd, 1)
    others = [old.header._replace(update=number) for number in (0, old.update, old.update + 2)]
    others += [old.header._replace(**{name: 99}) for name in ("incarnation", "epoch")]
    for header in others:
        crowd.trainer.header = header
        crowd.trainer.send(m.Done(peer=crowd.trainer.peer, error="old"))
    crowd.trainer.header = old.header._replace(update=0)
    assert update(crowd, 2)[0].ok
    assert stage.counts()["stale"] == len(others)


def test_the_members_travel_once_in_an_epoch(stage, crowd, monkeypatch):
    offers = []
    hear = type(crowd.trainer).hear

    def listening(rank, message):
        if isinstance(message, m.Offer):
            offers.append((rank.hello.role, len(message.members), len(wire.encode(message)[1])))
        hear(rank, message)

    monkeypatch.setattr(type(crowd.trainer), "hear", listening)
    update(crowd, 1)
    update(crowd, 2)
    assert [members for _, members, _ in offers] == [3, 3, 3, 0, 0, 0]
    assert all(nbytes < 1000 for *_, nbytes in offers[3:])


# -- floods, and those who do not read -------------------------------------------------------------


def test_a_flood_does_not_keep_others_waiting(stage, crowd):
    update(crowd, 1)
    stop = threading.Event()
    sent = Counter()

    def flood():
        rng = seeded(1)
        socket = stage.connect()
        while not stop.is_set():
            socket.send_multipart(broken(PAYLOADS, rng))
            sent["messages"] += 1
            while socket.poll(0):
                socket.recv_multipart()

    floods = [threading.Thread(target=flood) for _ in range(2)]
    for thread in floods:
        thread.start()
    try:
        # Ten updates may be over before the flood has risen, and before the hub has read much of it.
        deadline, seconds, found = time.monotonic() + 60, [], stage.hub.counts
        while (
            len(seconds) < 10 or sent["messages"] < 2000 or found["refused"] + found["muted"] <= 500
        ) and time.monotonic() < deadline:
            seconds.append(update(crowd, len(seconds) + 2)[1])
    finally:
        stop.set()
        for thread in floods:
            thread.join(15)
    assert sent["messages"] > 500
    assert max(seconds) < 5.0
    counts = stage.counts()
    assert counts["refused"] + counts["muted"] > 500
    assert counts["errors"] == counts["dropped"] == 0


def test_a_member_that_does_not_read_is_dropped_with_a_reason(stage, crowd, caplog):
    """And the others hear of it at once, not after a deadline."""
    caplog.set_level("INFO", "weightbus.hub")
    deaf = crowd.join("server", 0, 1, replica=1)
    deaf.socket.rcvhwm = 1
    assert crowd.run(lambda: deaf.is_member, 10)
    crowd._poller.unregister(deaf.socket)
    big = "n" * 1000
    long = m.Outcome(
        update=0, ok=False, moved=False, verdict="failed", partial={big + str(i): big for i in range(300)}
    )
    stage.hub.coordinator.outbox += [(deaf.peer, long)] * (20 * listener.MAX_UNREAD)
    outcome, seconds = update(crowd, 1)
    assert crowd.run(lambda: stage.counts()["slow"] == 1, 10)
    assert "replica 1 server rank 0" in caplog.text
    assert f"reads too slowly: {listener.MAX_UNREAD} messages unread" in caplog.text
    assert outcome.ok or "reads too slowly" in str(outcome.failures[0])
    assert seconds < 5
    assert update(crowd, 2)[0].replicas == [0]


@pytest.mark.parametrize("nbytes", [1, 1000, 200_000])
def test_one_message_of_endless_frames_is_cut(stage, crowd, nbytes):
    """ZeroMQ itself would keep the frames of an unfinished message without end. By hand, in ZMTP 3.0."""
    host, port = stage.address.removeprefix("tcp://").split(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 32)
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    frame = b"\x03" + struct.pack(">Q", nbytes) + bytes(nbytes)  # long, and more to come
    frame *= 1 + 50_000 // len(frame)
    sent = 0
    with socket.create_connection((host, int(port)), timeout=10) as endless:
        endless.sendall(greeting + b"\x04" + bytes([len(ready)]) + ready)
        while not endless.recv(1000).endswith(b"Identity" + bytes(4)):
            pass
        deadline = time.monotonic() + 20
        with contextlib.suppress(ConnectionError):
            while sent < 1 << 30 and time.monotonic() < deadline:
                endless.sendall(frame)
                sent += len(frame)
                time.sleep(0.01)
    assert guard.MAX_UNWHOLE_BYTES < sent < 1 << 30, (stage.hub.counts, stage.hub._guard._connections)
    assert stage.hub.counts["cut"] == 1
    assert update(crowd, 1)[0].ok


def test_idle_and_foreign_connections_hinder_nobody(stage, crowd):
    host, port = stage.address.removeprefix("tcp://").split(":")
    opened = []
    for word in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 10, bytes(5000)) * 20:
        connection = socket.create_connection((host, int(port)), timeout=5)
        connection.sendall(word)
        opened.append(connection)
    assert update(crowd, 1)[0].ok
    for connection in opened:
        connection.close()
    assert update(crowd, 2)[0].ok


def test_a_frame_beyond_the_limit_ends_its_connection_only(stage, crowd):
    other = stage.connect()
    other.send_multipart([wire.HEADER, bytes(m.MAX_FRAME_BYTES + 1)])
    assert update(crowd, 1)[0].ok
    assert stage.hub.counts["refused"] == 0  # it never came through


def test_long_messages_come_in_pieces_from_members_only(stage, crowd):
    blob = seeded(0).randbytes(3 * m.PIECE_BYTES)
    facts = m.Facts(peer=crowd.trainer.peer, update=12345, blob=blob)
    pieces = wire.encode_to_hub(facts, crowd.trainer.peer)
    assert len(pieces) == 4
    for piece in pieces:
        crowd.trainer.socket.send_multipart(piece)
    stranger = stage.connect()
    for piece in wire.encode_to_hub(facts, "nobody"):
        stranger.send_multipart(piece)
    deadline = time.monotonic() + 10
    while stage.hub.counts["stale"] != 1 or stage.hub.counts["unknown"] != 4:  # whole, and of no round
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not stage.hub.members.pieces


def test_pieces_without_end_are_refused(stage, crowd, monkeypatch):
    monkeypatch.setattr(membership, "MAX_IDLE_BYTES", 1 << 20)
    for _ in range(5):
        piece = m.Piece(peer=crowd.trainer.peer, blob=bytes(m.PIECE_BYTES), last=False)
        crowd.trainer.socket.send_multipart(wire.encode(piece))
    deadline = time.monotonic() + 10
    while not stage.hub.counts["refused"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert stage.hub.members.pieces.nbytes <= m.PIECE_BYTES


def test_hellos_and_peers_are_bounded(stage):
    many = Crowd(stage.address)
    for rank in range(50):
        many.join("server", rank, 50)
    try:
        assert many.run(lambda: all(rank.is_member for rank in many.ranks.values()), 20)
        stage.hub.coordinator.roster.peers.update(
            {str(i): next(iter(stage.hub.coordinator.roster.peers.values())) for i in range(MAX_PEERS)}
        )
        late = stage.connect()
        late.send_multipart(wire.encode(m.Hello(**{**fields(HELLO), "replica": 9})))
        assert late.poll(5000)
        assert f"expected at most {MAX_PEERS} ranks" in wire.decode_from_hub(late.recv_multipart()).reason
    finally:
        for i in range(MAX_PEERS):
            stage.hub.coordinator.roster.peers.pop(str(i), None)
        many.close()


def test_z85_has_no_space_or_comma():
    """Which part keys in lists."""
    assert not set(b" ,\n") & set(z85.Z85CHARS)


def test_many_simulated_ranks(stage):
    """The benchmark's crowd, small: the first update exchanges facts, the next one is planned."""
    many = Crowd(stage.address)
    for rank in range(64):
        many.join("server", rank % 8, 8, rank // 8)
    many.trainer = many.join("trainer", 0, 1)
    try:
        assert many.run(lambda: all(rank.is_member for rank in many.ranks.values()), 20)
        for version in (1, 2, 3):
            outcome, seconds = update(many, version, timeout_s=20)
            assert (outcome.verdict, outcome.servers, outcome.replicas) == ("verified", 64, list(range(8)))
            assert seconds < 10
    finally:
        many.close()


# -- requests that carry tensors -------------------------------------------------------------------


def in_pieces(hub, nbytes):
    frame = m.Frame(place=0, module=None, nbytes=nbytes)
    ask = m.AskTask(
        id="i", hub=hub, task=m.LoadTask(), wait_s=0.2, run_s=1.0, frames=[frame], payloads=[bytes(nbytes)]
    )
    return wire.encode_to_hub(ask, "")


def test_a_clients_tensors_come_in_pieces(stage):
    client = stage.connect()
    pieces = in_pieces(stage.hub.token, 3 * m.PIECE_BYTES)
    assert len(pieces) == 4
    for frames in pieces:
        client.send_multipart(frames)
    assert client.poll(10_000)
    answer = wire.decode_from_hub(client.recv_multipart())
    assert isinstance(answer, m.TaskEnd)
    assert not answer.ok
    assert "replica" in str(answer.failures[0])


def test_a_task_for_another_hub_is_not_done(stage):
    """A request that was recorded there may be played again here."""
    client = stage.connect()
    for frames in in_pieces("another", 10):
        client.send_multipart(frames)
    assert client.poll(10_000)
    end = wire.decode_from_hub(client.recv_multipart())
    assert isinstance(end, m.TaskEnd)
    assert (end.ok, end.moved) == (False, False)
    assert str(end.failures[0]) == "hub: expected this hub's token"


def test_pieces_of_anything_else_are_refused(stage):
    client = stage.connect()
    client.send_multipart(wire.encode(m.Piece(peer="", blob=PAYLOADS[0], last=True)))
    assert client.poll(10_000)
    assert "expected a request with tensors" in wire.decode_from_hub(client.recv_multipart()).reason


def test_requests_that_are_not_whole_share_one_room(stage, monkeypatch):
    monkeypatch.setattr(m, "MAX_PAYLOAD_BYTES", 5 * m.PIECE_BYTES)
    monkeypatch.setattr("weightbus.hub.reassembly.STALLED_S", 0.5)
    monkeypatch.setattr(stage.hub.clients.asked, "_together", 5 * m.PIECE_BYTES)
    slow, other = stage.connect(), stage.connect()
    for frames in in_pieces(stage.hub.token, 3 * m.PIECE_BYTES)[:3]:
        slow.send_multipart(frames)
    time.sleep(0.2)
    for frames in in_pieces(stage.hub.token, 3 * m.PIECE_BYTES):
        other.send_multipart(frames)
    assert other.poll(10_000)
    assert (
        "bytes in all messages that are not whole just now"
        in wire.decode_from_hub(other.recv_multipart()).reason
    )
    time.sleep(1.0)  # the slow one has stopped coming
    third = stage.connect()
    for frames in in_pieces(stage.hub.token, 3 * m.PIECE_BYTES):
        third.send_multipart(frames)
    assert third.poll(10_000)
    assert isinstance(wire.decode_from_hub(third.recv_multipart()), m.TaskEnd)
