"""The hub's tasks, without sockets: each step, each way to end, and how they keep out of the way of updates."""

from __future__ import annotations

import pytest
from test_protocol import Room, fold, only

from weightbus.control import messages as m
from weightbus.control.messages import LoadTask, ProbeTask, SaveTask
from weightbus.hub.coordinator import Phase
from weightbus.hub.tasks import GRACE_S, MAX_WAITING


class Desk(Room):
    """A room with a client, whose requests are numbered."""

    def ask(self, task, *, frames=(), wait_s=3.0, run_s=5.0, client=b"client"):
        payloads = [b"x" * frame.nbytes for frame in frames]
        request = m.AskTask(
            id=f"r{self.now}",
            hub="h",
            task=task,
            wait_s=wait_s,
            run_s=run_s,
            frames=list(frames),
            payloads=payloads,
        )
        self.hub.tasks.ask(client, request, self.now)
        self.hub.advance(self.now)

    def tell(self, kind, peer, **fields):
        going = self.hub.tasks.running[0] if self.hub.tasks.running else None
        message = kind(peer=peer, **fields)
        if going:
            message.stamp(going.header)
        return self.hub.answer(message, self.now)

    def end(self):
        """What the client has heard."""
        replies = [message for client, message in self.hub.tasks.replies if client == b"client"]
        self.hub.tasks.replies.clear()
        assert len(replies) <= 1
        return replies[0] if replies else None

    def info(self):
        return [(r.replica, r.joined, r.state, r.version) for r in self.hub.tasks.replicas("i", False).replicas]


def test_a_whole_load():
    desk = Desk(servers=2)
    desk.ask(LoadTask(path="/m"))
    sent = desk.heard()
    assert [(peer, type(message)) for peer, message in sent] == [("s0", m.TaskOffer), ("s1", m.TaskOffer)]
    assert [member.server.rank for member in sent[0][1].members] == [0, 1]
    desk.tell(m.Facts, "s0", blob=b"a")
    assert not desk.heard()
    desk.tell(m.Facts, "s1", blob=b"a")
    (_, gathered), _ = desk.heard()
    assert (gathered.of, gathered.blobs, gathered.holder) == ("prepare", [b"a"], {0: 0, 1: 0})
    desk.tell(m.Ready, "s0")
    desk.tell(m.Ready, "s1")
    assert [type(message) for _, message in desk.heard()] == [m.Go, m.Go]
    desk.tell(m.Done, "s0", version=7, verdict="verified")
    desk.tell(m.Done, "s1", version=7, verdict="partial", partial={"w": "cast"})
    assert [(o.ok, o.verdict) for _, o in only(desk.heard(), m.Outcome)] == [(True, "partial")] * 2
    end = desk.end()
    assert (end.ok, end.verdict, end.version, end.ranks, end.partial) == (True, "partial", 7, 2, {"w": "cast"})
    assert desk.info() == [(0, 2, "ready", 7)]


def test_a_whole_save_relays_twice():
    desk = Desk(trainers=2, servers=1)
    desk.ask(SaveTask(path="/m", modules=None, version=1, file_bytes=9))
    assert [peer for peer, _ in desk.heard()] == ["t0", "t1"]
    for kind, fields, then in (
        (m.Facts, {"blob": b"a"}, m.Gathered),
        (m.Ready, {}, m.Go),
        (m.Facts, {"blob": b"b"}, m.Gathered),
        (m.Done, {}, m.Outcome),
    ):
        desk.tell(kind, "t0", **fields)
        assert not desk.heard()
        desk.tell(kind, "t1", **fields)
        assert [type(message) for _, message in desk.heard()] == [then, then]
    assert desk.end().ok
    assert desk.info() == [(0, 1, "empty", None)]


