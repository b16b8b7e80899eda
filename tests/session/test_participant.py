"""One rank's part in a round, by itself: what it gives back where a plan can't be made."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from types import SimpleNamespace

import msgspec
import pytest

from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.control.link import HubLost, Link
from weightbus.control.rounds import Rounds
from weightbus.errors import TornError, UpdateError
from weightbus.session import hearing
from weightbus.session.attempts import update_with_retries
from weightbus.session.giving_up import explain
from weightbus.session.hearing import Aside, Ended, look_at
from weightbus.session.participant import Participant
from weightbus.session.progress import Progress
from weightbus.session.round import Round


def test_what_was_mapped_is_given_back_where_facts_make_no_sense():
    said, closed = [], []
    link = SimpleNamespace(peer="me", send=said.append)
    context = SimpleNamespace(link=link, place=0, members=["trainer rank 0"])
    participant = Participant(context, Progress(), None)
    participant.offer = SimpleNamespace(
        update=1, plan="p", settings=m.Settings(bucket_bytes=1024, route="peer")
    )
    participant._agreement._sources = m.Gathered(update=1, of="sources", blobs=[], holder={})
    participant._agreement._sharing = SimpleNamespace(close=lambda: closed.append(True))
    participant.gathered(m.Gathered(update=1, of="wants", blobs=[b"junk"], holder={0: 0}))
    assert "facts of trainer rank 0" in said[0].reason
    participant.close()
    assert closed == [True]


@pytest.mark.parametrize("error", [UpdateError, ValueError, KeyboardInterrupt])
def test_a_reason_of_any_length_travels(error):
    """As of a model of which no name is known: the hub takes it, and its beginning is there."""
    names = ", ".join(f"layers.{i}.weight" for i in range(20_000))
    reason = explain(error(names))
    assert "layers.0.weight, layers.1.weight" in reason
    assert "more characters)" in reason
    refuse = m.Refuse(peer="p", reason=reason)
    assert wire.decode_to_hub(wire.encode(refuse)) == refuse
    assert explain(error("short")).endswith("short")


def test_a_farewell_does_not_hide_the_end_of_the_round(monkeypatch):
    """The trainer has left, and then the hub has ended what this rank is still working on."""
    monkeypatch.setattr(hearing, "LOOK_S", 0.0)
    inbox = deque([m.Farewell(), m.Outcome(update=1, ok=False, moved=True, verdict="failed", failures=[])])
    link = SimpleNamespace(receive=lambda timeout_s: inbox.popleft(), push_back=inbox.appendleft)
    aside = Aside(link)
    look = look_at(link, aside)
    look()
    with pytest.raises(Ended):
        look()
    assert not inbox
    aside.give_back()
    aside.give_back()
    assert list(inbox) == [m.Farewell()]


def test_what_answers_an_earlier_call_is_not_taken_for_this_one():
    """A hub that was stopped, and goes on, may end or offer calls that were given up meanwhile."""
    rounds = Rounds("")
    old = m.Offer(
        group="g", kind="update", version=6, modules=None, verify=True, plan="p", planned=True,
        settings=m.Settings(bucket_bytes=64),
        members=[], ready_s=1.0, transfer_s=1.0, update=61,
    )  # fmt: skip
    new = msgspec.structs.replace(old, version=7, update=71)
    late = m.Outcome(ok=False, moved=False, verdict="failed", version=6, update=60)
    end = m.Outcome(ok=True, moved=True, verdict="verified", update=71)
    inbox, said, offered = deque([late, old, new, end]), [], []
    link = SimpleNamespace(rounds=rounds, peer="me", receive=lambda *a, **k: inbox.popleft())
    link.send = lambda message: said.append((type(message), rounds.header.update))
    link.decline = lambda offer, reason: Link.decline(link, offer, reason)
    context = SimpleNamespace(link=link, aside=Aside(link))
    participant = SimpleNamespace(
        context=context, offer=None, moved=False, copied=None, limit_s=1.0, look_ahead=lambda: None
    )
    participant.offered = lambda offer: (offered.append(offer.version), setattr(participant, "offer", offer))
    call = m.Enter(
        peer="me", kind="update", version=7, modules=None, verify=True, facts="f",
        settings=m.Settings(bucket_bytes=64), min_replicas=1,
        join_s=1.0, ready_s=1.0, transfer_s=1.0,
    )  # fmt: skip
    with contextlib.ExitStack() as stack, rounds.called():
        outcome = Round(participant, SimpleNamespace(), call)._follow(stack, 1.0, math.inf)
    assert outcome is end
    assert offered == [7]
    assert said == [(m.Enter, 0), (m.Refuse, 61)]


@pytest.mark.parametrize("again", [False, True])
def test_a_call_without_a_word_is_left_by_joining_again(again):
    """What the hub still says to it is then void, also where nothing but the number that it gives tells calls
    apart: from the same connection it comes before the new membership (test_joining_again.py)."""
    left: list[str] = []

    def silent(timeout_s, *, spin_s):
        raise HubLost("no word")

    link = SimpleNamespace(rounds=Rounds(""), forsake=left.append, send=lambda call: None, receive=silent)
    participant = SimpleNamespace(
        context=SimpleNamespace(link=link, aside=Aside(link)), offer=None, copied=None, moved=False,
        finished=False, seed=None, look_ahead=lambda: None, close=lambda: None, ended=lambda outcome: None,
    )  # fmt: skip
    call = m.Enter(
        peer="me", kind="update", version=0, modules=None, verify=True, facts="f",
        settings=m.Settings(bucket_bytes=64), min_replicas=1,
        join_s=1.0, ready_s=1.0, transfer_s=1.0, follows=True,
    )  # fmt: skip
    outcome = Round(participant, SimpleNamespace(), call).run(1.0, again=again)
    assert left == ([] if again else ["no word"])
    assert outcome is None if again else not outcome.ok


def test_what_an_earlier_attempt_has_torn_is_said_where_the_next_is_refused():
    torn = m.Outcome(ok=False, moved=True, verdict="failed", again=True)
    torn.failures.append(m.Failure(rank="replica 1 server rank 0", tensor=None, reason="died"))
    refused = m.Outcome(ok=False, moved=False, verdict="failed")
    refused.failures.append(m.Failure(rank="replica 0 server rank 0", tensor=None, reason="a bad hook"))
    ends = deque([torn, refused])
    session = SimpleNamespace(call=lambda *a: ends.popleft())
    with pytest.raises(TornError, match=r"(?s)replica 1 server rank 0: died.*a bad hook"):
        update_with_retries(session, SimpleNamespace(version=3), 1, None, None)
