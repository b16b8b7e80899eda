"""Where a checkpoint's tensors lie in safetensors files: headers only, checked before a byte of data is read.

Format: https://github.com/huggingface/safetensors#format. A file is u64le(n), n bytes of JSON, and the
data, which the tensors fill without holes or overlaps, row-major and little-endian.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec

from weightbus.errors import SpecError
from weightbus.spec import ITEMSIZE, Spec

MAX_HEADER_BYTES = 100_000_000  # as safetensors' own reader
INDEX_SUFFIX = ".safetensors.index.json"
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


def stored_modules(path: Path, modules: Sequence[str] | None) -> dict[str, Stored]:
    """Tensors of a directory with a sub-folder for each module, by wire name ``module.tensor``; with
    ``modules`` None, of one model, by their own names. Raises SpecError as ``stored_tensors`` does."""
    if modules is None:
        return stored_tensors(path)
    found = {}
    for module in modules:
        if not (path / module).is_dir():
            raise SpecError(f"{module}: expected a sub-folder of {path} for this module, got none")
        found.update(with_prefix(module, stored_tensors(path / module)))
    return found


def check_inside(path: Path, roots: Sequence[str]) -> None:
    """Raise SpecError unless ``path``, its symbolic links followed, lies in one of the directories ``roots``;
    with none of them, it may lie anywhere."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise SpecError(
            f"{path}: expected a readable file, got {getattr(error, 'strerror', None) or error}"
        ) from error
    if roots and not any(real.is_relative_to(Path(root).resolve()) for root in roots):
        raise SpecError(f"{path}: expected a path in {' or '.join(roots)}, got {real}")


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


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Tensors by name, in the order of their names' UTF-8 bytes.

    path: a safetensors file, an index file (``*.safetensors.index.json``), or a directory: the files of its
        index if it has one, else all its safetensors files.
    Raises SpecError, naming file and tensor, for a file that is not sound, a name in two files, and an index
    that does not fit its files.
    """
    if path.is_dir():
        indexes = sorted(path.glob(f"*{INDEX_SUFFIX}"))
        if len(indexes) > 1:
            raise SpecError(
                f"{path}: expected one index file, got {', '.join(p.name for p in indexes)}; name one"
            )
        files = sorted(path.glob("*.safetensors"))
        if not indexes and not files:
            raise SpecError(f"{path}: expected safetensors files in the directory, got none")
        return _of_index(indexes[0]) if indexes else _of_files(files)
    return _of_index(path) if path.name.endswith(INDEX_SUFFIX) else _of_files([path])


def _of_files(paths: Iterable[Path]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for path in paths:
        for tensor in _of_file(path):
            other = found.setdefault(tensor.spec.name, tensor)
            if other is not tensor:
                raise SpecError(
                    f"{path}: {tensor.spec.name}: expected each name once, got it in {other.path} too"
                )
    return {name: found[name] for name in sorted(found, key=str.encode)}


def _of_index(path: Path) -> dict[str, Stored]:
    index = _decode(path, _bytes_of(path), _Index)
    for name, file in index.weight_map.items():
        if file != os.path.basename(file) or file in ("", ".", ".."):
            raise SpecError(f"{path}: {name}: expected the name of a file beside the index, got {file!r}")
    found = _of_files(path.parent / file for file in sorted(set(index.weight_map.values())))
    for name in sorted(found.keys() | index.weight_map.keys(), key=str.encode):
        listed = index.weight_map.get(name, "no entry")
        held = found[name].path.name if name in found else "no file"
        if listed != held:
            raise SpecError(
                f"{path}: {name}: expected the index to agree with its files, got {listed} but {held}"
            )
    return found


def _of_file(path: Path) -> list[Stored]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise SpecError(f"{path}: expected a safetensors header in {size} bytes, got length {length}")
            header = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    return _of_header(path, header, size)[0]


def header_of(where: Path, data: memoryview) -> tuple[list[Stored], dict[str, str]]:
    """Tensors of a safetensors file that lies in memory, and its metadata. ``where`` names it in errors.
    Raises SpecError for one that is not sound."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER_BYTES):
        raise SpecError(f"{where}: expected a safetensors header in {len(data)} bytes, got length {length}")
    return _of_header(where, bytes(data[8 : 8 + length]), len(data))


def _of_header(path: Path, header: bytes, size: int) -> tuple[list[Stored], dict[str, str]]:
    data = 8 + len(header)
    entries: dict[str, Any] = _decode(path, header, dict[str, Any])
    try:
        metadata = msgspec.convert(entries.pop("__metadata__", {}), dict[str, str])
    except msgspec.ValidationError as error:
        raise SpecError(f"{path}: __metadata__: expected text by text, got {error}") from error
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
        raise SpecError(f"{path}: {name}: bad entry in the header: {error}") from error
    if entry.dtype not in DTYPES:
        raise SpecError(f"{path}: {name}: expected a dtype among {', '.join(DTYPES)}, got {entry.dtype!r}")
    begin, end = entry.data_offsets
    spec = Spec(name=name, dtype=DTYPES[entry.dtype], shape=tuple(entry.shape))
    if min(entry.shape, default=0) < 0 or begin < 0 or end - begin != spec.nbytes:
        raise SpecError(
            f"{path}: {name}: expected {spec.nbytes} bytes for {entry.dtype} {entry.shape}, "
            f"got data [{begin}, {end})"
        )
    return Stored(spec=spec, path=path, begin=data + begin, end=data + end)


def _decode(path: Path, text: bytes, kind: Any) -> Any:
    """JSON text without repeated keys, which parsers silently drop, and with UTF-8 names only."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise SpecError(f"{path}: {twice}: expected each name once, got it twice in one JSON object")
        "".join(found).encode()  # JSON can spell half a surrogate pair
        return found

    try:
        return msgspec.convert(json.loads(text, object_pairs_hook=once), kind)
    except SpecError:
        raise
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise SpecError(f"{path}: expected a JSON object, got {error}") from error


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> SpecError:
    return SpecError(f"{path}: expected a readable file, got {error.strerror or error}")