def test_a_probe_hands_the_answers_to_the_client_in_order():
    desk = Desk(servers=2)
    desk.ask(ProbeTask(replica=0, question="q"))
    desk.heard()
    desk.tell(m.Facts, "s1", blob=b"one")
    desk.tell(m.Facts, "s0", blob=b"zero")
    assert desk.end().answers == [b"zero", b"one"]


def started(desk, step):
    desk.ask(LoadTask(path="/m"))
    if step != "PREPARE":
        desk.tell(m.Facts, "s0", blob=b"")
        desk.tell(m.Facts, "s1", blob=b"")
    if step == "RUN":
        desk.tell(m.Ready, "s0")
        desk.tell(m.Ready, "s1")
    assert desk.hub.tasks.running[0].step.name == step
    desk.heard()


@pytest.mark.parametrize("step", ["PREPARE", "READY", "RUN"])
@pytest.mark.parametrize("how", ["refuses", "dies", "is silent"])
def test_one_rank_ends_it_for_all_and_is_named(step, how):
    """Before go nothing has moved; after it, ranks may be torn."""
    desk = Desk(servers=2)
    started(desk, step)
    if how == "refuses":
        fields = {"error": "no"} if step == "RUN" else {"reason": "no"}
        desk.tell(m.Done if step == "RUN" else m.Refuse, "s1", **fields)
    elif how == "dies":
        desk.drop("s1")
    desk.wait(5.0 if how == "is silent" else GRACE_S)
    sent = desk.heard()
    assert not only(sent, m.Go)
    end = desk.end()
    assert (end.ok, end.moved) == (False, step == "RUN")
    assert any("replica 0 server rank 1" in failure.rank for failure in end.failures)
    assert {o.moved for _, o in only(sent, m.Outcome)} == {step == "RUN"}
    if how != "dies":
        assert desk.info() == [(0, 2, "torn" if step == "RUN" else "empty", None)]
    assert not desk.hub.tasks.running


def test_an_update_of_some_modules_does_not_mend_the_others():
    """What is torn is said to be until a complete update, or until all ranks say that they are ready."""
    desk = Desk(servers=2)
    ranks = desk.hub.roster.replicas()[0].values()
    for peer in ranks:
        peer.state = "ready"
    desk.hub.tasks.saw([0], True, True, 1)
    desk.hub.tasks.saw([0], False, True, None)
    assert desk.info() == [(0, 2, "torn", None)]
    desk.hub.tasks.saw([0], True, True, 2, complete=False)
    assert desk.info() == [(0, 2, "torn", None)]
    for peer in ranks:  # their beats: that was all that was torn
        peer.state, peer.version = "ready", 2
    assert desk.info() == [(0, 2, "ready", 2)]
    desk.hub.tasks.saw([0], False, True, None)
    desk.hub.tasks.saw([0], True, True, 3)
    assert desk.info() == [(0, 2, "ready", 3)]


def test_a_payload_longer_than_a_rank_takes_is_refused(monkeypatch):
    monkeypatch.setattr(m, "MAX_MESSAGE_BYTES", 2)
    desk = Desk(servers=2)
    desk.ask(LoadTask(), frames=frames(0, 1))
    assert "payloads: expected at most 2 bytes in each, got 3" in str(desk.end().failures[0])
    assert not desk.hub.tasks.running


def frames(*places):
    return [m.Frame(place=place, module=None, nbytes=2 + place) for place in places]


@pytest.mark.parametrize(
    ("places", "got"), [((0,), [[2], [2]]), ((0, 1), [[2], [3]]), ((0, 0, 1), [[2, 2], [3]])]
)
def test_payloads_go_to_all_ranks_or_each_to_its_own(places, got):
    desk = Desk(servers=2)
    desk.ask(LoadTask(), frames=frames(*places))
    offers = [offer for _, offer in desk.heard()]
    assert [[len(payload) for payload in offer.payloads] for offer in offers] == got


