"""One round of the hub's: its phases, what answers each, and what is known of it so far (``coordinator``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from weightbus.control import messages as m
from weightbus.control.patience import Patience
from weightbus.hub.blame import SYMPTOM_S, Blame
from weightbus.hub.catch_up import Pairing
from weightbus.hub.diagnosis import Inquiry

# Once one member has failed, the others may still say within this time what they know of it.
GRACE_S = 1.0

# Of one round so many are noted, whoever says them how often.
MAX_FAILURES = 1000


class Phase(Enum):
    ENTER = auto()
    SOURCES = auto()
    WANTS = auto()
    READY = auto()
    COMPARE = auto()
    RUN = auto()
    DETAIL = auto()
    CLUES = auto()
    NARROW = auto()


# Bytes may have been written; the verdict is known.
MOVED = (Phase.RUN, Phase.DETAIL, Phase.CLUES, Phase.NARROW)
MEETING = (Phase.SOURCES, Phase.WANTS, Phase.READY)
NAMED = (Phase.CLUES, Phase.NARROW)

ANSWERS: dict[Phase, tuple[type[m.Message], ...]] = {
    Phase.ENTER: (m.Enter,),
    Phase.SOURCES: (m.Facts, m.Refuse),
    Phase.WANTS: (m.Facts, m.Refuse),
    Phase.READY: (m.Ready, m.Refuse),
    Phase.COMPARE: (m.Sums,),
    Phase.RUN: (m.Done,),
    Phase.DETAIL: (m.Sums,),
    Phase.CLUES: (m.Clues,),
    Phase.NARROW: (m.Probed,),
}


@dataclass(slots=True, kw_only=True)
class Repeat:
    """An update that trainer ranks call once more at once.

    join_by, meet_by: as of its first round. put_off: how often it was. cancelled: meanwhile.
    """

    version: int
    join_by: float
    meet_by: float
    put_off: int = 0
    cancelled: m.Failure | None = None


@dataclass(slots=True, kw_only=True)
class Round:
    """One update or check in progress."""

    update: int
    started: float
    deadline: float
    enter: m.Enter
    header: m.Header
    phase: Phase = Phase.ENTER
    expected: set[str] = field(default_factory=set)
    answers: dict[str, m.Message] = field(default_factory=dict)
    failures: list[m.Failure] = field(default_factory=list)
    offer: m.Offer | None = None
    members: dict[str, m.Member] = field(default_factory=dict)
    dones: dict[str, m.Done] = field(default_factory=dict)
    inquiry: Inquiry = field(init=False, repr=False)  # from DETAIL on
    right: list[int] = field(default_factory=list)  # group ranks that hold what they should; from DETAIL on
    seed: bytes | None = None
    # Trainer ranks that have called for it, and members that follow it no more.
    calls: set[str] = field(default_factory=set)
    given_up: set[str] = field(default_factory=set)
    # Replicas that it does without, and by whose fault it fails.
    left_out: dict[int, str] = field(default_factory=dict)
    blame: Blame = field(default_factory=Blame)
    # Replicas of which a rank's poll is over, and since when.
    hurried: dict[int, float] = field(default_factory=dict)
    # Until when all ranks are waited for, and those of a replica for each other, also by rounds that repeat it;
    # and until when ranks move bytes.
    join_by: float
    meet_by: float = 0.0
    run_by: float = 0.0
    patience: Patience
    # Of a catch-up: who takes part, and what its server ranks want.
    pairing: Pairing | None = None
    wants: dict[str, str] = field(default_factory=dict)
    # When each phase began, and when each member answered it, for the timeline.
    phases: dict[str, float] = field(default_factory=dict)
    answered: dict[tuple[str, Phase], float] = field(default_factory=dict)

    def note(
        self, rank: str, reason: str, now: float, *, place: int = MAX_FAILURES, other_version: bool = False
    ) -> None:
        """Something went wrong: the others have little time left. place: in the list of failures; by default
        the last. other_version: as of ``Failure``."""
        if len(self.failures) < MAX_FAILURES:
            failure = m.Failure(rank=rank, tensor=None, reason=reason, other_version=other_version)
            self.failures.insert(place, failure)
        waits = self.blame.open and not self.blame.apart
        self.deadline = min(self.deadline, now + (SYMPTOM_S if waits else GRACE_S))
