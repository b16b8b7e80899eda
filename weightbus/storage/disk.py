"""Where a checkpoint's tensors lie in safetensors files: headers only, checked before a byte of data is read.

Format: https://github.com/huggingface/safetensors#format. A file is u64le(n), n bytes of JSON, and the
data, which the tensors fill without holes or overlaps, row-major and little-endian.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec

from weightbus.errors import SpecError
from weightbus.planning.spec import ITEMSIZE, MAX_AXES, Spec
from weightbus.storage.bounded_json import decode
from weightbus.storage.checkpoint import choose_files, is_index, single_of, whole_set
from weightbus.storage.opened import Files, Folder, OpenFile, check_plain_name, short

log = logging.getLogger("weightbus")

MAX_HEADER_BYTES = 32 << 20  # of 100,000 tensors it takes 15 MB
MAX_INDEX_BYTES = 64 << 20
MAX_FILES = 4096  # all are open at the same time
MAX_TENSORS = 1 << 19  # of all files together
MAX_NAME = 1024  # characters, as in messages
MAX_BYTES = 1 << 62  # of a tensor
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
"""torch's names of safetensors' dtypes, those of less than a byte left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor in a file: its bytes are [begin, end) of the file, ``spec.nbytes`` of them."""

    spec: Spec
    path: Path
    begin: int
    end: int


def stored_modules(
    path: Path, modules: Sequence[str] | None, files: Files
) -> tuple[dict[str, Stored], dict[str, Folder]]:
    """Tensors of a directory with a sub-folder for each module, by wire name ``module.tensor``; with
    ``modules`` None, of one model, by their own names. Also the folders that were read, by the prefix of these
    names; none for a file. Raises SpecError as ``stored_tensors`` does."""
    if modules is None:
        top = None if is_index(path.name) else files.find(path)
        if isinstance(top, Folder):
            return _of_folder(top), {"": top}
        return stored_tensors(path, files), {}
    top = _folder_at(path, files)
    folders = {f"{module}.": _module_folder(top, module) for module in modules}
    found: dict[str, Stored] = {}
    for module, folder in zip(modules, folders.values(), strict=True):
        own = with_prefix(module, _of_folder(folder))
        if both := found.keys() & own.keys():
            name = min(both)
            raise SpecError(f"{path}: {name}: expected each name once, got it in {own[name].path} too")
        found.update(own)
    return found, folders


def _folder_at(path: Path, files: Files) -> Folder:
    found = files.find(path)
    if isinstance(found, OpenFile):
        raise SpecError(f"{path}: expected a directory, got a file")
    return found


def _module_folder(top: Folder, module: str) -> Folder:
    check_plain_name(module, f"{top.path}: {module}")
    if not top.has(module):
        raise SpecError(f"{module}: expected a sub-folder of {top.path} for this module, got none")
    return top.folder(module)


def with_prefix(module: str, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of one module of several, by wire name."""
    return {
        f"{module}.{name}": replace(tensor, spec=replace(tensor.spec, name=f"{module}.{name}"))
        for name, tensor in tensors.items()
    }


def byte_shape(spec: Spec) -> tuple[int, ...]:
    """The shape with the last axis in bytes. As uint8 it has the same canonical rows, so the same sums, and its
    pieces may begin at any byte of a buffer."""
    if not spec.shape:
        return (spec.nbytes,)
    return (*spec.shape[:-1], spec.shape[-1] * ITEMSIZE[spec.dtype])


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def stored_tensors(path: Path, files: Files | None = None) -> dict[str, Stored]:
    """Tensors by name, in the order of their names' UTF-8 bytes.

    path: a safetensors file, an index file (``*.safetensors.index.json``), or a directory: the files of its
        index if it has one, else all its safetensors files; of several variants the one without a suffix.
    files: where what is read stays open; without it everything is closed again.
    Raises SpecError, naming file and tensor, for a file that is not sound, a name in two files, and an index
    that does not fit its files.
    """
    if files is None:
        with Files() as files:
            return stored_tensors(path, files)
    if is_index(path.name):
        folder = _folder_at(path.parent, files)
        return _of_index(folder, path, _weight_map(folder.file(path.name)))
    found = files.find(path)
    return _of_files([found]) if isinstance(found, OpenFile) else _of_folder(found)