@pytest.mark.parametrize("places", [(0, 1, 2), (1,), (0, 2)])
def test_another_number_of_payloads_is_refused(places):
    desk = Desk(servers=2)
    desk.ask(LoadTask(), frames=frames(*places))
    assert f"expected 1 for all ranks or 2, one for each, got {len(places)}" in str(desk.end().failures[0])
    assert not desk.heard()


def test_payloads_and_requests_are_bounded(monkeypatch):
    desk = Desk()
    monkeypatch.setattr(m, "MAX_PAYLOAD_BYTES", 3)
    desk.ask(LoadTask(), frames=frames(0, 0))
    assert "expected at most 3 bytes of payloads in all that wait, got 4" in str(desk.end().failures[0])
    desk.ask(LoadTask(), frames=frames(0))
    assert desk.end() is None  # it has started, so its payloads are the sockets' now
    desk.ask(LoadTask(), frames=frames(0))
    assert desk.end() is None
    desk.ask(LoadTask(), frames=frames(0))
    assert "got 4" in str(desk.end().failures[0])
    for number in range(MAX_WAITING - 1):
        desk.ask(LoadTask(path="/m"), client=b"client %d" % (number % 8))
    assert desk.hub.tasks.waiting == MAX_WAITING
    assert not desk.hub.tasks.replies
    desk.ask(LoadTask(path="/m"))
    assert f"expected at most {MAX_WAITING} requests to wait" in str(desk.end().failures[0])


def test_a_replica_must_be_complete_and_if_there_are_several_named():
    desk = Desk(servers=1)
    desk.join("r1", "server", 1, 2, replica=1)
    desk.ask(LoadTask(path="/m", replica=2))
    assert "expected one of the complete replicas [0], got 2 (ranks [])" in str(desk.end().failures[0])
    desk.ask(LoadTask(path="/m", replica=1))
    assert desk.end() is None  # its other rank may be just coming
    desk.wait(3.0)
    assert "expected one of the complete replicas [0], got 1 (ranks [1])" in str(desk.end().failures[0])
    desk.join("r0", "server", 0, 2, replica=1)
    desk.ask(LoadTask(path="/m"))
    assert "expected one of the complete replicas [0, 1], got none" in str(desk.end().failures[0])
    desk.ask(LoadTask(path="/m", replica=1))
    assert [peer for peer, _ in desk.heard()] == ["r0", "r1"]


def test_updates_and_tasks_wait_for_each_other():
    desk = Desk()
    desk.to_run()
    desk.ask(LoadTask(path="/m"), wait_s=30)
    assert not desk.heard()  # an update is going on
    desk.say(m.Done, "t0", sent=[fold(5)])
    desk.say(m.Done, "s0", live=[fold(5)])
    desk.wait(0.1)
    assert [type(message) for _, message in desk.heard()] == [m.Outcome, m.Outcome, m.TaskOffer]
    desk.enter("t0", version=2)
    assert not desk.heard()  # the load is going on
    assert desk.hub.round.phase is Phase.ENTER
    desk.tell(m.Refuse, "s0", reason="no")
    assert [type(message) for _, message in desk.heard()] == [m.Outcome, m.Offer, m.Offer]


def test_a_request_does_not_wait_for_ever():
    desk = Desk()
    desk.to_run()
    desk.ask(LoadTask(path="/m"), wait_s=2.0)
    desk.wait(2.0)
    assert "an update was going on" in str(desk.end().failures[0])


def test_answers_out_of_turn_change_nothing():
    desk = Desk(servers=1)
    desk.ask(LoadTask(path="/m"))
    assert not desk.tell(m.Ready, "s0")
    assert not desk.tell(m.Done, "s0")
    assert not desk.tell(m.Facts, "t0", blob=b"")
    assert not desk.hub.answer(m.Facts(peer="s0", update=99, blob=b""), 0.0)
    assert desk.tell(m.Facts, "s0", blob=b"")
    assert not desk.tell(m.Facts, "s0", blob=b"")
