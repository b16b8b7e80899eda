"""What has changed in a model since a moment: digests of its tensors then, and now. No copies are kept."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from weightbus.digest import Digest, Digester, P
from weightbus.digest.grid61 import check_seed
from weightbus.errors import SpecError
from weightbus.planning.box import Box
from weightbus.tensors.layout import Source, layout_of

SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Digests of what one rank held of a source's tensors.

    digests: by wire name, of this rank's parts; a tensor of which it holds no element has sums 0.
    aliases: each further name of a tied tensor, and the name that its digest stands under.
    seed: the digests'; whoever knows it could build a change that goes unseen.
    """

    digests: Mapping[str, Digest]
    aliases: Mapping[str, str]
    seed: bytes
    persistent_only: bool

    def compare(self, source: Source | Snapshot) -> Changes:
        """What has changed up to now, or up to a later snapshot. Talks to no other rank.

        A source is digested under this snapshot's seed, in one call for each device.
        Raises SpecError for a snapshot under another seed or of other buffers.
        """
        return compare(self, source)

    def _by_name(self) -> dict[str, Digest]:
        return {**self.digests, **{alias: self.digests[name] for alias, name in self.aliases.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """How a rank's tensors differ from a snapshot, by name; each name is in one field.

    changed: other bytes. respecified: another dtype, shape or shard, before and now; bytes not compared.
    missing, unexpected: there before only, now only. unchanged: equal, bit for bit.
    empty: of these the rank held no element, before and now.
    A tensor that was tied, and still is in the same way, is named once.
    """

    changed: tuple[str, ...]
    respecified: Mapping[str, tuple[str, str]]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    unchanged: tuple[str, ...]
    empty: tuple[str, ...]

    @property
    def none(self) -> bool:
        """Whether all is as it was."""
        return not (self.changed or self.respecified or self.missing or self.unexpected)

    def __str__(self) -> str:
        both = len(self.changed) + len(self.respecified) + len(self.unchanged)
        lines = [f"{len(self.changed)} of {both} tensors changed{_names(self.changed)}"]
        for name, (before, now) in self.respecified.items():
            lines.append(f"{name}: expected {before}, got {now}")
        for word, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"{len(names)} {word}{_names(names)}")
        return "\n  ".join(lines)


def snapshot(source: Source, *, seed: bytes | None = None, persistent_only: bool = True) -> Snapshot:
    """Digests of what this rank holds of ``source`` now: a module, a mapping of modules, (name, tensor) pairs.

    seed: 32 bytes; drawn at random by default. Two snapshots can be compared only under one seed.
    Tied tensors count once; a DTensor counts by its own shard. Talks to no other rank. Runs on each device's
    current stream and synchronises once with it. Puts FSDP2 modules back to their sharded parameters.
    Raises SpecError for tensors that can't be digested, ValueError if ``seed`` is not 32 bytes.
    """
    seed = check_seed(secrets.token_bytes(32) if seed is None else seed)
    layout = layout_of(source, persistent_only=persistent_only)
    parts = list(chain.from_iterable(layout.parts.values()))
    sums = {name: (0, 0) for name in layout.parts}
    for part, (lane0, lane1) in zip(parts, Digester(parts).sums(seed).tolist(), strict=True):
        a, b = sums[part.spec.name]
        sums[part.spec.name] = (a + lane0) % P, (b + lane1) % P
    digests = {
        name: Digest(
            sums=sums[name],
            dtype=layout.specs[name].dtype,
            shape=layout.specs[name].shape,
            boxes=tuple(part.box for part in held),
            seed=seed,
        )
        for name, held in layout.parts.items()
    }
    return Snapshot(digests=digests, aliases=layout.aliases, seed=seed, persistent_only=persistent_only)


def compare(before: Snapshot, now: Source | Snapshot) -> Changes:
    """What has changed since a snapshot: ``before.compare(now)``."""
    if not isinstance(now, Snapshot):
        now = snapshot(now, seed=before.seed, persistent_only=before.persistent_only)
    if (now.seed, now.persistent_only) != (before.seed, before.persistent_only):
        raise SpecError(
            "compare: expected snapshots under one seed and of the same buffers, got two that differ in "
            + ("the seed; give both the same one" if now.seed != before.seed else "persistent_only")
        )
    still_tied = before.aliases.items() & now.aliases.items()
    ties = {alias for alias, _ in still_tied}
    old, new = before._by_name(), now._by_name()
    found: dict[str, list[str]] = {"changed": [], "unchanged": [], "empty": []}
    respecified = {}
    for name in sorted((old.keys() & new.keys()) - ties, key=str.encode):
        then, here = _what(old[name]), _what(new[name])
        if then != here:
            respecified[name] = then, here
        elif not _elements(old[name].boxes):
            found["empty"].append(name)
        else:
            found["unchanged" if old[name].sums == new[name].sums else "changed"].append(name)
    return Changes(
        respecified=respecified,
        missing=tuple(sorted(old.keys() - new.keys(), key=str.encode)),
        unexpected=tuple(sorted(new.keys() - old.keys(), key=str.encode)),
        **{field: tuple(names) for field, names in found.items()},
    )


def _what(digest: Digest) -> str:
    """What must be equal for two digests to be comparable."""
    text = f"{digest.dtype}{list(digest.shape)}"
    if digest.boxes == (Box.whole(digest.shape),):
        return text
    return f"{text} at {', '.join(map(str, digest.boxes)) or 'no box'}"


def _elements(boxes: Sequence[Box]) -> int:
    return sum(box.volume for box in boxes)


def _names(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f": {', '.join(names[:SHOWN])}{more}"
