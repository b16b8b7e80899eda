"""The hub's rounds, without sockets: fed messages and the time, looked at message by message."""

from __future__ import annotations

import pytest

from weightbus import messages as m
from weightbus.protocol import GRACE_S, Coordinator, Phase

NOTHING = {"min_replicas": 1, "join_s": 10.0, "ready_s": 5.0, "transfer_s": 20.0}


class Room:
    """A coordinator with trainer peers t0.. and server peers s0.. that the test speaks for."""

    def __init__(self, trainers=1, servers=1):
        self.hub = Coordinator(dead_after_s=2.0)
        self.now = 0.0
        for role, size in (("trainer", trainers), ("server", servers)):
            for rank in range(size):
                self.join(f"{role[0]}{rank}", role, rank, size)

    def join(self, name, role, rank, size, process=None, replica=0):
        hello = m.Hello(
            process=process or name,
            host="h",
            pid=1,
            device="cpu",
            role=role,
            rank=rank,
            size=size,
            replica=replica,
        )
        return self.hub.roster.admit(hello, name, self.now)

    def enter(self, peer, version=1, kind="update", verify=True, **changes):
        fields = NOTHING | {"modules": None, "facts": "f", "settings": "64"} | changes
        self.hub.enter(m.Enter(peer=peer, kind=kind, version=version, verify=verify, **fields), self.now)

    def say(self, kind, peer, **fields):
        return self.hub.answer(
            kind(peer=peer, update=self.hub.round.update if self.hub.round else 0, **fields), self.now
        )

    def heard(self):
        """What was sent since last time: (peer, message)."""
        sent = list(self.hub.outbox)
        self.hub.outbox.clear()
        return sent

    def drop(self, peer):
        self.hub.lost(self.hub.roster.peers.pop(peer), "died", self.now)

    def wait(self, seconds):
        self.now += seconds
        self.hub.advance(self.now)

    def to_run(self):
        """Through the survey and ready to RUN, for one trainer and one server."""
        self.enter("t0")
        self.say(m.Facts, "t0", blob=b"source")
        self.say(m.Facts, "s0", blob=b"want")
        self.say(m.Ready, "t0", plan="p")
        self.say(m.Ready, "s0", plan="p")
        return self.heard()


def fold(a, b=0, nbytes=8, group=0):
    return m.Fold(job=0, group=group, sums=(a, b), nbytes=nbytes)


def only(sent, kind):
    return [(peer, message) for peer, message in sent if isinstance(message, kind)]


def test_a_whole_update_and_a_planned_one():
    room = Room()
    sent = room.to_run()
    kinds = [(peer, type(message).__name__) for peer, message in sent]
    assert kinds == [
        ("t0", "Offer"), ("s0", "Offer"),
        ("t0", "Gathered"), ("s0", "Gathered"),
        ("t0", "Gathered"), ("s0", "Gathered"),
        ("t0", "Go"), ("s0", "Go"),
    ]  # fmt: skip
    assert len({message.seed for _, message in only(sent, m.Go)}) == 1
    room.say(m.Done, "t0", sent=[fold(5)])
    room.say(m.Done, "s0", live=[fold(5)])
    outcomes = only(room.heard(), m.Outcome)
    assert [(peer, o.ok, o.verdict, o.epoch) for peer, o in outcomes] == [
        ("t0", True, "verified", 1),
        ("s0", True, "verified", 1),
    ]
    room.enter("t0", version=2)
    ((_, offer), _) = room.heard()
    assert offer.planned
    assert room.hub.round.phase is Phase.READY
    room.say(m.Ready, "t0", plan="p")
    room.say(m.Ready, "s0", plan="p")
    assert [peer for peer, _ in only(room.heard(), m.Go)] == ["t0", "s0"]


def test_a_stale_rank_brings_a_new_survey():
    room = Room()
    room.to_run()
    room.say(m.Done, "t0", sent=[fold(5)])
    room.say(m.Done, "s0", live=[fold(5)])
    room.enter("t0", version=2)
    room.heard()
    room.say(m.Ready, "t0", plan="p")
    room.say(m.Ready, "s0", stale=True)
    assert [message.planned for _, message in only(room.heard(), m.Offer)] == [False, False]
    assert room.hub.round.phase is Phase.SOURCES


@pytest.mark.parametrize(
    ("sent", "live", "verdict", "reason"),
    [
        ([fold(5)], [fold(5)], "verified", None),
        ([fold(5)], [fold(5, nbytes=4)], "failed", "expected 8 bytes digested, got 4"),
        ([], [fold(5)], "failed", "expected no bytes digested, got 8"),
        ([fold(5)], [], "failed", "digested jobs [] only"),
        ([fold(0, 0, 0)], [fold(0, 0, 8)], "failed", "expected 0 bytes digested, got 8"),
    ],
)
def test_sums_without_the_bytes_are_no_proof(sent, live, verdict, reason):
    room = Room()
    room.to_run()
    room.say(m.Done, "t0", sent=sent)
    room.say(m.Done, "s0", live=live)
    room.wait(GRACE_S)
    ((_, outcome), _) = only(room.heard(), m.Outcome)
    assert outcome.verdict == verdict
    assert reason is None or reason in outcome.failures[0].reason


