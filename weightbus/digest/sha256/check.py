"""A manifest of expected SHA-256 digests, checked against what ranks hold; one verdict for all of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import torch.distributed as dist
from torch import Tensor, nn

from weightbus.digest.sha256.gather import Peers, joined_sha256s
from weightbus.digest.sha256.ranks import Answer, exchanged, hold, odd_replicas, shards_of, ways
from weightbus.errors import SpecError
from weightbus.tensors.layout import Source, named_tensors

Expected = Mapping[str, str] | Sequence[Mapping[str, str]]
Ranks = Mapping[str, tuple[int, ...]]
SHOWN = 5
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sha256Verdict:
    """What the check of a manifest found, by tensor and rank.

    missing, unexpected, mismatching: by name, the ranks that don't hold it, that hold it though the manifest
    does not name it, that hold other bytes. Where only the digest of a whole sharded tensor is known, a wrong
    one can't be pinned on a rank, so all that hold some of it are named.
    checked: how many names were expected, of one rank at most. ranks: whose tensors were looked at.
    """

    missing: Ranks
    unexpected: Ranks
    mismatching: Ranks
    checked: int
    ranks: tuple[int, ...]

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatching)

    def __str__(self) -> str:
        where = f"{_count(self.checked, 'tensor')} on {_count(len(self.ranks), 'rank')}"
        if self.ok:
            return f"verified SHA-256 of {where}"
        found = []
        for word, names in self._found().items():
            if names:
                some = [f"{name} (rank {', '.join(map(str, names[name]))})" for name in list(names)[:SHOWN]]
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                found.append(f"{len(names)} {word}: {', '.join(some)}{more}")
        return f"SHA-256 check of {where} failed: {'; '.join(found)}"

    @staticmethod
    def merged(verdicts: Iterable[Sha256Verdict]) -> Sha256Verdict:
        """One verdict from those of single ranks, for a caller that has collected them."""
        each = list(verdicts)
        return Sha256Verdict(
            missing=_merged(verdict.missing for verdict in each),
            unexpected=_merged(verdict.unexpected for verdict in each),
            mismatching=_merged(verdict.mismatching for verdict in each),
            checked=max((verdict.checked for verdict in each), default=0),
            ranks=tuple(sorted({rank for verdict in each for rank in verdict.ranks})),
        )

    def _found(self) -> dict[str, Ranks]:
        return {"missing": self.missing, "unexpected": self.unexpected, "mismatching": self.mismatching}


def check_sha256(
    source: Source,
    expected: Expected,
    *,
    group: dist.ProcessGroup | None = None,
    rank: int = 0,
    size: int = 1,
    partial: bool = False,
    threads: int | None = None,
    timeout_s: float = 300.0,
) -> Sha256Verdict:
    """Compare what this rank holds, or with ``group`` what all its ranks hold, with expected digests.

    source: as in ``named_sha256``; any name of a tied tensor may be expected, and buffers that are not
        persistent.
    expected: digests by name. One map for all ranks: each digest is of the ranks' local tensors or, with
        ``group``, of the whole tensor, which is put together from DTensor shards, or from plain tensors along
        the ``input_dim`` or ``output_dim`` that they carry as an attribute. A list with one map for each
        rank: digests of the local tensors. A list of one map is that map.
    group: for CPU tensors; then the call is collective over its ranks, which all give the same ``expected``
        and get the same verdict. Without it, ``rank`` of ``size`` says whose map to take, and the verdict is
        of this rank: ``Sha256Verdict.merged`` makes one of several. timeout_s: of each wait for other ranks.
    partial: let the manifest leave tensors out, as SGLang's checker does; else those are ``unexpected``.
    Raises SpecError, on all ranks, for what is no manifest, another number of maps, ranks that were asked
    different things, a tensor that can't be read; CoverageError where the group's shards don't make a whole
    tensor; UpdateError where a rank is late.
    """
    if group is None:
        if not 0 <= rank < size:
            raise SpecError(f"rank: expected 0 <= rank < size, got rank {rank} of size {size}; check_sha256")
        maps = _maps(expected, size)
        answer, _ = _answer(source, maps[rank], partial, threads)
        return _compared({rank: answer}, maps)
    peers = Peers(group, timeout_s)
    tensors: dict[str, Tensor] = {}
    maps = []

    def answer_of_this_rank() -> Answer:
        maps.extend(_maps(expected, peers.size))
        answer, found = _answer(source, maps[peers.rank], partial, threads)
        tensors.update(found)
        asked = msgspec.json.encode([list(map(dict, maps)), partial], order="sorted")
        return msgspec.structs.replace(answer, request=hashlib.sha256(asked).hexdigest())

    answers = exchanged(peers, answer_of_this_rank)
    verdict = _compared(dict(enumerate(answers)), maps)
    if len(expected) > 1 and not isinstance(expected, Mapping):
        return verdict  # a map for each rank is of what that rank holds
    return replace(verdict, mismatching=_joined(verdict, answers, maps[0], tensors, peers))


def _joined(
    verdict: Sha256Verdict,
    answers: Sequence[Answer],
    expected: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    peers: Peers,
) -> Ranks:
    """What remains mismatching when shards have been put together. Collective."""
    held = {
        name: [a.held[name] for a in answers] for name in verdict.mismatching if name not in verdict.missing
    }
    joins = [join for name, of_ranks in held.items() for join in ways(name, of_ranks)]
    shards = shards_of(tensors, sorted({join.name for join in joins}))
    digests = joined_sha256s(joins, shards, peers)
    right = {join.name: join for join, text in zip(joins, digests, strict=True) if text == expected[join.name]}
    found = dict(verdict.mismatching)
    for name, of_ranks in held.items():
        sharded = any(h.sharded for h in of_ranks)
        holders = tuple(rank for rank, h in enumerate(of_ranks) if h.boxes)
        if name in right:
            # Replicas that had no part in the whole must be like those that had. Plain shards have none.
            if odd := odd_replicas(of_ranks, right[name]) if sharded else ():
                found[name] = odd
            else:
                del found[name]
        elif sharded and holders:
            found[name] = holders
    return found


def _answer(
    source: Source, expected: Mapping[str, str], partial: bool, threads: int | None
) -> tuple[Answer, dict[str, Tensor]]:
    """What this rank holds of the expected tensors, and beside them; with these tensors by name."""
    pairs = not isinstance(source, nn.Module | Mapping)
    everything = named_tensors(source, persistent_only=False)
    persistent = everything if pairs else named_tensors(source)
    tensors = {name: everything[name] for name in expected if name in everything}
    named = set(map(id, tensors.values()))
    unexpected: dict[object, str] = {}  # under its first name
    for name in persistent if not partial else ():
        tensor = everything[name]
        if name not in tensors and (pairs or id(tensor) not in named):
            unexpected.setdefault(name if pairs else id(tensor), name)
    return Answer(held=hold(tensors, threads), unexpected=tuple(unexpected.values())), tensors


def _compared(answers: Mapping[int, Answer], maps: Sequence[Mapping[str, str]]) -> Sha256Verdict:
    missing: dict[str, list[int]] = {}
    unexpected: dict[str, list[int]] = {}
    mismatching: dict[str, list[int]] = {}
    for rank, answer in answers.items():
        for name, sha256 in maps[rank].items():
            if name not in answer.held:
                missing.setdefault(name, []).append(rank)
            elif answer.held[name].sha256 != sha256:
                mismatching.setdefault(name, []).append(rank)
        for name in answer.unexpected:
            unexpected.setdefault(name, []).append(rank)
    return Sha256Verdict(
        missing=_sorted(missing),
        unexpected=_sorted(unexpected),
        mismatching=_sorted(mismatching),
        checked=max(len(maps[rank]) for rank in answers),
        ranks=tuple(answers),
    )


def _maps(expected: Expected, size: int) -> list[Mapping[str, str]]:
    """One map for each rank; of a single one, the same object."""
    maps = [expected] if isinstance(expected, Mapping) else expected
    if not isinstance(maps, Sequence) or isinstance(maps, str | bytes) or len(maps) not in (1, size):
        got = f"{len(maps)} of them" if isinstance(maps, list | tuple) else f"a {type(maps).__name__}"
        raise SpecError(f"expected: expected a map of names to digests, or a list of 1 or {size}; got {got}")
    for i, digests in enumerate(maps):
        where = f"manifest {i} of {len(maps)}"
        if not isinstance(digests, Mapping) or not digests:
            got = "an empty one" if isinstance(digests, Mapping) else f"a {type(digests).__name__}"
            raise SpecError(f"expected: expected a map of names to digests, got {got}; {where}")
        for name, text in digests.items():
            if not isinstance(name, str):
                raise SpecError(f"expected: expected names of tensors, got {name!r}; {where}")
            if not isinstance(text, str) or not _HEX.fullmatch(text):
                raise SpecError(f"{name}: expected 64 lower-case hexadecimal digits, got {text!r:.80}; {where}")
    return list(maps) * size if len(maps) == 1 else list(maps)


def _sorted(found: Mapping[str, Iterable[int]]) -> Ranks:
    return {name: tuple(sorted(found[name])) for name in sorted(found, key=str.encode)}


def _merged(found: Iterable[Ranks]) -> Ranks:
    ranks: dict[str, set[int]] = {}
    for names in found:
        for name, of_ranks in names.items():
            ranks.setdefault(name, set()).update(of_ranks)
    return _sorted(ranks)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
