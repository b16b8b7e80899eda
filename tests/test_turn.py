"""One rank's turn by itself: what it gives back where a plan can't be made."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest

from weightbus import messages as m
from weightbus import turn as turns
from weightbus import wire
from weightbus.errors import UpdateError
from weightbus.turn import Ended, Progress, Turn, explain, look_at


def test_what_was_mapped_is_given_back_where_facts_make_no_sense():
    said, closed = [], []
    link = SimpleNamespace(peer="me", send=said.append)
    turn = Turn(SimpleNamespace(link=link, place=0, keep_plan=None), Progress(), None)
    turn.offer = SimpleNamespace(update=1, plan="p", members=["trainer rank 0"], settings="1024 peer")
    turn._sources = m.Gathered(update=1, of="sources", blobs=[], holder={})
    turn._sharing = SimpleNamespace(close=lambda: closed.append(True))
    turn.gathered(m.Gathered(update=1, of="wants", blobs=[b"junk"], holder={0: 0}))
    assert "facts of trainer rank 0" in said[0].reason
    turn.close()
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
    monkeypatch.setattr(turns, "LOOK_S", 0.0)
    inbox = deque([m.Farewell(), m.Outcome(update=1, ok=False, moved=True, verdict="failed", failures=[])])
    link = SimpleNamespace(receive=lambda timeout_s: inbox.popleft(), push_back=inbox.appendleft)
    heard = []
    look = look_at(link, heard.append)
    look()
    assert [type(message) for message in heard] == [m.Farewell]
    with pytest.raises(Ended):
        look()
