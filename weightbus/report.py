"""What a caller gets back: the report of an update, the verdict of a check."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightbus.planning.box import Box

# How many of the names that are not proved a printed report or verdict shows.
SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """One tensor that is not what it should be, on one server rank.

    kind: what its digests say that it is (docs/checks.md); empty where they don't. where: in words, the part
    that differs, or why that is not known; box: the box of the global tensor that holds all of it.
    """

    rank: str
    tensor: str | None
    reason: str
    kind: str = ""
    where: str = ""
    box: Box | None = None

    def __str__(self) -> str:
        where = ": ".join(filter(None, (self.kind, self.where)))
        text = "; ".join(filter(None, (self.reason, where)))
        return f"{self.tensor}: {text}; {self.rank}" if self.tensor else f"{self.rank}: {text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of a check, the same on every trainer rank.

    word: ``verified`` if every server rank holds the version's bytes live; ``partial`` if all that can
    be digested does, but not all can; ``mismatch`` otherwise (docs/checks.md has the table).
    partial: the names that are not proved, each with the reason.
    exempt: names of server ranks' tensors that no update feeds in full, each with the reason why that is no
    error: ``local``, ``derived``, or what can't be traced.
    seconds: from the call to the verdict; servers may have been busy for some of it. digest_s: the longest that
    a server rank took to digest.
    """

    word: str
    version: int | None
    mismatches: tuple[Mismatch, ...]
    partial: Mapping[str, str]
    exempt: Mapping[str, str]
    servers: int
    seconds: float
    digest_s: float

    @property
    def ok(self) -> bool:
        return self.word in ("verified", "partial")

    def __str__(self) -> str:
        where = _count(self.servers, "server rank")
        spent = f"{self.seconds:.3f} s, {self.digest_s * 1e3:.1f} ms of it for digests"
        head = f"{self.word} version {self.version} on {where} in {spent}"
        if self.exempt:
            words = sorted({word for word in self.exempt.values() if word in ("local", "derived")})
            head += f"; {_count(len(self.exempt), 'name')} not fed in full: {', '.join(words) or 'not traced'}"
        return "\n  ".join([head, *map(str, self.mismatches), *unproved_lines(self.partial)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One that took part in an update. ranks: its trainer rank, server rank or both, in words. started: as
    Unix time. serves: it has a server rank and no other."""

    ranks: str
    host: str
    pid: int
    started: float
    serves: bool

    def __str__(self) -> str:
        began = f" since {time.strftime('%F %T', time.localtime(self.started))}" if self.started else ""
        return f"pid {self.pid} on {self.host}{began}"


def both_ends(processes: Sequence[Process]) -> str:
    """The first process of each end, in words; empty if all of them are one end's, or both's."""
    sends = next((one for one in processes if not one.serves), None)
    serves = next((one for one in processes if one.serves), None)
    return f"from {sends} to {serves}" if sends and serves else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One committed update, as this trainer rank saw it.

    word: ``verified``, ``partial`` or ``unverified`` (not asked for). left_out: replicas that have not got it,
    each with the reason. partial: as in Verdict. nbytes: of the
    tensors in the wire's dtypes. seconds: from the call to the commit on all ranks. stages: seconds of this
    rank's parts of it. staging_bytes: this rank's staging memory. route: how the bytes went, ``broadcast``,
    ``reshard``, ``peer`` or ``local``; route_reason: why so. A version is known by job, incarnation and number.
    processes: all that took part; of a job without a name, the printed report says one of each end. skipped:
    names of which some replica takes nothing, by its ``name_map`` or its loading code, and of those that a
    wrapper holds beside the model (docs/wrappers.md), each with the reason; of a tied tensor one taken name is
    enough.
    """

    word: str
    version: int
    job: str
    incarnation: int
    epoch: int
    tensors: int
    nbytes: int
    seconds: float
    stages: Mapping[str, float]
    staging_bytes: int
    trainers: int
    servers: int
    replicas: tuple[int, ...]
    left_out: Mapping[int, str]
    partial: Mapping[str, str]
    skipped: Mapping[str, str]
    route: str
    route_reason: str
    processes: tuple[Process, ...] = ()

    @property
    def verified(self) -> bool:
        return self.word == "verified"

    @property
    def transfer_share(self) -> float:
        """Of ``seconds``, in which bytes moved; the rest is control and what is left of digests."""
        return self.stages.get("transfer", 0.0) / self.seconds

    def __str__(self) -> str:
        head = (
            f"{self.word} version {self.version}: {_count(self.tensors, 'tensor')}, "
            f"{_bytes(self.nbytes)} in {self.seconds:.3f} s, {self.nbytes / self.seconds / 1e9:.2f} GB/s, "
            f"{_count(self.trainers, 'trainer rank')} to {_count(self.servers, 'server rank')}, {self.route}"
        )
        ends = "" if self.job else both_ends(self.processes)
        head = f"{head}; unnamed job: {ends}" if ends else head
        left_out = [f"left out: replica {replica}: {reason}" for replica, reason in self.left_out.items()]
        skipped = _listed("not taken", self.skipped, "skipped")
        return "\n  ".join([head, *left_out, *unproved_lines(self.partial), *skipped])


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """One load from disk, as this server rank saw it.

    word: ``verified`` if the directory has a digest list, all ranks together have read what it says, and
    each holds live what it has read; ``partial`` if some tensors could not be digested live (each with its
    reason in ``partial``); ``unverified`` if there is no list. nbytes: this rank's. seconds: of all ranks.
    """

    word: str
    version: int | None
    nbytes: int
    seconds: float
    servers: int
    partial: Mapping[str, str]

    def __str__(self) -> str:
        label = "" if self.version is None else f" version {self.version}"
        head = (
            f"{self.word} load{label}: {_bytes(self.nbytes)} on this rank in {self.seconds:.3f} s, "
            f"{_count(self.servers, 'server rank')}"
        )
        return "\n  ".join([head, *unproved_lines(self.partial)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """One save. nbytes: that this trainer rank has written. files, tensors: of all ranks."""

    path: str
    version: int | None
    files: int
    tensors: int
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"saved {_count(self.tensors, 'tensor')} to {self.path} in {_count(self.files, 'file')}, "
            f"{_bytes(self.nbytes)} by this rank in {self.seconds:.3f} s"
        )


def unproved_lines(partial: Mapping[str, str]) -> list[str]:
    """A line for each of the first names that are not proved, and how many more there are."""
    return _listed("not proved", partial, "partial")


def _listed(what: str, names: Mapping[str, str], field: str) -> list[str]:
    lines = [f"{what}: {name}: {why}" for name, why in list(names.items())[:SHOWN]]
    left = len(names) - SHOWN
    return [*lines, f"and {_count(left, 'more name')} in .{field}"] if left > 0 else lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