def _of_folder(folder: Folder) -> dict[str, Stored]:
    names = folder.names()
    index, listed = choose_files(folder.path, names)
    if not index:
        if not listed:
            raise SpecError(f"{folder.path}: expected safetensors files in the directory, got none")
        return _of_files(map(folder.file, _bounded(folder.path, listed)))
    file = folder.file(index)
    weight_map = _weight_map(file)
    instead = _instead_of(folder, file, weight_map, names, listed)
    if not instead:
        return _of_index(folder, file.path, weight_map)
    log.warning("%s: an old index, as %s; read without it", folder.path / index, instead[1])
    return _of_files(map(folder.file, instead[0]))


def _instead_of(
    folder: Folder, index: OpenFile, weight_map: Mapping[str, str], names: Sequence[str], listed: Sequence[str]
) -> tuple[Sequence[str], str] | None:
    """Files that a save without an index, or under other names, left beside an old one, and how that shows."""
    named = set(weight_map.values())
    gone = sorted(named - set(names))
    single = single_of(index.path.name)
    if single in names and single not in named:
        if gone:
            return [single], f"{gone[0]} is gone"
        if folder.file(single).look.st_mtime_ns > index.look.st_mtime_ns:
            return [single], f"{single} is newer"
    if gone and (others := whole_set(listed)):
        return others, f"{gone[0]} is gone"
    return None


def _bounded(where: Path, names: Sequence[str]) -> Sequence[str]:
    if len(names) > MAX_FILES:
        raise SpecError(f"{where}: expected at most {MAX_FILES} files, got {len(names)}")
    return names


