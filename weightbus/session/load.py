"""One server rank's part in a load: what it reads of a directory or payload, proved before the first write."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import torch

from weightbus.control import messages as m
from weightbus.digest import STABLE_SEED, Digest, Digester, P, combine
from weightbus.errors import CoverageError, DigestError, SpecError
from weightbus.memory.shard import Part
from weightbus.planning.box import Box
from weightbus.session.destination import Destination
from weightbus.storage.conversion import Converted, convert
from weightbus.storage.digest_list import NAME as DIGEST_LIST
from weightbus.storage.digest_list import PartSums, Saved, digests_of, saved_in
from weightbus.storage.disk import Stored, stored_modules
from weightbus.storage.opened import Files
from weightbus.storage.payload import stored_payloads, tensors_of_payload
from weightbus.storage.ranges import OnDevice, Read, pieces_of
from weightbus.storage.reading import Reader
from weightbus.storage.shared_payload import open_shared
from weightbus.storage.sources import Sources
from weightbus.tensors.bucket import torch_dtype
from weightbus.tensors.install import Target
from weightbus.tensors.loaders.torch_joins import Move

log = logging.getLogger("weightbus")


class _Prepared(msgspec.Struct, forbid_unknown_fields=True):
    """What a rank tells the others before it is ready. untaken: tensors that it does not know; skipped: that it
    takes nothing of, by its own decision, and why."""

    untaken: list[str]
    skipped: dict[str, str]
    digested: list[PartSums]


class Load:
    """The steps of a load on this rank: ``prepare``, ``check``, ``write``; then ``close``."""

    def __init__(
        self,
        offer: m.TaskOffer,
        task: m.LoadTask,
        destination: Destination,
        *,
        look: Callable[[], None],
        progress: Callable[[int, int], None],
    ) -> None:
        self.offer, self.task, self._destination = offer, task, destination
        self._look, self._progress = look, progress
        self.modules: list[str] | None = task.modules
        self.version = task.version
        self.partial: dict[str, str] = {}
        self.wrote = False
        self.nbytes = 0
        self._done = self._total = 0
        self._files = Files(task.roots)
        self._lists: dict[str, Saved] = {}
        self._prefixes: dict[str, str] = {}  # of names of tensors in folders: the module's, with a dot
        self._sources: Sources | None = None
        self._mapped = contextlib.ExitStack()
        self._sums: dict[int, tuple[int, int]] = {}
        self._manifest: Mapping[str, Stored] = {}

    @property
    def complete(self) -> bool:
        """Whether it writes all of this rank's tensors."""
        known = self._destination.layout.modules
        return not self.task.partial and (self.task.modules is None or set(self.task.modules) == set(known))

    @property
    def what(self) -> str:
        """In words, for errors."""
        return self.task.path or "tensors in a request"

    def prepare(self) -> bytes:
        """Open and validate everything, and digest it where there is a list to compare with.

        Raises SpecError, naming file and tensor; nothing has been written.
        """
        destination, task = self._destination, self.task
        if destination.state == "torn" and not self.complete:
            raise SpecError(
                f"{self.what}: expected a load of everything, as this rank is torn, got one of a part"
            )
        memory: dict[Path, memoryview | OnDevice] = {}
        if task.path:
            manifest = self._open(Path(task.path))
        else:
            manifest, memory, self.modules = stored_payloads(
                self.offer.frames, self.offer.payloads, task, destination.layout.modules, self._open_payload
            )
        if not manifest:
            raise SpecError(f"{self.what}: expected at least one tensor, got none")
        self._manifest = manifest
        converted = self._convert()
        self._target = target = destination.target(converted.specs, self.modules, partial=task.partial)
        self._account(target)
        self._plan_reads(target, converted)
        self._pieces = pieces_of(self._reads)
        self.nbytes = sum(piece.nbytes for piece in self._pieces)
        self._sources = Sources([read.stored for read in self._reads], memory, self._files)
        listed = {name for name, prefix in self._prefixes.items() if task.verify and prefix in self._lists}
        digested = [piece for piece in self._pieces if piece.stored.spec.name in listed]
        self._total = self.nbytes + (self.nbytes if task.atomic else sum(piece.nbytes for piece in digested))
        self._reader = Reader(self._sources, destination.device, self._look)
        if digested:
            self._sums = self._reader.digest(digested, self._moved, keep=task.atomic)
        if task.atomic and task.path:
            self._reader.keep([piece for piece in self._pieces if piece.kept is None], self._moved)
            self._sources.check_unchanged(proved=len(digested) == len(self._pieces))
        taken = {move.wire for wire in target.specs for move in converted.moves[wire]}
        skipped = dict.fromkeys(converted.ignored, "the model's class leaves it out")
        if skipped:
            log.info("%s: %d tensors left out by the model's class: %s", self.what, len(skipped), min(skipped))
        skipped |= {
            move.wire: why for wire, why in target.skipped.items() for move in converted.moves.get(wire, ())
        }
        untaken = [name for name in manifest if name not in taken and name not in skipped]
        return msgspec.msgpack.encode(_Prepared(untaken=untaken, skipped=skipped, digested=self._digested()))

    def _convert(self) -> Converted:
        """The tensors under the names and shapes of this rank's models."""
        specs = {name: tensor.spec for name, tensor in self._manifest.items()}
        layout = self._destination.layout
        own = {name: spec.shape for name, spec in layout.specs.items()}
        own |= {alias: own[name] for alias, name in layout.aliases.items()}
        return convert(specs, self._destination.own_names(), own)

    def _plan_reads(self, target: Target, converted: Converted) -> None:
        """What this rank reads of the files: boxes of their own tensors, each into a view of what is live."""
        opaque = target.arrived()
        self._reads: list[Read] = []
        for wire in target.specs:
            for box, view in target.live(wire) if wire not in opaque else ():
                for move in converted.moves[wire]:
                    if (part := move.within(box, view)) is not None:
                        self._reads.append(Read(stored=self._manifest[move.wire], box=part[0], view=part[1]))
        # Their views are made when it is their turn: together they are the whole tensor.
        self._opaque: dict[str, dict[int, Move]] = {}
        for wire in opaque:
            numbers = self._opaque[wire] = {}
            for move in converted.moves[wire]:
                numbers[len(self._reads)] = move
                self._reads.append(Read(stored=self._manifest[move.wire], box=move.box, view=None))

    def _account(self, target: Target) -> None:
        """What of the model this load would not prove. Raises SpecError where proof is required."""
        self._destination.audit.begin(target)
        self.partial = self._destination.audit.unproved(target)
        if self._destination.audit.require_proof and (word := self.word) != "verified":
            raise SpecError(
                f"{self.what}: expected a digest list of every module, as require_proof says, "
                f"got a load that would be {word}"
            )

    def _open_payload(
        self, where: Path, payload: bytes
    ) -> tuple[dict[str, Stored], Mapping[Path, memoryview | OnDevice]]:
        if self.task.format == "shared":
            tensors, memory, mapped = open_shared(where, payload, self._destination.device)
            self._mapped.callback(mapped.close)
            return tensors, memory
        data = memoryview(payload)
        return tensors_of_payload(where, data, self.task.format), {where: data}

    def _open(self, path: Path) -> dict[str, Stored]:
        modules = self._destination.layout.modules
        if modules:
            self.modules = list(self._destination.layout.select(self.task.modules).modules)
        elif self.task.modules is not None:
            self._destination.layout.select(self.task.modules)  # raises
        found, folders = stored_modules(path, self.modules, self._files)
        by_path = {folder.path: prefix for prefix, folder in folders.items()}
        self._prefixes = {n: by_path[t.path.parent] for n, t in found.items() if t.path.parent in by_path}
        for prefix, folder in folders.items():
            if folder.has(DIGEST_LIST):
                self._lists[prefix] = saved_in(folder.file(DIGEST_LIST))
                self._fits(prefix, folder.path / DIGEST_LIST, found)
        versions = {saved.version for saved in self._lists.values()}
        if self.version is None and len(self._lists) == len(folders) and len(versions) == 1:
            (self.version,) = versions
        return found

    def _fits(self, prefix: str, path: Path, found: Mapping[str, Stored]) -> None:
        listed = self._lists[prefix].tensors
        held = {n.removeprefix(prefix): t.spec for n, t in found.items() if self._prefixes[n] == prefix}
        for name in sorted(listed.keys() | held.keys(), key=str.encode):
            entry = (listed[name].dtype, listed[name].shape) if name in listed else "no entry"
            spec = (held[name].dtype, held[name].shape) if name in held else "no tensor"
            if entry != spec:
                raise SpecError(f"{path}: {name}: expected the list to fit its files, got {entry} but {spec}")

    def _digested(self) -> list[PartSums]:
        by_name: dict[str, list[int]] = {}
        for number in self._sums:
            by_name.setdefault(self._reads[number].stored.spec.name, []).append(number)
        found = []
        for name, numbers in by_name.items():
            boxes = [(self._reads[n].box.offsets, self._reads[n].box.sizes) for n in numbers]
            a, b = (sum(self._sums[n][lane] for n in numbers) % P for lane in (0, 1))
            found.append(PartSums(name=name, boxes=boxes, sums=(a, b)))
        return found

    # -- what the ranks say together ---------------------------------------------------------------

    def check(self, gathered: m.Gathered) -> None:
        """Raise unless all ranks together take every tensor, and read what the lists say."""
        prepared = {}
        for place, blob in gathered.holder.items():
            prepared[place] = msgspec.msgpack.decode(gathered.blobs[blob], type=_Prepared)
        skipped = {name for one in prepared.values() for name in one.skipped}
        untaken = (
            set.intersection(*(set(one.untaken) | one.skipped.keys() for one in prepared.values())) - skipped
        )
        if untaken:
            name = min(untaken, key=str.encode)
            raise SpecError(
                f"{name}: unknown name: expected one of {len(prepared)} server ranks to take it, "
                f"got none; {self.what}"
            )
        rows = [row for one in prepared.values() for row in one.digested]
        specs = {name: tensor.spec for name, tensor in self._manifest.items()}
        for name, parts in digests_of(rows, specs).items():
            self._compare(name, parts)

    def _compare(self, name: str, parts: list[Digest]) -> None:
        prefix = self._prefixes[name]
        listed = self._lists[prefix].tensors[name.removeprefix(prefix)].digest
        whole = [part for part in parts if part.boxes == (Box.whole(part.shape),)]
        try:
            got = str(combine(whole or parts))
        except CoverageError:
            self.partial[name] = "what the ranks read of it does not add up to the whole tensor"
            return
        except DigestError as error:
            raise DigestError(f"{name}: {error}; {self.what}") from error
        if got != listed:
            raise DigestError(f"{name}: expected {listed} as listed, got {got}; {self._manifest[name].path}")

    # -- writing -----------------------------------------------------------------------------------

    def write(self) -> None:
        """Put everything into place. Whatever is raised from here on leaves this rank torn."""
        assert self._sources is not None, "prepared first"  # noqa: S101 - for mypy
        self.wrote = True
        placed = {number: read.view for number, read in enumerate(self._reads) if read.view is not None}
        self._reader.write([piece for piece in self._pieces if piece.number in placed], placed, self._moved)
        for wire, moves in self._opaque.items():
            hook = self._target.hooks[wire]
            dtype = torch_dtype(self._target.specs[wire].dtype)
            shape = self._target.specs[wire].shape
            device = next(tensor.device for tensor in hook.parameters.values())
            whole = torch.empty(shape, dtype=dtype, device=device)
            own = [piece for piece in self._pieces if piece.number in moves]
            parts = {number: move.within(Box.whole(shape), whole) for number, move in moves.items()}
            views = {number: part[1] for number, part in parts.items() if part is not None}
            self._reader.write(own, views, self._moved)
            hook.run(whole)
        for _, _, region, fill in self._target.fills():
            region.fill_(fill.value)
        for spoilt in self._destination.audit.derive(self._target, prove=self.task.verify):
            raise DigestError(f"{spoilt.name}: {spoilt.reason}")
        if self._sums:
            self._prove(self._sums)
        if not self.task.atomic:
            self._check_unchanged()

    def _check_unchanged(self) -> None:
        """Raise unless the files are as they were, or the list proves what was read. A file that only lost its
        name to another save, or has a further one, is read again."""
        assert self._sources is not None, "prepared first"  # noqa: S101 - for mypy
        proved, relinked = self.word == "verified", self._sources.relinked()
        plain = all(
            read.view is not None and read.view.dtype == torch_dtype(read.stored.spec.dtype)
            for read in self._reads
        )
        self._sources.check_unchanged(relinked=plain, proved=proved)
        if relinked and not proved:
            self._prove(self._reader.digest(self._pieces, lambda nbytes: None, keep=False))

    def _prove(self, expected: Mapping[int, tuple[int, int]]) -> None:
        """Digest what is live now, where it has the stored dtype, and compare with what was read."""
        rows: list[tuple[int, Part]] = []
        for number in expected:
            read = self._reads[number]
            if read.view is None:
                continue
            if read.view.dtype != torch_dtype(read.stored.spec.dtype):
                self.partial[read.stored.spec.name] = f"cast from {read.stored.spec.dtype} in the file"
                continue
            rows.append((number, Part(spec=read.stored.spec, box=read.box, tensor=read.view)))
        sums = Digester([part for _, part in rows]).sums(STABLE_SEED).tolist()
        for (number, part), (a, b) in zip(rows, sums, strict=True):
            if (a, b) != expected[number]:
                raise DigestError(f"{part.spec.name}: expected {part.box} live as it was read, got other bytes")

    def finish(self, gathered: m.Gathered) -> None:
        raise AssertionError("a load ends when it is written")

    @property
    def word(self) -> Literal["verified", "partial", "unverified"]:
        """How far it is proved."""
        if not self._lists or not self.task.verify or len(self._lists) < len(self.modules or [""]):
            return "unverified"
        return "partial" if self.partial else "verified"

    def close(self) -> None:
        if self._sources is not None:
            self._sources.close()
        self._files.close()
        self._mapped.close()

    def _moved(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(self._done, self._total)
