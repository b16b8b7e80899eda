"""The hub's rounds, without sockets: fed messages and the time, looked at message by message."""

from __future__ import annotations

import pytest

from weightbus.control import messages as m
from weightbus.hub.coordinator import Coordinator
from weightbus.hub.round import GRACE_S, Phase
from weightbus.hub.steps import SAY_S

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
        fields = NOTHING | {"modules": None, "facts": "f", "settings": m.Settings(bucket_bytes=64)} | changes
        self.hub.enter(m.Enter(peer=peer, kind=kind, version=version, verify=verify, **fields), self.now)

    def say(self, kind, peer, **fields):
        message = kind(peer=peer, **fields)
        if self.hub.round:
            message.stamp(self.hub.round.header)
        return self.hub.answer(message, self.now)

    def heard(self):
        """What was sent since last time: (peer, message)."""
        sent = list(self.hub.outbox)
        self.hub.outbox.clear()
        return sent

    def drop(self, peer):
        gone = self.hub.roster.peers[peer]
        self.hub.roster.remove(gone)
        self.hub.lost(gone, "died", self.now)

    def wait(self, seconds):
        """As time goes by for a hub that is well: it looks several times in a second."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 0.5)
            self.hub.advance(self.now)

    def to_run(self):
        """Through the survey and ready to RUN, for one trainer and one server."""
        self.enter("t0")
        self.say(m.Facts, "t0", blob=b"source")
        self.say(m.Facts, "s0", blob=b"want")
        self.say(m.Ready, "t0", plan="p")
        self.say(m.Ready, "s0", plan="p")
        return self.heard()


def fold(a, b=0, nbytes=8, group=0, due=8):
    return m.Fold(job=0, group=group, sums=(a, b), nbytes=nbytes, due=due)


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
        ([fold(5)], [fold(5, nbytes=4)], "failed", "got 4 here, 8 on the trainer ranks"),
        ([], [fold(5)], "failed", "got 8 here, 0 on the trainer ranks"),
        ([fold(5)], [], "failed", "expected each of 1 jobs digested once, got jobs []"),
        ([fold(0, 0, 0)], [fold(0, 0, 8)], "failed", "got 8 here, 0 on the trainer ranks"),
        ([fold(0, 0, 0)], [fold(0, 0, 0)], "failed", "expected 8 bytes digested at both ends"),
        ([fold(5, due=9)], [fold(5)], "failed", "expected 8 or 9 bytes digested at both ends"),
        ([fold(5), fold(5)], [fold(5)], "failed", "got 8 here, 16 on the trainer ranks"),
        ([fold(0, 0, 0, due=0)], [fold(0, 0, 0, due=0)], "failed", "that proves nothing"),
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


def lies(box=((0, 0), (4, 8)), now=(3, 4), **changes):
    """What s0 and t0 know of tensor b, whose right sums are (3, 4)."""
    nothing = {"former": None, "former_sums": (0, 0), "elsewhere": {}}
    span = m.Span(offsets=list(box[0]), sizes=list(box[1]))
    live = m.LiveClue(**nothing | changes.get("live", {}), pieces=1, box=span, shape=[4, 8])
    why = "" if now else "the source has moved on"
    sent = m.SentClue(**nothing | changes.get("sent", {}), now=now, why=why)
    return [m.Clue(sent=sent)], [m.Clue(live=live)]


class Wrong(Room):
    """A round up to CLUES in which tensor b of s0 is wrong; ``sums`` are what it digests."""

    def __init__(self, sums=(3, 5)):
        super().__init__()
        self.to_run()
        self.say(m.Done, "t0", sent=[fold(5)])
        self.say(m.Done, "s0", live=[fold(6)])
        assert [message.groups for _, message in only(self.heard(), m.Detail)] == [[(0, 0)]] * 2
        row = {"a": (1, 2), "b": (3, 4)}
        self.say(m.Sums, "t0", sent=[m.TensorSums(job=0, group=0, sums=row)])
        self.say(m.Sums, "s0", live=[m.TensorSums(job=0, group=0, sums=row | {"b": sums})])

    def clues(self, **changes):
        sent, live = lies(**changes)
        self.say(m.Clues, "t0", clues=sent)
        self.say(m.Clues, "s0", clues=live)
        return self.heard()

    def failure(self):
        """The one failure that all are told, and that the verdict is a mismatch."""
        outcomes = only(self.heard(), m.Outcome)
        assert {(o.ok, o.verdict, o.moved) for _, o in outcomes} == {(False, "mismatch", True)}
        assert self.hub.round is None
        return outcomes[0][1].failures


def test_differing_folds_are_resolved_to_tensors_and_boxes():
    room = Wrong()
    asked = [message.suspects for _, message in only(room.heard(), m.Suspects)]
    assert [[(s.job, s.group, s.tensor) for s in suspects] for suspects in asked] == [[(0, 0, "b")]] * 2
    rounds = 0
    probes = only(room.clues(), m.Probe)
    while probes:
        rounds += 1
        for peer, probe in probes:
            (question,) = probe.questions
            assert question.sent == (peer == "t0")
            wrong = [
                (9, 9)
                if peer == "s0"
                and all(o <= x < o + n for o, n, x in zip(span.offsets, span.sizes, (2, 7), strict=True))
                else (1, 1)
                for span in question.boxes
            ]
            room.say(m.Probed, peer, sums=[wrong])
        if room.hub.round is None:
            break
        probes = only(room.heard(), m.Probe)
    (failure,) = room.failure()
    assert rounds == 2
    assert (failure.tensor, failure.rank, failure.kind) == ("b", "replica 0 server rank 0", "element")
    assert (failure.box.offsets, failure.box.sizes) == ([2, 7], [1, 1])


@pytest.mark.parametrize(
    ("sums", "changes", "kind", "note"),
    [
        ((0, 0), {}, "zeros", "zero"),
        ((1, 2), {}, "swapped", "its digest is the one expected of a"),
        (
            (3, 5),
            {"live": {"former": 7, "former_sums": (8, 8)}, "sent": {"former": 7, "former_sums": (8, 8)}},
            "stale",
            "under the seed of version 7",
        ),
        (
            (3, 5),
            {"live": {"elsewhere": {1: (6, 6)}}, "sent": {"elsewhere": {1: (6, 6)}}},
            "other shard",
            "shard",
        ),
    ],
)
def test_kinds_are_what_sums_equal(sums, changes, kind, note):
    room = Wrong(sums)
    sent, live = lies(**changes)
    room.say(m.Clues, "t0", clues=sent)
    room.say(m.Clues, "s0", clues=live)
    (failure,) = room.failure()
    assert failure.kind == kind
    assert note in failure.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"live": {"former": 7, "former_sums": (8, 8)}, "sent": {"former": 7, "former_sums": (8, 9)}},
        {"live": {"former": 7, "former_sums": (8, 8)}, "sent": {"former": 6, "former_sums": (8, 8)}},
        {"live": {"elsewhere": {1: (6, 6)}}, "sent": {"elsewhere": {2: (6, 6)}}},
        {"live": {"elsewhere": {1: (0, 0)}}, "sent": {}},
    ],
    ids=["other sums", "other version", "other group", "zeros"],
)
def test_nothing_is_claimed_without_equal_sums(changes):
    room = Wrong()
    assert only(room.clues(**changes), m.Probe), "it has to be looked at"
    room.wait(30.0)
    (failure,) = room.failure()
    assert failure.kind == ""


@pytest.mark.parametrize("phase", [Phase.CLUES, Phase.NARROW])
@pytest.mark.parametrize("how", ["dies", "is silent", "fails"])
def test_after_detail_the_verdict_stands(phase, how):
    """Whoever does not help to look into it: the tensor is named all the same."""
    room = Wrong()
    if phase is Phase.NARROW:
        room.clues()
    assert room.hub.round.phase is phase
    room.heard()
    answer, empty = (m.Clues, {"clues": []}) if phase is Phase.CLUES else (m.Probed, {"error": "no memory"})
    if how == "dies":
        room.drop("t0")
    for peer in {"dies": ["s0"], "fails": ["t0", "s0"], "is silent": []}[how]:
        room.say(answer, peer, **empty)
    room.wait(25.0)
    failures = room.failure()
    assert (failures[0].tensor, failures[0].rank) == ("b", "replica 0 server rank 0")
    assert len(failures) == (2 if how == "dies" else 1)
    if (phase, how) == (Phase.NARROW, "fails"):
        assert "not narrowed further" in failures[0].where
        assert "no memory" in failures[0].where


def test_a_mismatch_starts_a_new_epoch():
    """The ranks abort their group after it."""
    room = Wrong()
    room.wait(25.0)
    room.failure()
    room.enter("t0", version=2)
    offer = only(room.heard(), m.Offer)[0][1]
    assert (offer.epoch, offer.planned) == (2, False)


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
    room.wait(GRACE_S if how != "silence" else NOTHING["transfer_s"] + m.REACH_S + SAY_S)
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
