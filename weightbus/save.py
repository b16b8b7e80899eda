"""One trainer rank's part in a save: the boxes that it writes into files that all ranks share."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from weightbus import messages as m
from weightbus.box import Box
from weightbus.checkpoint import INDEX_SUFFIX
from weightbus.digest import combine
from weightbus.digest_list import NAME as DIGEST_LIST
from weightbus.digest_list import PartSums, digests_of, saved_of
from weightbus.disk import DTYPES, Stored
from weightbus.errors import SpecError
from weightbus.facts import Facts, Holding, decode_facts, encode_facts
from weightbus.layout import Layout
from weightbus.plan import merge_sources
from weightbus.reading import Read, Writer, pieces_of
from weightbus.spec import ITEMSIZE, Spec

_DTYPES = {ours: theirs for theirs, ours in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A safetensors file of a save: its header, and where its tensors lie, by their names in the file."""

    path: Path
    header: bytes
    nbytes: int
    tensors: Mapping[str, Stored]


def plan_files(
    folder: Path, specs: Mapping[str, Spec], file_bytes: int, metadata: Mapping[str, str]
) -> list[File]:
    """Files of at most ``file_bytes`` of data (a tensor is never cut), in the order of the specs.

    Raises SpecError for a dtype that safetensors does not have.
    """
    groups: list[list[tuple[str, Spec]]] = []
    fill = 0
    for name, spec in specs.items():
        if spec.dtype not in _DTYPES:
            raise SpecError(f"{name}: expected a dtype that safetensors has, got {spec.dtype}")
        if not groups or (fill and fill + spec.nbytes > file_bytes):
            groups.append([])
            fill = 0
        groups[-1].append((name, spec))
        fill += spec.nbytes
    files = []
    for number, group in enumerate(groups, start=1):
        one = len(groups) == 1
        name = "model.safetensors" if one else f"model-{number:05}-of-{len(groups):05}.safetensors"
        files.append(_file(folder / name, group, metadata))
    return files


