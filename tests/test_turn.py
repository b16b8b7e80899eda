"""One rank's turn by itself: what it gives back where a plan can't be made."""

from __future__ import annotations

from types import SimpleNamespace

from weightbus import messages as m
from weightbus.turn import Progress, Turn


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
