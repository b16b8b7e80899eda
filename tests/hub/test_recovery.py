"""A new hub in place of one that was lost: whom its first update waits for."""

from __future__ import annotations

from test_protocol import Room

from weightbus.control import messages as m
from weightbus.hub.recovery import FORMER_S

GROUP = m.Held(epoch=4, members=3, place=0, group="g")


class New(Room):
    """A hub that nobody has joined so far."""

    def __init__(self):
        super().__init__(trainers=0, servers=0)

    def back(self, name, role, *, replica=0, held=GROUP):
        hello = m.Hello(
            process=name, host="h", pid=1, device="cpu", role=role, rank=0, size=1, replica=replica, held=held
        )
        self.hub.joined(self.hub.roster.admit(hello, name, self.now), self.now)

    @property
    def offered(self):
        return [str(member) for member in self.hub.round.members.values()]


def test_an_update_waits_for_those_who_come_back():
    """All have lost the hub at once; the first should not go on without the others, who may be torn."""
    room = New()
    room.back("t0", "trainer")
    room.back("s0", "server")
    room.enter("t0")
    room.wait(1.0)
    assert room.offered == []
    room.back("s1", "server", replica=1)
    assert room.offered == ["trainer rank 0", "replica 0 server rank 0", "replica 1 server rank 0"]


def test_nobody_waits_long_for_who_does_not_come_back():
    room = New()
    room.back("t0", "trainer")
    room.back("s0", "server")
    room.enter("t0")
    room.wait(FORMER_S - 0.1)
    assert room.offered == []
    room.wait(0.2)
    assert room.offered == ["trainer rank 0", "replica 0 server rank 0"]


def test_a_job_that_begins_waits_for_nobody():
    room = New()
    for name, role in (("t0", "trainer"), ("s0", "server")):
        room.back(name, role, held=None)
    room.enter("t0")
    assert room.offered == ["trainer rank 0", "replica 0 server rank 0"]
