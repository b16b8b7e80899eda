"""One trainer rank's part in a save: the boxes that it writes into files that all ranks share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from torch import nn

from weightbus.control import messages as m
from weightbus.digest import combine
from weightbus.errors import SpecError, UpdateError
from weightbus.planning.box import Box
from weightbus.planning.facts import Facts, Holding, decode_facts, encode_facts
from weightbus.planning.plan import merge_sources
from weightbus.planning.spec import ITEMSIZE, Spec
from weightbus.storage.checkpoint import INDEX_SUFFIX, STEMS
from weightbus.storage.digest_list import NAME as DIGEST_LIST
from weightbus.storage.digest_list import PartSums, digests_of, saved_of
from weightbus.storage.disk import Stored
from weightbus.storage.opened import check_plain_name
from weightbus.storage.ranges import Read, pieces_of
from weightbus.storage.reading import Writer
from weightbus.storage.save_plan import File, Places, merge_places, owners, places_of, plan_files, usual_places
from weightbus.storage.saved_names import file_stem, tied_patterns
from weightbus.storage.scratch import Scratch, open_made, scratch_name
from weightbus.tensors.layout import Layout


class _Prepared(msgspec.Struct, forbid_unknown_fields=True):
    """What a rank tells the others before it is ready. scratch: the name that trainer rank 0 gives the
    directory until it is whole. places: of tensors that do not lie where ``usual_places`` says. stems: by
    folder, what files are named by; trainer rank 0's count."""

    facts: bytes
    scratch: m.Name
    places: dict[m.Name, list[tuple[str, m.Name]]] = {}
    stems: dict[str, str] = {}


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
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """modules: of the source, by name ("" is its only one); they say how their libraries name files and
        tied tensors."""
        self.task, self._place, self._look, self._progress = task, place, look, progress
        self._layout, self._modules = layout, modules or {}
        self._path = Path(task.path)
        self._made: Scratch | None = None  # on trainer rank 0
        self._scratch = ""
        self._files: dict[str, list[File]] = {}
        self._wires: dict[str, dict[str, str]] = {}
        self._specs: Mapping[str, Spec] = {}
        self.nbytes = self._total = self._done = 0

    @property
    def files(self) -> int:
        return sum(map(len, self._files.values()))

    @property
    def tensors(self) -> int:
        return len(self._specs)

    def prepare(self) -> bytes:
        """Tell what this rank holds. Raises SpecError where the directory can't be made."""
        layout = self._layout = self._layout.select(self.task.modules)
        for module in layout.modules:
            check_plain_name(module, f"{module}: a module's folder in {self._path}")
        if self._place == 0:
            self._scratch = scratch_name(self._path)
            self._made = Scratch(self._path, self._scratch)
        patterns = {name: tied_patterns(module) for name, module in self._modules.items()}
        places = places_of(layout, patterns)
        facts = {
            name: Holding(spec=spec, boxes=tuple(part.box for part in layout.parts[name]))
            for name, spec in layout.specs.items()
        }
        prepared = _Prepared(
            facts=encode_facts(facts),
            scratch=self._scratch,
            places={n: own for n, own in places.items() if own != usual_places(n, layout.modules)},
            stems={name: file_stem(self._modules.get(name)) for name in layout.modules or ("",)},
        )
        return msgspec.msgpack.encode(prepared)

    def check(self, gathered: m.Gathered) -> None:
        """Plan the files, alike on all ranks, and what this rank writes; trainer rank 0 makes them, empty."""
        sources: dict[int, Facts] = {}
        places: dict[int, Places] = {}
        stems: dict[str, str] = {}
        modules = self._layout.modules
        for place, blob in sorted(gathered.holder.items()):
            prepared = msgspec.msgpack.decode(gathered.blobs[blob], type=_Prepared)
            sources[place] = decode_facts(prepared.facts, f"trainer rank {place}")
            places[place] = {n: prepared.places.get(n) or usual_places(n, modules) for n in sources[place]}
            if place == 0:
                stems = prepared.stems
                self._scratch = self._scratch or prepared.scratch
            elif prepared.scratch:
                # The directory is this rank's to write to, or to remove: nobody else's word counts.
                raise UpdateError(
                    f"{self._path}: expected trainer rank 0 to name a scratch, got one of {place}"
                )
        manifest = merge_sources(sources)
        self._wires = merge_places(places, manifest)
        stored: dict[str, list[Stored]] = {}
        for folder in modules or ("",):
            wires, stem = self._wires.get(folder, {}), stems.get(folder, STEMS[0])
            if stem not in STEMS:
                raise SpecError(
                    f"{self._path}: expected files named by one of {', '.join(STEMS)}, got {stem!r}"
                )
            own = {
                name: manifest[wire] for name, wire in sorted(wires.items(), key=lambda row: row[0].encode())
            }
            at = self._path.parent / self._scratch / folder
            files = self._files[folder] = plan_files(at, own, self.task.file_bytes, {"format": "pt"}, stem)
            for name, tensor in ((n, t) for file in files for n, t in file.tensors.items()):
                stored.setdefault(wires[name], []).append(tensor)
        self._specs = manifest
        self._share(sources, stored)
        if self._place == 0:
            self._make()

    def _share(self, sources: Mapping[int, Facts], stored: Mapping[str, list[Stored]]) -> None:
        """What of this rank's boxes it writes, and what it only digests, as another rank writes it."""
        chosen = owners(sources)
        self._reads: list[Read] = []
        self._keys: list[tuple[str, Box]] = []
        self._unwritten: set[int] = set()
        for name, found in self._layout.parts.items():
            for part in (one for one in found if one.box.volume):
                mine = chosen[name, part.box] == self._place
                nbytes = part.box.volume * ITEMSIZE[self._specs[name].dtype]
                for tensor in stored[name] if mine else stored[name][:1]:
                    if not mine:
                        self._unwritten.add(len(self._reads))
                    self._reads.append(Read(stored=tensor, box=part.box, view=part.tensor))
                    self._keys.append((name, part.box))
                    self._total += nbytes
                    self.nbytes += nbytes if mine else 0

    def _make(self) -> None:
        assert self._made is not None  # noqa: S101 - trainer rank 0 has it
        self._made.make(sum(file.nbytes for files in self._files.values() for file in files))
        for folder, files in self._files.items():
            if folder:
                self._made.folder(folder)
            for file in files:
                self._made.create(folder, file.path.name, file.header, file.nbytes)

    def write(self) -> bytes:
        """Write this rank's boxes and have them on the disk; returns the digests of all that it holds."""
        pieces = pieces_of(self._reads)
        views = {number: read.view for number, read in enumerate(self._reads) if read.view is not None}
        with Writer(self._layout.device, self._look, self._open) as writer:
            sums = writer.write(pieces, views, self._moved, skip=self._unwritten)
        rows = {
            (name, box): PartSums(name=name, boxes=[(box.offsets, box.sizes)], sums=sums[number])
            for number, (name, box) in enumerate(self._keys)
        }
        return msgspec.msgpack.encode(list(rows.values()))

    def _open(self, path: Path) -> int:
        folder, file = next((n, f) for n, files in self._files.items() for f in files if f.path == path)
        return open_made(self._path, self._scratch, folder, path.name, file.header, file.nbytes)

    def finish(self, gathered: m.Gathered) -> None:
        """Compare what all ranks hold. Trainer rank 0 then writes list and index, and gives the directory its
        name. Raises UpdateError, naming tensor and ranks, where two hold different bytes of one box."""
        rows: list[PartSums] = []
        first: dict[tuple[str, str], tuple[int, PartSums]] = {}
        for place, blob in sorted(gathered.holder.items()):
            for row in msgspec.msgpack.decode(gathered.blobs[blob], type=list[PartSums]):
                other, same = first.setdefault((row.name, repr(row.boxes)), (place, row))
                if same is row:
                    rows.append(row)
                elif same.sums != row.sums:
                    box = ", ".join(str(Box(*pair)) for pair in row.boxes)
                    raise UpdateError(
                        f"{row.name}: expected the same bytes on all trainer ranks that hold {box}, got others "
                        f"on rank {place} than on rank {other}; make them equal first (broadcast from one rank)"
                    )
        rows += [PartSums(name=n, boxes=[], sums=(0, 0)) for n, s in self._specs.items() if not s.elements]
        digests = {name: combine(parts) for name, parts in digests_of(rows, self._specs).items()}
        if self._made is None:
            return
        for folder, files in self._files.items():
            own = {name: digests[wire] for name, wire in self._wires.get(folder, {}).items()}
            own = {name: own[name] for name in sorted(own)}
            self._put(folder, DIGEST_LIST, msgspec.json.encode(saved_of(own, self.task.version)))
            if len(files) > 1:
                weight_map = {name: file.path.name for file in files for name in file.tensors}
                total = sum(tensor.spec.nbytes for file in files for tensor in file.tensors.values())
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                stem = files[0].path.name.partition("-")[0]
                self._put(folder, f"{stem}{INDEX_SUFFIX}", json.dumps(index, indent=1).encode())
        self._made.publish()

    def _put(self, folder: str, name: str, data: bytes) -> None:
        assert self._made is not None  # noqa: S101 - trainer rank 0 has it
        self._made.create(folder, name, data, len(data))

    def close(self) -> None:
        if self._made is not None:
            self._made.close()

    def _moved(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(self._done, self._total)