def test_differing_folds_are_resolved_to_tensors():
    room = Room()
    room.to_run()
    room.say(m.Done, "t0", sent=[fold(5)])
    room.say(m.Done, "s0", live=[fold(6)])
    assert [message.groups for _, message in only(room.heard(), m.Detail)] == [[(0, 0)]] * 2
    row = {"a": (1, 2), "b": (3, 4)}
    room.say(m.Sums, "t0", sent=[m.TensorSums(job=0, group=0, sums=row)])
    room.say(m.Sums, "s0", live=[m.TensorSums(job=0, group=0, sums=row | {"b": (3, 5)})])
    ((_, outcome), _) = only(room.heard(), m.Outcome)
    assert (outcome.ok, outcome.verdict, outcome.moved) == (False, "mismatch", True)
    assert [(f.tensor, f.rank) for f in outcome.failures] == [("b", "replica 0 server rank 0")]


PHASES = {
    Phase.SOURCES: [],
    Phase.WANTS: [(m.Facts, "t0", {"blob": b"x"})],
    Phase.READY: [(m.Facts, "t0", {"blob": b"x"}), (m.Facts, "s0", {"blob": b"y"})],
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["refuses", "dies", "is silent"])
def test_before_run_nothing_moves(phase, how):
    """Whatever goes wrong before RUN: one failed outcome for all, and no Go."""
    room = Room()
    room.enter("t0")
    for kind, peer, fields in PHASES[phase]:
        room.say(kind, peer, **fields)
    assert room.hub.round.phase is phase
    culprit = "t0" if phase is Phase.SOURCES else "s0"
    if how == "refuses":
        room.say(m.Refuse, culprit, reason="no")
    elif how == "dies":
        room.drop(culprit)
    if phase is Phase.READY:
        room.say(m.Ready, "t0", plan="p")
    room.wait(GRACE_S if how != "is silent" else 5.0)
    sent = room.heard()
    assert not only(sent, m.Go)
    outcomes = only(sent, m.Outcome)
    assert [peer for peer, _ in outcomes] == [p for p in ("t0", "s0") if p in room.hub.roster.peers]
    for _, outcome in outcomes:
        assert (outcome.ok, outcome.moved) == (False, False)
        name = "trainer rank 0" if culprit == "t0" else "replica 0 server rank 0"
        assert name in outcome.failures[0].rank
    assert room.hub.round is None


@pytest.mark.parametrize("how", ["an error", "a death", "silence"])
def test_a_failure_in_run_is_final_for_all_and_starts_a_new_epoch(how):
    room = Room()
    room.to_run()
    room.say(m.Done, "t0", sent=[fold(5)])
    if how == "an error":
        room.say(m.Done, "s0", error="the hook raised")
    elif how == "a death":
        room.drop("s0")
    room.wait(GRACE_S if how != "silence" else 20.0)
    outcome = only(room.heard(), m.Outcome)[0][1]
    assert (outcome.ok, outcome.moved) == (False, True)
    if how == "a death":
        room.join("s0", "server", 0, 1)
    room.enter("t0", version=2)
    offer = only(room.heard(), m.Offer)[0][1]
    assert (offer.epoch, offer.planned) == (2, False)


def test_plans_must_be_alike():
    room = Room()
    room.enter("t0")
    room.say(m.Facts, "t0", blob=b"source")
    room.say(m.Facts, "s0", blob=b"want")
    room.say(m.Ready, "t0", plan="p")
    room.say(m.Ready, "s0", plan="q")
    sent = room.heard()
    assert not only(sent, m.Go)
    assert "plans differ: p on trainer rank 0, q on replica 0 server rank 0" in str(
        only(sent, m.Outcome)[0][1].failures[0]
    )


def test_answers_out_of_turn_change_nothing():
    room = Room()
    assert not room.say(m.Ready, "s0", plan="p")
    room.enter("t0")
    assert not room.say(m.Ready, "s0", plan="p")
    assert not room.say(m.Done, "s0")
    assert not room.hub.answer(m.Facts(peer="t0", update=99, blob=b""), 0.0)
    assert room.say(m.Facts, "t0", blob=b"source")
    assert not room.say(m.Facts, "t0", blob=b"again")
    assert room.hub.round.phase is Phase.WANTS


def test_equal_wants_travel_once():
    room = Room(servers=1)
    for replica in (1, 2):
        room.join(f"r{replica}", "server", 0, 1, replica=replica)
    room.enter("t0", min_replicas=3)
    room.say(m.Facts, "t0", blob=b"source")
    for peer, blob in (("s0", b"want"), ("r1", b"want"), ("r2", b"other")):
        room.say(m.Facts, peer, blob=blob)
    gathered = only(room.heard(), m.Gathered)[-1][1]
    assert gathered.blobs == [b"want", b"other"]
    assert gathered.holder == {1: 0, 2: 0, 3: 1}


def test_an_incomplete_replica_is_left_out_and_named_when_it_is_needed():
    room = Room(servers=1)
    room.join("r1", "server", 1, 2, replica=1)
    room.enter("t0")
    assert [peer for peer, _ in only(room.heard(), m.Offer)] == ["t0", "s0"]
    room.hub.round = None
    room.enter("t0", version=2, min_replicas=2)
    room.wait(10.0)
    outcome = only(room.heard(), m.Outcome)[0][1]
    assert "expected 2 complete, got 1; replica 1 misses server ranks [0] of 2" in str(outcome.failures[0])


def test_places_and_sizes_are_checked_on_joining():
    room = Room()
    taken = room.join("x", "trainer", 0, 1)
    assert isinstance(taken, m.Refused)
    assert taken.silent_s is not None
    for hello, reason in (
        (("y", "server", 1, 2, None, 0), "expected size 1"),
        (("z", "server", 3, 3, None, 5), "expected one below size 3, got 3"),
    ):
        refused = room.join(*hello)
        assert isinstance(refused, m.Refused)
        assert reason in refused.reason
        assert refused.silent_s is None
