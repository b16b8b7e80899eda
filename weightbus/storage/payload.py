"""Tensors that arrive in a message: safetensors bytes, plain or as one flattened bucket; or where they lie, for
which see ``shared_payload``. Nothing is unpickled.

A flattened bucket is a safetensors file with one tensor, ``flattened_tensor``, whose bytes are those of many;
its metadata has ``flattened_metadata``, a JSON list of ``{"name", "dtype", "shape", "start_idx", "end_idx"}``
with offsets in elements of the flat tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from weightbus.control import messages as m
from weightbus.errors import SpecError
from weightbus.planning.spec import ITEMSIZE
from weightbus.storage.bounded_json import check_values
from weightbus.storage.disk import DTYPES, Stored, header_of, stored_spec, with_prefix
from weightbus.storage.opened import short

FLAT_NAME = "flattened_tensor"
FLAT_METADATA = "flattened_metadata"

# Of the modules that an engine may have, the one that a payload without a name is for.
USUAL_MODULE = "transformer"

Memory = TypeVar("Memory")


class _FlatEntry(msgspec.Struct, forbid_unknown_fields=True):
    """dtype: torch's name, with or without ``torch.``, or safetensors'. numel: as senders may add it."""

    name: str
    dtype: str
    shape: list[int]
    start_idx: int
    end_idx: int
    numel: int | None = None


def refuse_pickle(where: str, data: bytes | memoryview) -> None:
    """Raise SpecError, with the cure, for what torch.save or pickle wrote."""
    head = bytes(data[:4])
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or head == b"PK\x03\x04":
        raise SpecError(
            f"{where}: expected safetensors bytes, got a pickle, which is never loaded here; "
            f"send safetensors.torch.save({{name: tensor}}) instead"
        )


def tensors_of_payload(where: Path, data: memoryview, format: m.PayloadFormat) -> dict[str, Stored]:
    """Tensors by name, as they lie in ``data``. Raises SpecError for bytes that are not sound."""
    refuse_pickle(str(where), data)
    tensors, metadata = header_of(where, data)
    found = {tensor.spec.name: tensor for tensor in tensors}
    return found if format == "safetensors" else _flattened(where, found, metadata)


def _flattened(where: Path, found: Mapping[str, Stored], metadata: Mapping[str, str]) -> dict[str, Stored]:
    if set(found) != {FLAT_NAME} or FLAT_METADATA not in metadata:
        got = ", ".join(sorted(found)[:4]) or "none"
        raise SpecError(
            f"{where}: expected one tensor {FLAT_NAME} and {FLAT_METADATA} in the metadata, got tensors {got}"
        )
    flat = found[FLAT_NAME]
    try:
        text = metadata[FLAT_METADATA].encode()
        check_values(f"{where}: {FLAT_METADATA}", text)
        entries = msgspec.json.decode(text, type=list[_FlatEntry])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise SpecError(f"{where}: {FLAT_METADATA}: {short(error)}") from error
    if len(flat.spec.shape) != 1:
        raise SpecError(f"{where}: {FLAT_NAME}: expected one axis, got shape {list(flat.spec.shape)}")
    unit = ITEMSIZE[flat.spec.dtype]
    tensors: dict[str, Stored] = {}
    at = 0
    for entry in sorted(entries, key=lambda entry: (entry.start_idx, entry.end_idx)):
        dtype = DTYPES.get(entry.dtype, entry.dtype.removeprefix("torch."))
        spec = stored_spec(where, entry.name, dtype, entry.shape)
        if entry.name in tensors:
            raise SpecError(f"{where}: {entry.name}: expected each name once, got it twice in {FLAT_METADATA}")
        begin, end = entry.start_idx * unit, entry.end_idx * unit
        if end - begin != spec.nbytes:
            raise SpecError(
                f"{where}: {entry.name}: expected {spec.nbytes} bytes for {dtype} {entry.shape}, got elements "
                f"[{entry.start_idx}, {entry.end_idx}) of {unit} bytes"
            )
        if begin != at:
            raise SpecError(
                f"{where}: {entry.name}: expected data from byte {at} of {FLAT_NAME}, where the one before "
                f"ends, got {begin}"
            )
        at = end
        tensors[entry.name] = Stored(spec=spec, path=where, begin=flat.begin + begin, end=flat.begin + end)
    if at != flat.end - flat.begin:
        raise SpecError(f"{where}: expected entries for {flat.end - flat.begin} bytes of {FLAT_NAME}, got {at}")
    return tensors


def module_of(named: str | None, targets: Sequence[str] | None, modules: Sequence[str]) -> str | None:
    """The module that a payload is for: the one that it names, or the only one that is meant.

    targets: what the request names; None is all. modules: the engine's; () where it has none by name.
    Raises SpecError where that is unknown or could be several.
    """
    known = ", ".join(modules) or "none, as the model is not a mapping of modules"
    if named is not None:
        if named not in modules:
            raise SpecError(f"{named}: expected a module among {known}; got {named!r}")
        if targets is not None and named not in targets:
            raise SpecError(
                f"{named}: expected a payload for the target modules {list(targets)}, got one for it"
            )
        return named
    if not modules and targets is None:
        return None
    if targets is not None:
        for target in targets:
            if target not in modules:
                raise SpecError(f"{target}: expected a module among {known}; got {target!r}")
    meant = list(modules if targets is None else targets)
    if targets is None and USUAL_MODULE in meant:
        return USUAL_MODULE
    if len(meant) != 1:
        raise SpecError(
            f"payload: expected {{module: payload}} where it could be for several of {meant}, got one without "
            f"a name"
        )
    return meant[0]


def stored_payloads(
    frames: Sequence[m.Frame],
    payloads: Sequence[bytes],
    task: m.LoadTask,
    modules: Sequence[str],
    open_one: Callable[[Path, bytes], tuple[dict[str, Stored], Mapping[Path, Memory]]],
) -> tuple[dict[str, Stored], dict[Path, Memory], list[str] | None]:
    """All tensors of a rank's payloads by wire name, the memory that they lie in, and their modules.

    open_one: gives a payload's tensors by name, and the memory behind their paths.
    Raises SpecError as ``open_one`` and ``module_of`` do, and for a module that two payloads are for.
    """
    found: dict[str, Stored] = {}
    memory: dict[Path, Memory] = {}
    seen: list[str | None] = []
    for frame, payload in zip(frames, payloads, strict=True):
        module = module_of(frame.module, task.modules, modules)
        if module in seen:
            raise SpecError(f"{module or 'payload'}: expected one payload for each module, got two")
        seen.append(module)
        where = Path("payload" if module is None else f"payload of {module}")
        tensors, opened = open_one(where, payload)
        memory |= opened
        found.update(tensors if module is None else with_prefix(module, tensors))
    return found, memory, None if seen == [None] else [module for module in seen if module is not None]
