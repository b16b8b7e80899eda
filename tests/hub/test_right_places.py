"""Who holds what it should, where others do not: from folds alone, however much is wrong elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from weightbus.control import messages as m
from weightbus.errors import TornError, UpdateError
from weightbus.hub.compare import right_places
from weightbus.session.waiting import wait_for_check


def fold(group: int, sums: tuple[int, int]) -> m.Fold:
    return m.Fold(job=0, group=group, sums=sums, nbytes=4, due=4)


def member(**roles):
    return m.Member(**{"peer": "p", "trainer": None, "server": None, **roles})


def server(rank: int) -> m.Member:
    return member(server=m.ServerId(replica=0, rank=rank))


def done(**fields) -> m.Done:
    return m.Done(peer="p", **fields)


def test_right_are_those_whose_every_fold_is_and_who_find_nothing_wrong():
    members = {"t0": member(trainer=0), "t1": member(trainer=1), **{f"s{i}": server(i) for i in range(4)}}
    wrong = m.Wrong(name="buffer", kind="constant", reason="r", box=m.Span(offsets=[0], sizes=[1]))
    dones = {
        "t0": done(sent=[fold(0, (1, 2)), fold(1, (5, 5))]),
        "t1": done(sent=[fold(0, (10, 20))]),
        "s0": done(live=[fold(0, (11, 22)), fold(1, (5, 5))]),
        "s1": done(live=[fold(0, (11, 22)), fold(1, (5, 6))]),
        "s2": done(live=[fold(0, (1, 2))]),
        "s3": done(live=[fold(0, (11, 22))], wrong=[wrong]),
    }
    assert right_places(members, dones) == [2]


@pytest.mark.parametrize(
    ("end", "raised"),
    [
        ({"verdict": "verified", "ok": True}, None),
        ({"verdict": "mismatch", "right": [2]}, None),
        ({"verdict": "mismatch", "right": [1, 3]}, TornError),
        ({"verdict": "mismatch"}, TornError),
        ({"verdict": "failed"}, UpdateError),
    ],
)
def test_what_a_rank_that_waits_for_a_check_is_told(end, raised):
    """No list of what is wrong, which is cut somewhere, says that a rank is right."""
    failures = [m.Failure(rank="replica 0 server rank 0", tensor=f"t{i}", reason="r") for i in range(1000)]
    offer = m.Offer(
        group="g", kind="check", version=1, modules=None, verify=True, plan="p", planned=True,
        settings=m.Settings(bucket_bytes=64), members=[], ready_s=1.0, transfer_s=1.0,
    )  # fmt: skip
    outcome = m.Outcome(**{"ok": False, "moved": False, "failures": failures, **end})
    put_off = m.Outcome(ok=False, moved=False, verdict="failed", put_off=True)
    ends = [put_off, outcome]
    session = SimpleNamespace(receive=lambda timeout_s: offer, context=SimpleNamespace(place=2))
    if raised is None:
        assert wait_for_check(session, 5.0, lambda message, until: ends.pop(0)) == end["verdict"]
    else:
        with pytest.raises(UpdateError) as caught:
            wait_for_check(session, 5.0, lambda message, until: ends.pop(0))
        assert type(caught.value) is raised
    assert not ends
