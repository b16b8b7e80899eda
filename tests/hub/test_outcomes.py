"""One outcome for a round, heard once by each of its members, whatever ranks say, in whatever order."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from test_protocol import Room, fold

from weightbus.control import messages as m
from weightbus.hub.coordinator import Phase

PEERS = ["t0", "t1", "s0", "s1"]

# What a member may say by the schema, right or not.
folds = st.lists(
    st.builds(
        m.Fold,
        job=st.integers(0, 2),
        group=st.integers(0, 2),
        sums=st.tuples(st.integers(0, 2), st.integers(0, 2)),
        nbytes=st.sampled_from([0, 8]),
    ),
    max_size=2,
)
pairs = st.tuples(st.integers(0, 2), st.integers(0, 2))
sums = st.lists(
    st.builds(
        m.TensorSums,
        job=st.integers(0, 2),
        group=st.integers(0, 2),
        sums=st.dictionaries(st.sampled_from("ab"), pairs, max_size=2),
    ),
    max_size=2,
)
spans = st.builds(
    m.Span,
    offsets=st.lists(st.integers(0, 3), max_size=2),
    sizes=st.lists(st.integers(0, 3), max_size=2),
)
clues = st.builds(
    m.Clue,
    sent=st.none()
    | st.builds(
        m.SentClue,
        former=st.none() | st.integers(0, 3),
        former_sums=pairs,
        elsewhere=st.dictionaries(st.integers(0, 2), pairs, max_size=2),
        now=st.none() | pairs,
        why=st.just(""),
    ),
    live=st.none()
    | st.builds(
        m.LiveClue,
        former=st.none() | st.integers(0, 3),
        former_sums=pairs,
        elsewhere=st.dictionaries(st.integers(0, 2), pairs, max_size=2),
        pieces=st.integers(0, 2),
        box=st.none() | spans,
        shape=st.lists(st.integers(0, 3), max_size=2),
    ),
)
anything = st.one_of(
    st.builds(m.Facts, peer=st.just(""), blob=st.sampled_from([b"", b"x"])),
    st.builds(m.Ready, peer=st.just(""), plan=st.sampled_from(["p", "q"]), stale=st.booleans()),
    st.builds(m.Refuse, peer=st.just(""), reason=st.sampled_from(["", "no"])),
    st.builds(m.Done, peer=st.just(""), sent=folds, live=folds, error=st.sampled_from(["", "no"])),
    st.builds(m.Sums, peer=st.just(""), sent=sums, live=sums),
    st.builds(m.Clues, peer=st.just(""), clues=st.lists(clues, max_size=2)),
    st.builds(m.Probed, peer=st.just(""), sums=st.lists(st.lists(pairs, max_size=2), max_size=2)),
)
later = st.one_of(
    st.builds(m.Clues, peer=st.just(""), clues=st.lists(clues, min_size=1, max_size=1)),
    st.builds(m.Probed, peer=st.just(""), sums=st.lists(st.lists(pairs, max_size=2), max_size=2)),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("right"), st.sampled_from(PEERS)),
        st.tuples(st.just("wrong"), st.sampled_from(PEERS), st.sampled_from([1, 2])),
        st.tuples(st.just("any"), st.sampled_from(PEERS), anything, st.sampled_from([True, True, False])),
        st.tuples(st.just("any"), st.sampled_from(PEERS), later, st.just(True)),
        st.tuples(st.just("die"), st.sampled_from(PEERS)),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 30.0])),
    ),
    min_size=5,
    max_size=40,
)


def answer(phase, peer, number=0):
    """What the round waits for."""
    live = (
        {"live": [fold(5 + number)]}
        if peer[0] == "s"
        else {"sent": [fold(5) if peer == "t0" else fold(0, 0, 0)]}
    )
    row = [m.TensorSums(job=0, group=0, sums={"a": (5 + number, 0)})]
    if peer[0] == "t":
        row = [m.TensorSums(job=0, group=0, sums={"a": (5, 0) if peer == "t0" else (0, 0)})]
    return {
        Phase.SOURCES: m.Facts(peer=peer, blob=b"source"),
        Phase.WANTS: m.Facts(peer=peer, blob=b"want"),
        Phase.READY: m.Ready(peer=peer, plan="p"),
        Phase.RUN: m.Done(peer=peer, **live),
        Phase.DETAIL: m.Sums(peer=peer, **({"live": row} if peer[0] == "s" else {"sent": row})),
    }.get(phase, m.Refuse(peer=peer, reason="no"))


@settings(max_examples=150, deadline=None)
@given(steps=steps, advance=st.integers(0, 6))
def test_one_outcome_is_heard_once_by_all(steps, advance):
    room = Room(trainers=2, servers=2)
    heard = Counter()
    members = {}

    def look():
        for peer, message in room.heard():
            if isinstance(message, m.Offer):
                members.setdefault(message.update, set()).add(peer)
            if isinstance(message, m.Outcome) and message.update:
                heard[message.update, peer] += 1
                verdicts.setdefault(message.update, []).append(message)
                assert message.ok != bool(message.failures)
        if room.hub.round is None and "t0" in room.hub.roster.peers:
            for peer in ("t0", "t1"):
                if peer in room.hub.roster.peers:
                    room.enter(peer, version=room.hub.committed + 2)

    def say(message):
        if room.hub.round:
            message.stamp(room.hub.round.header)
        if message.peer in room.hub.roster.peers:
            room.hub.answer(message, room.now)

    verdicts = {}
    look()
    for _ in range(advance):  # so that later phases are drawn as often
        for peer in PEERS:
            if room.hub.round and peer in room.hub.round.expected:
                say(answer(room.hub.round.phase, peer, number=advance // 5))
    for what, *rest in steps:
        round = room.hub.round
        if what in ("right", "wrong") and round:
            say(answer(round.phase, *rest))
        elif what == "any":
            peer, message, own = rest
            message.peer = peer
            if own:
                say(message)
            else:
                assert not room.hub.answer(message, room.now) or isinstance(message, m.Refuse)
        elif what == "die" and rest[0] in room.hub.roster.peers:
            room.drop(rest[0])
        elif what == "wait":
            room.wait(rest[0])
        look()
    for _ in range(3):
        room.wait(60.0)
    look_back = room.heard()
    for peer, message in look_back:
        if isinstance(message, m.Outcome) and message.update:
            heard[message.update, peer] += 1
            verdicts.setdefault(message.update, []).append(message)
    assert not heard or max(heard.values()) == 1, "heard twice"
    for update, told in verdicts.items():
        assert all(one is told[0] for one in told), "one outcome for all"
        here = {peer for peer in members.get(update, ()) if peer in room.hub.roster.peers}
        assert here <= {peer for number, peer in heard if number == update}, "all hear it"