def _of_files(files: Iterable[OpenFile]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in files:
        for tensor in _of_file(file):
            other = found.setdefault(tensor.spec.name, tensor)
            if other is not tensor:
                raise SpecError(
                    f"{file.path}: {tensor.spec.name}: expected each name once, got it in {other.path} too"
                )
        if len(found) > MAX_TENSORS:
            raise SpecError(f"{file.path}: expected at most {MAX_TENSORS} tensors in all files, got more")
    return {name: found[name] for name in sorted(found, key=str.encode)}


def _weight_map(file: OpenFile) -> dict[str, str]:
    index: _Index = decode(file.path, file.read(MAX_INDEX_BYTES), _Index)
    for name, held in index.weight_map.items():
        try:
            check_plain_name(held, "")
        except SpecError:
            raise SpecError(
                f"{file.path}: {short(name)}: expected the name of a file beside the index, got "
                f"{short(repr(held))}"
            ) from None
    return index.weight_map


def _of_index(folder: Folder, path: Path, weight_map: Mapping[str, str]) -> dict[str, Stored]:
    found = _of_files(map(folder.file, _bounded(path, sorted(set(weight_map.values())))))
    for name in sorted(found.keys() | weight_map.keys(), key=str.encode):
        listed = weight_map.get(name, "no entry")
        held = found[name].path.name if name in found else "no file"
        if listed != held:
            raise SpecError(
                f"{path}: {short(name)}: expected the index to agree with its files, got {listed} but {held}"
            )
    return found


def _of_file(file: OpenFile) -> list[Stored]:
    size = file.nbytes
    length = int.from_bytes(file.part(0, 8), "little")
    check_length(file.path, length, size)
    return _of_header(file.path, file.part(8, length), size)[0]


def check_length(where: Path, length: int, nbytes: int) -> None:
    if nbytes < 8 or length > nbytes - 8:
        # The length itself would be eight bytes of whatever file this is.
        raise SpecError(f"{where}: expected a safetensors header in {nbytes} bytes, got none of that length")
    if length > MAX_HEADER_BYTES:
        raise SpecError(f"{where}: expected a header of at most {MAX_HEADER_BYTES} bytes, got a longer one")


def header_of(where: Path, data: memoryview) -> tuple[list[Stored], dict[str, str]]:
    """Tensors of a safetensors file that lies in memory, and its metadata. ``where`` names it in errors.
    Raises SpecError for one that is not sound."""
    length = int.from_bytes(data[:8], "little")
    check_length(where, length, len(data))
    return _of_header(where, bytes(data[8 : 8 + length]), len(data))


def _of_header(path: Path, header: bytes, size: int) -> tuple[list[Stored], dict[str, str]]:
    data = 8 + len(header)
    entries: dict[str, Any] = decode(path, header, dict[str, Any])
    try:
        # null is what writers in other languages have put there.
        metadata = msgspec.convert(entries.pop("__metadata__", None), dict[str, str] | None) or {}
    except msgspec.ValidationError as error:
        raise SpecError(f"{path}: __metadata__: expected text by text, got {short(error)}") from error
    tensors = [_stored(path, name, entry, data) for name, entry in entries.items()]
    at = data
    for tensor in sorted(tensors, key=attrgetter("begin", "end")):
        if tensor.begin != at:
            raise SpecError(
                f"{path}: {tensor.spec.name}: expected data from byte {at}, where the one before ends, "
                f"got {tensor.begin}"
            )
        if tensor.end > size:
            raise SpecError(
                f"{path}: {tensor.spec.name}: expected data up to byte {tensor.end}, got a file of {size}; "
                f"truncated"
            )
        at = tensor.end
    if at != size:
        raise SpecError(f"{path}: expected {at} bytes as the header says, got a file of {size} bytes")
    return tensors, metadata


def _stored(path: Path, name: str, value: Any, data: int) -> Stored:
    try:
        entry = msgspec.convert(value, _Entry)
    except msgspec.ValidationError as error:
        raise SpecError(f"{path}: {short(name)}: bad entry in the header: {short(error)}") from error
    begin, end = entry.data_offsets
    spec = stored_spec(path, name, DTYPES.get(entry.dtype, entry.dtype), entry.shape)
    if begin < 0 or end - begin != spec.nbytes:
        raise SpecError(
            f"{path}: {name}: expected {spec.nbytes} bytes for {entry.dtype} {entry.shape}, "
            f"got data [{short(begin)}, {short(end)})"
        )
    return Stored(spec=spec, path=path, begin=data + begin, end=data + end)


def stored_spec(where: Path, name: str, dtype: str, shape: Sequence[int]) -> Spec:
    """Raises SpecError for what no tensor can be. Bounded before anything is multiplied: a product of many
    large numbers takes a time that grows with the square of their count."""
    if len(name) > MAX_NAME:
        raise SpecError(f"{where}: {short(name)}: expected a name of at most {MAX_NAME} characters")
    if dtype not in DTYPES.values():
        known = ", ".join(DTYPES)
        raise SpecError(f"{where}: {name}: expected a dtype among {known}, got {short(repr(dtype))}")
    if len(shape) > MAX_AXES:
        raise SpecError(f"{where}: {name}: expected at most {MAX_AXES} axes, got {len(shape)}")
    nbytes = ITEMSIZE[dtype]
    for size in shape:
        # Sizes beside a 0 count too: strides and boxes multiply them.
        nbytes = nbytes * max(size, 1) if 0 <= size <= MAX_BYTES else MAX_BYTES + 1
        if nbytes > MAX_BYTES:
            raise SpecError(
                f"{where}: {name}: expected sizes from 0, at most {MAX_BYTES} bytes in all, got {short(shape)}"
            )
    return Spec(name=name, dtype=dtype, shape=tuple(shape))
