"""Waves of the reshard route: pieces in messages between pairs of ranks, in one order for all. Pure data."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from weightbus.planning.box import Box
from weightbus.planning.plan import BUCKETS_PER_WAVE, FIRST_WAVES, LEAST_WAVE, SLOT_ALIGN, Slot

# What a rank has got is passed on so many waves later: before, it may not be in place there.
PASSED_AFTER = 2


@dataclass(frozen=True, slots=True)
class Move:
    """One message of ``nbytes`` from group rank ``src`` to ``dst``, or a copy where they are the same.

    passed: ``src`` takes it from its own target, where an earlier wave has brought it.
    """

    src: int
    dst: int
    nbytes: int
    slots: tuple[Slot, ...]
    passed: bool = False


@dataclass(slots=True)
class Piece:
    """A part of a cell. src: sends it to ``first``, which passes it on to ``others``. own: holders that
    want it. staged: the ranks that need a bucket for it. solo: whether it travels in a message of its own."""

    tensor: int
    box: Box
    nbytes: int
    src: int
    own: tuple[int, ...]
    first: int | None
    others: tuple[int, ...]
    staged: frozenset[int]
    solo: bool


# What is bounded in a wave, for each rank.
_SENT, _RECEIVED, _COPIED, _STAGED = range(4)
_Load = Counter[tuple[int, int]]


class _Wave:
    """One being filled. A pair of ranks has a message for each large box, and one for all small ones.

    limit: of bytes that a rank sends, receives or copies; staged: of those that go through its bucket. Of
    each, a rank takes a first piece of any size.
    """

    def __init__(self, limit: float, staged: float) -> None:
        self._limits = {_SENT: limit, _RECEIVED: limit, _COPIED: limit, _STAGED: staged}
        self.load = _Load()
        self._solo: list[Move] = []
        self._slots: dict[tuple[int, int, bool], list[Slot]] = {}
        self._ends: dict[tuple[int, int, bool], int] = {}

    def put(self, piece: Piece, moves: Sequence[tuple[int, int]], *, passed: bool = False) -> bool:
        """Whether it has room for them."""
        load = _load(piece, moves)
        if any(self.load[key] and self.load[key] + n > self._limits[key[0]] for key, n in load.items()):
            return False
        self.load.update(load)
        for src, dst in moves:
            if piece.solo and src != dst:
                slot = Slot(piece.tensor, piece.box, 0)
                self._solo.append(Move(src, dst, piece.nbytes, (slot,), passed))
                continue
            key = src, dst, passed
            offset = -(-self._ends.get(key, 0) // SLOT_ALIGN) * SLOT_ALIGN
            self._slots.setdefault(key, []).append(Slot(piece.tensor, piece.box, offset))
            self._ends[key] = offset + piece.nbytes
        return True

    def moves(self) -> tuple[Move, ...]:
        small = [
            Move(src, dst, self._ends[src, dst, passed], tuple(slots), passed)
            for (src, dst, passed), slots in self._slots.items()
        ]
        return (*self._solo, *small)


def fill_waves(
    pieces: Iterable[Piece], bucket_bytes: int
) -> tuple[list[tuple[Piece, int]], tuple[tuple[Move, ...], ...]]:
    """Each piece with the wave in which it leaves its source, in the order of the waves; and these.

    All pairs of ranks get on evenly, so that all links are busy from the first wave to the last. A wave begins
    with what is passed on by then.
    """
    queues: dict[tuple[int, int], deque[Piece]] = {}
    left = _Load()
    for piece in pieces:
        given, passed = _moves_of(piece)
        queues.setdefault(given[-1], deque()).append(piece)
        left.update(_load(piece, [*given, *passed]))
    total = {pair: sum(piece.nbytes for piece in queue) for pair, queue in queues.items()}
    done = dict.fromkeys(queues, 0)
    heap = [(0, *pair) for pair in queues]
    heapify(heap)
    order: list[tuple[Piece, int]] = []
    waves: list[tuple[Move, ...]] = []
    due: list[tuple[int, Piece, tuple[int, int]]] = []  # from which wave on it may be passed on, in that order
    while heap or due:
        turn = len(waves)
        part = FIRST_WAVES[turn] if turn < len(FIRST_WAVES) else 1.0
        most = max(n for (kind, _), n in left.items() if kind != _STAGED)
        wave = _Wave(
            *(
                min(part * whole, max(LEAST_WAVE * whole, most / 2))
                for whole in (BUCKETS_PER_WAVE * bucket_bytes, bucket_bytes)
            )
        )
        due = [
            (ready, piece, move)
            for ready, piece, move in due
            if ready > turn or not wave.put(piece, [move], passed=True)
        ]
        full = []
        while heap:
            pair = heappop(heap)[1:]
            piece = queues[pair][0]
            given, passed = _moves_of(piece)
            if not wave.put(piece, given):
                full.append(pair)
                continue
            order.append((piece, turn))
            due += [(turn + PASSED_AFTER, piece, move) for move in passed]
            queues[pair].popleft()
            done[pair] += piece.nbytes
            if queues[pair]:
                heappush(heap, ((done[pair] << 32) // total[pair], *pair))
        for pair in full:
            heappush(heap, ((done[pair] << 32) // total[pair], *pair))
        left.subtract(wave.load)
        waves.append(wave.moves())
    return order, tuple(waves)


def _moves_of(piece: Piece) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """From the source, what goes furthest last; and what is passed on."""
    given = [(rank, rank) for rank in piece.own]
    if piece.first is None:
        return given, []
    return [*given, (piece.src, piece.first)], [(piece.first, rank) for rank in piece.others]


def _load(piece: Piece, moves: Iterable[tuple[int, int]]) -> _Load:
    room = -(-piece.nbytes // SLOT_ALIGN) * SLOT_ALIGN
    load = _Load()
    for src, dst in moves:
        if src == dst:
            load[_COPIED, src] += room
        else:
            load[_SENT, src] += room
            load[_RECEIVED, dst] += room
        for rank in {src, dst}:
            if rank in piece.staged:
                load[_STAGED, rank] += room
    return load
