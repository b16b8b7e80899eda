"""Sums of trainer and server ranks, compared: which tensors are wrong, and on which ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from weightbus.control import messages as m

SUM_PRIME = (1 << 61) - 1

Pair = tuple[int, int]


def total(sums: Iterable[Pair]) -> Pair:
    lanes = (0, 0)
    for one in sums:
        lanes = (lanes[0] + one[0]) % SUM_PRIME, (lanes[1] + one[1]) % SUM_PRIME
    return lanes


def compare_folds(
    members: Mapping[str, m.Member], dones: Mapping[str, m.Done], jobs: int
) -> tuple[list[tuple[int, int]], list[tuple[m.Member, str]]]:
    """Jobs and groups in which a server rank's fold is not what trainer ranks' add up to; and complaints
    of server ranks that have not digested what they should."""
    sent = _sent(dones)
    wrong: set[tuple[int, int]] = set()
    complaints = []
    for peer, member in members.items():
        if member.server is None:
            continue
        digested = sorted(fold.job for fold in dones[peer].live)
        if digested != list(range(jobs)):
            complaints.append((member, f"expected each of {jobs} jobs digested once, got jobs {digested}"))
        for fold in dones[peer].live:
            folds = sent.get((fold.job, fold.group), [])
            nbytes = sum(one.nbytes for one in folds)
            due = {fold.due, *(one.due for one in folds)}
            if due != {fold.nbytes} or nbytes != fold.nbytes:
                text = f"expected {' or '.join(map(str, sorted(due)))} bytes digested at both ends, as the "
                text += f"manifest says; got {fold.nbytes} here, {nbytes} on the trainer ranks together"
                complaints.append((member, text))
            elif total(one.sums for one in folds) != fold.sums:
                wrong.add((fold.job, fold.group))
    for job in range(jobs):
        live = [(peer, fold) for peer in members for fold in dones[peer].live if fold.job == job]
        # Where all is behind loading code that can't be traced, nothing is said to be proved.
        if live and not any(fold.nbytes for _, fold in live) and not any(d.partial for d in dones.values()):
            text = "expected bytes to digest, got none on any server rank: that proves nothing"
            complaints.append((members[live[0][0]], text))
    return sorted(wrong), complaints


def right_places(members: Mapping[str, m.Member], dones: Mapping[str, m.Done]) -> list[int]:
    """Group ranks of server ranks whose every fold is what trainer ranks' add up to, and who find nothing wrong
    themselves."""
    sent = _sent(dones)
    return [
        place
        for place, (peer, member) in enumerate(members.items())
        if member.server is not None
        and not dones[peer].wrong
        and all(
            total(one.sums for one in sent.get((fold.job, fold.group), ())) == fold.sums
            for fold in dones[peer].live
        )
    ]


def _sent(dones: Mapping[str, m.Done]) -> dict[tuple[int, int], list[m.Fold]]:
    """Trainer ranks' folds, by job and group."""
    sent: dict[tuple[int, int], list[m.Fold]] = {}
    for done in dones.values():
        for fold in done.sent:
            sent.setdefault((fold.job, fold.group), []).append(fold)
    return sent


def compare_held(
    members: Mapping[str, m.Member], held: Mapping[str, Sequence[m.HeldFold]]
) -> tuple[list[tuple[int, int]], list[tuple[m.Member, str]]]:
    """Sets of trainer ranks, and groups, for which the ranks hold different bytes; complaints where not all of
    a set's ranks have digested as much."""
    folds: dict[tuple[int, int], list[tuple[str, m.HeldFold]]] = {}
    for peer, of_peer in held.items():
        for fold in of_peer:
            folds.setdefault((fold.holders, fold.group), []).append((peer, fold))
    differ, complaints = [], []
    for place, found in sorted(folds.items()):
        peer, first = found[0]
        sizes = {(fold.ranks, fold.nbytes) for _, fold in found}
        if len(sizes) > 1 or len({p for p, _ in found}) != len(found) or len(found) != first.ranks:
            text = f"expected {first.ranks} trainer ranks to digest the {first.nbytes} bytes that they hold"
            told = ", ".join(f"{fold.nbytes} on {members[p]}" for p, fold in found)
            complaints.append((members[peer], f"{text}, got {told}"))
        elif any(fold.sums != first.sums for _, fold in found):
            differ.append(place)
    return differ, complaints


def name_held(members: Mapping[str, m.Member], answers: Mapping[str, m.Sums]) -> list[m.Failure]:
    """Tensors that trainer ranks hold differently: each rank that differs from most, or from the first."""
    held: dict[tuple[str, int], dict[str, dict[int, Pair]]] = {}
    for peer in members:
        for sums in answers[peer].held if peer in answers else ():
            for name, pair in sums.sums.items():
                held.setdefault((name, sums.holders), {}).setdefault(peer, {})[sums.group] = pair
    found = []
    for (name, _), digests in sorted(held.items(), key=lambda one: (one[0][0].encode(), one[0][1])):
        order = list(digests.values())
        usual = max(order, key=lambda one: (order.count(one), -order.index(one)))
        first = next(peer for peer, one in digests.items() if one == usual)
        for peer, one in digests.items():
            if one == usual:
                continue
            group = min(g for g in one.keys() | usual.keys() if one.get(g) != usual.get(g))
            got, expected = sums_text(one.get(group)), sums_text(usual.get(group))
            reason = (
                f"trainer ranks hold different bytes under this name: digest {got} here, {expected} on "
                f"{members[first]}; make them equal before the update (broadcast from one rank), give what "
                f"is meant to differ names of its own or a DTensor's shards, or leave the tensor out"
            )
            found.append(m.Failure(rank=str(members[peer]), tensor=name, reason=reason, kind="replicas differ"))
    return found


def whose(
    members: Mapping[str, m.Member],
    answers: Mapping[str, m.Sums],
    suspect: tuple[int, str],
    expected: Pair,
    got: Pair,
) -> m.Member | None:
    """Where trainer ranks differ in a tensor, one whose bytes a server rank has instead of those expected.

    suspect: group and name.
    """
    held: dict[int, dict[Pair, str]] = {}
    for peer, answer in answers.items():
        for sums in answer.held:
            if sums.group == suspect[0] and (pair := sums.sums.get(suspect[1])):
                held.setdefault(sums.holders, {}).setdefault(pair, peer)
    for pairs in held.values():
        for (one, peer), other in product(pairs.items(), pairs):
            if total((expected, one)) == total((got, other)):
                return members[peer]
    return None


def sums_text(sums: Pair | None) -> str:
    return f"grid61:{sums[0]:016x}{sums[1]:016x}" if sums else "none"
