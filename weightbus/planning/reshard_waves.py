"""Waves of the reshard route: pieces in messages between pairs of ranks, in one order for all. Pure data."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
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
_Load = list[tuple[tuple[int, int], int]]


# A piece, where it goes from its source, their load, and each move that passes it on with its own.
_Move = tuple[int, int]
_Queued = tuple[Piece, list[_Move], _Load, list[tuple[_Move, _Load]]]
_Due = tuple[Piece, _Move, _Load]


class _Wave:
    """One being filled. A pair of ranks has a message for each large box, and one for all small ones.

    limit: of bytes that a rank sends, receives or copies; staged: of those that go through its bucket. Of
    each, a rank takes a first piece of any size.
    """

    def __init__(self, limit: float, staged: float) -> None:
        self._limits = {_SENT: limit, _RECEIVED: limit, _COPIED: limit, _STAGED: staged}
        self.load = Counter[tuple[int, int]]()
        self._solo: list[Move] = []
        self._slots: dict[tuple[int, int, bool], list[Slot]] = {}
        self._ends: dict[tuple[int, int, bool], int] = {}

    def put(self, piece: Piece, moves: Sequence[tuple[int, int]], load: _Load, *, passed: bool = False) -> bool:
        """Whether it has room for them. load: theirs."""
        now = self.load
        for key, n in load:
            if now[key] and now[key] + n > self._limits[key[0]]:
                return False
        for key, n in load:
            now[key] += n
        for src, dst in moves:
            if piece.solo and src != dst:
                slot = Slot(piece.tensor, piece.box, 0)
                self._solo.append(Move(src, dst, piece.nbytes, (slot,), passed))
                continue
            pair = src, dst, passed
            offset = -(-self._ends.get(pair, 0) // SLOT_ALIGN) * SLOT_ALIGN
            self._slots.setdefault(pair, []).append(Slot(piece.tensor, piece.box, offset))
            self._ends[pair] = offset + piece.nbytes
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
    queues: dict[tuple[int, int], deque[_Queued]] = {}
    left = Counter[tuple[int, int]]()
    for piece in pieces:
        given, passed = _moves_of(piece)
        queued = piece, given, _load(piece, given), [(move, _load(piece, [move])) for move in passed]
        queues.setdefault(given[-1], deque()).append(queued)
        for load in (queued[2], *(load for _, load in queued[3])):
            for key, n in load:
                left[key] += n
    total = {pair: sum(piece.nbytes for piece, *_ in queue) for pair, queue in queues.items()}
    done = dict.fromkeys(queues, 0)
    heap = [(0, *pair) for pair in queues]
    heapify(heap)
    order: list[tuple[Piece, int]] = []
    waves: list[tuple[Move, ...]] = []
    ready: dict[int, list[_Due]] = {}  # what may be passed on from a wave on
    due: dict[tuple[int, int], deque[_Due]] = {}
    while heap or due or ready:
        wave = _next_wave(len(waves), left, bucket_bytes)
        for one in ready.pop(len(waves), ()):
            due.setdefault(one[1], deque()).append(one)
        for pair in list(due):
            while due[pair] and wave.put(due[pair][0][0], [pair], due[pair][0][2], passed=True):
                due[pair].popleft()
            if not due[pair]:
                del due[pair]
        full = []
        while heap:
            pair = heappop(heap)[1:]
            piece, given, load, later = queues[pair][0]
            if not wave.put(piece, given, load):
                full.append(pair)
                continue
            order.append((piece, len(waves)))
            ready.setdefault(len(waves) + PASSED_AFTER, []).extend((piece, *move) for move in later)
            queues[pair].popleft()
            done[pair] += piece.nbytes
            if queues[pair]:
                heappush(heap, ((done[pair] << 32) // total[pair], *pair))
        for pair in full:
            heappush(heap, ((done[pair] << 32) // total[pair], *pair))
        ready = {turn: moves for turn, moves in ready.items() if moves}
        left.subtract(wave.load)
        waves.append(wave.moves())
    return order, tuple(waves)


def _next_wave(turn: int, left: Mapping[tuple[int, int], int], bucket_bytes: int) -> _Wave:
    part = FIRST_WAVES[turn] if turn < len(FIRST_WAVES) else 1.0
    most = max(n for (kind, _), n in left.items() if kind != _STAGED)
    wholes = BUCKETS_PER_WAVE * bucket_bytes, bucket_bytes
    return _Wave(*(min(part * whole, max(LEAST_WAVE * whole, most / 2)) for whole in wholes))


def _moves_of(piece: Piece) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """From the source, what goes furthest last; and what is passed on."""
    given = [(rank, rank) for rank in piece.own]
    if piece.first is None:
        return given, []
    return [*given, (piece.src, piece.first)], [(piece.first, rank) for rank in piece.others]


def _load(piece: Piece, moves: Iterable[tuple[int, int]]) -> _Load:
    room = -(-piece.nbytes // SLOT_ALIGN) * SLOT_ALIGN
    load: _Load = []
    for src, dst in moves:
        load += [((_COPIED, src), room)] if src == dst else [((_SENT, src), room), ((_RECEIVED, dst), room)]
        load += [((_STAGED, rank), room) for rank in {src, dst} & piece.staged]
    return load