def _file(path: Path, group: Sequence[tuple[str, Spec]], metadata: Mapping[str, str]) -> File:
    # The widest first, as safetensors orders them, so that each lies aligned.
    group = sorted(group, key=lambda row: (-ITEMSIZE[row[1].dtype], row[0].encode()))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, spec in group:
        shape = list(spec.shape)
        entries[name] = {"dtype": _DTYPES[spec.dtype], "shape": shape, "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    begin = len(header)
    tensors = {}
    for name, spec in group:
        tensors[name] = Stored(spec=spec, path=path, begin=begin, end=begin + spec.nbytes)
        begin += spec.nbytes
    return File(path=path, header=header, nbytes=begin, tensors=tensors)


def owners(sources: Mapping[int, Facts]) -> dict[tuple[str, Box], int]:
    """Which rank writes each distinct box: of those that hold it, the one with the least to write so far."""
    holders: dict[tuple[str, Box], list[int]] = {}
    nbytes: dict[tuple[str, Box], int] = {}
    for rank, facts in sources.items():
        for name, holding in facts.items():
            for box in holding.boxes:
                if box.volume:
                    holders.setdefault((name, box), []).append(rank)
                    nbytes[name, box] = box.volume * ITEMSIZE[holding.spec.dtype]
    load = dict.fromkeys(sources, 0)
    chosen = {}
    for key in sorted(holders, key=lambda key: (key[0].encode(), key[1].offsets)):
        chosen[key] = min(holders[key], key=lambda rank: (load[rank], rank))
        load[chosen[key]] += nbytes[key]
    return chosen


class _Prepared(msgspec.Struct, forbid_unknown_fields=True):
    """What a rank tells the others before it is ready. scratch: the name that trainer rank 0 gives the
    directory until it is whole."""

    facts: bytes
    scratch: m.Name


class Save:
    """The steps of a save on this rank: ``prepare``, ``check``, ``write``, ``finish``; then ``close``."""

    def __init__(
        self,
        task: m.SaveTask,
        place: int,
        layout: Layout,
        *,
        look: Callable[[], None],
        progress: Callable[[int, int], None],
    ) -> None:
        self.task, self._place, self._look, self._progress = task, place, look, progress
        self._layout = layout
        self._path = Path(task.path)
        self._scratch: Path | None = None
        self._files: dict[str, list[File]] = {}
        self._specs: Mapping[str, Spec] = {}
        self.nbytes = self._written = 0

    @property
    def files(self) -> int:
        return sum(map(len, self._files.values()))

    @property
    def tensors(self) -> int:
        return len(self._specs)

    def prepare(self) -> bytes:
        """Tell what this rank holds. Raises SpecError where the directory can't be made."""
        layout = self._layout = self._layout.select(self.task.modules)
        scratch = ""
        if self._place == 0:
            if self._path.exists():
                raise SpecError(f"{self._path}: expected a path where nothing is yet, got one that exists")
            if not self._path.parent.is_dir():
                raise SpecError(f"{self._path}: expected a directory to make it in, got no {self._path.parent}")
            scratch = f".{self._path.name}.{secrets.token_hex(4)}.part"
        facts = {
            name: Holding(spec=spec, boxes=tuple(part.box for part in layout.parts[name]))
            for name, spec in layout.specs.items()
        }
        return msgspec.msgpack.encode(_Prepared(facts=encode_facts(facts), scratch=scratch))

    def check(self, gathered: m.Gathered) -> None:
        """Plan the files, alike on all ranks, and what this rank writes; trainer rank 0 makes them, empty."""
        sources: dict[int, Facts] = {}
        for place, blob in sorted(gathered.holder.items()):
            prepared = msgspec.msgpack.decode(gathered.blobs[blob], type=_Prepared)
            sources[place] = decode_facts(prepared.facts, f"trainer rank {place}")
            if prepared.scratch:
                self._scratch = self._path.parent / Path(prepared.scratch).name
        assert self._scratch is not None, "trainer rank 0 names it"
        manifest = merge_sources(sources)
        metadata = {"format": "pt"}
        stored: dict[str, Stored] = {}
        for prefix in [f"{module}." for module in self._layout.modules] or [""]:
            specs = {n.removeprefix(prefix): spec for n, spec in manifest.items() if n.startswith(prefix)}
            files = plan_files(self._scratch / prefix.rstrip("."), specs, self.task.file_bytes, metadata)
            self._files[prefix] = files
            for file in files:
                stored |= {prefix + name: tensor for name, tensor in file.tensors.items()}
        self._specs = manifest
        mine = [key for key, rank in owners(sources).items() if rank == self._place]
        parts = {(name, part.box): part for name, found in self._layout.parts.items() for part in found}
        self._names = [name for name, _ in mine]
        self._reads = [Read(stored=stored[key[0]], box=key[1], view=parts[key].tensor) for key in mine]
        self.nbytes = sum(read.box.volume * ITEMSIZE[read.stored.spec.dtype] for read in self._reads)
        if self._place == 0:
            self._make()

    def _make(self) -> None:
        assert self._scratch is not None
        self._scratch.mkdir()
        for files in self._files.values():
            for file in files:
                file.path.parent.mkdir(exist_ok=True)
                with file.path.open("xb") as made:
                    made.write(file.header)
                    made.truncate(file.nbytes)

    def write(self) -> bytes:
        """Write this rank's boxes and have them on the disk; returns their digests."""
        pieces = pieces_of(self._reads)
        views = {number: read.view for number, read in enumerate(self._reads) if read.view is not None}
        device = self._layout.device
        with Writer(device, self._look) as writer:
            sums = writer.write(pieces, views, self._moved)
        rows = [
            PartSums(name=self._names[n], boxes=[(read.box.offsets, read.box.sizes)], sums=sums[n])
            for n, read in enumerate(self._reads)
        ]
        return msgspec.msgpack.encode(rows)

    def finish(self, gathered: m.Gathered) -> None:
        """Trainer rank 0 adds up the digests, writes list and index, and gives the directory its name."""
        rows: list[PartSums] = []
        for blob in gathered.blobs:
            rows += msgspec.msgpack.decode(blob, type=list[PartSums])
        rows += [PartSums(name=n, boxes=[], sums=(0, 0)) for n, s in self._specs.items() if not s.elements]
        digests = {name: combine(parts) for name, parts in digests_of(rows, self._specs).items()}
        if self._place != 0:
            return
        assert self._scratch is not None
        for prefix, files in self._files.items():
            folder = self._scratch / prefix.rstrip(".")
            own = {
                n.removeprefix(prefix): digest for n, digest in sorted(digests.items()) if n.startswith(prefix)
            }
            _write(folder / DIGEST_LIST, msgspec.json.encode(saved_of(own, self.task.version)))
            if len(files) > 1:
                weight_map = {name: file.path.name for file in files for name in file.tensors}
                total = sum(spec.nbytes for name, spec in self._specs.items() if name.startswith(prefix))
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                _write(folder / f"model{INDEX_SUFFIX}", json.dumps(index, indent=1).encode())
            _sync(folder)
        _sync(self._scratch)
        if self._path.exists():
            raise SpecError(f"{self._path}: expected a path where nothing is yet, got one made meanwhile")
        os.rename(self._scratch, self._path)
        _sync(self._path.parent)
        self._scratch = None

    def close(self) -> None:
        if self._place == 0 and self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _moved(self, nbytes: int) -> None:
        self._written += nbytes
        self._progress(self._written, self.nbytes)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
