"""What goes where in a save: files, their headers, which rank writes which box. Pure, alike on all ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightbus.errors import SpecError
from weightbus.planning.box import Box
from weightbus.planning.facts import Facts
from weightbus.planning.spec import ITEMSIZE, Spec
from weightbus.storage.checkpoint import SUFFIX
from weightbus.storage.disk import DTYPES, MAX_HEADER_BYTES, Stored
from weightbus.storage.saved_names import kept_name
from weightbus.tensors.layout import Layout

_DTYPES = {ours: theirs for theirs, ours in DTYPES.items()}

Places = Mapping[str, Sequence[tuple[str, str]]]
"""Wire names, and where each tensor lies: the folder ("" for the only one) and the name in its files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A safetensors file of a save: its header, and where its tensors lie, by their names in the file."""

    path: Path
    header: bytes
    nbytes: int
    tensors: Mapping[str, Stored]


def plan_files(
    folder: Path, specs: Mapping[str, Spec], file_bytes: int, metadata: Mapping[str, str], stem: str = "model"
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
        name = f"{stem}{SUFFIX}" if one else f"{stem}-{number:05}-of-{len(groups):05}{SUFFIX}"
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
    if len(text) > MAX_HEADER_BYTES:
        raise SpecError(f"{path.name}: expected a header of at most {MAX_HEADER_BYTES} bytes, got {len(text)}")
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


def places_of(layout: Layout, patterns: Mapping[str, Iterable[str]]) -> dict[str, list[tuple[str, str]]]:
    """Where this rank's tensors lie in files: once in the folder of each module that holds them, under the
    name that its library keeps.

    patterns: by module, of names that are left out where they are tied to others.
    """
    names: dict[str, list[str]] = {wire: [wire] for wire in layout.specs}
    for alias, wire in layout.aliases.items():
        names[wire].append(alias)
    found = {}
    for wire, all_names in names.items():
        by_module: dict[str, list[str]] = {}
        for name in all_names:
            if (module := _owner(name, layout.owners[wire])) in (layout.modules or ("",)):
                by_module.setdefault(module, []).append(name[len(_prefix(module)) :])
        found[wire] = sorted(
            (module, kept_name(own, patterns.get(module, ()))) for module, own in by_module.items()
        )
    return found


def usual_places(wire: str, modules: Sequence[str]) -> list[tuple[str, str]]:
    """Where a tensor lies that has one name in one module; [] where that is not clear."""
    meant = [module for module in modules or ("",) if wire.startswith(_prefix(module))]
    return [(meant[0], wire[len(_prefix(meant[0])) :])] if len(meant) == 1 else []


def merge_places(of_ranks: Mapping[int, Places], manifest: Mapping[str, Spec]) -> dict[str, dict[str, str]]:
    """By folder, the wire name behind each name in its files.

    of_ranks: by trainer rank, of what it holds. Raises SpecError for ranks that say different things, and for
    two tensors in one place.
    """
    first: dict[str, int] = {}
    found: dict[str, dict[str, str]] = {}
    for rank, places in of_ranks.items():
        for wire, own in places.items():
            other = first.setdefault(wire, rank)
            if list(own) != list(of_ranks[other][wire]):
                raise SpecError(
                    f"{wire}: expected one place in files, got {list(of_ranks[other][wire])} on trainer rank "
                    f"{other} and {list(own)} on trainer rank {rank}"
                )
    for wire in manifest:
        for folder, name in of_ranks[first[wire]][wire]:
            if (other_wire := found.setdefault(folder, {}).setdefault(name, wire)) != wire:
                where = f" in the folder {folder}" if folder else ""
                raise SpecError(f"{name}: expected one tensor of this name{where}, got {other_wire} and {wire}")
    return found


def _owner(name: str, modules: Iterable[str]) -> str | None:
    """The module that a name is of: of two, one of whose names begins with the other's, the longer."""
    return max((one for one in modules if name.startswith(_prefix(one))), key=len, default=None)


def _prefix(module: str) -> str:
    return module and f"{module}."
