"""A list of a checkpoint's digests: what ``weightbus digest --save`` and ``publisher.save`` write, as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from weightbus.control.messages import Residue
from weightbus.digest import STABLE_SEED, Digest, model_digest_of
from weightbus.errors import SpecError
from weightbus.planning.box import Box
from weightbus.planning.spec import Spec
from weightbus.storage.bounded_json import decode
from weightbus.storage.disk import stored_spec
from weightbus.storage.opened import Files, OpenFile, short

FORMAT = "weightbus digest 1"

MAX_LIST_BYTES = 64 << 20
MAX_LIST_VALUES = 2 << 20  # six for each tensor

NAME = "weightbus-digests.json"
"""Of the list in a directory of safetensors files, which a load compares with what it reads."""


class SavedTensor(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    digest: str

    def __str__(self) -> str:
        return f"{self.digest}  {self.dtype}{list(self.shape)}"


class Saved(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Digests under the stable seed. version: the trainer's, where a publisher has saved it."""

    format: str
    model: str
    tensors: dict[str, SavedTensor]
    version: int | None = None


def saved_of(digests: Mapping[str, Digest], version: int | None = None) -> Saved:
    tensors = {
        name: SavedTensor(dtype=digest.dtype, shape=digest.shape, digest=str(digest))
        for name, digest in digests.items()
    }
    return Saved(format=FORMAT, model=model_digest_of(digests), tensors=tensors, version=version)


def load_saved(path: Path) -> Saved:
    """A list that ``--save`` or a publisher wrote. Raises SpecError for anything else."""
    with Files() as files:
        return saved_in(files.file(path))


def saved_in(file: OpenFile) -> Saved:
    """As ``load_saved``, of a file that is open."""
    text = file.read(MAX_LIST_BYTES)
    try:
        saved: Saved = decode(file.path, text, Saved, limit=MAX_LIST_VALUES)
    except SpecError as error:
        raise SpecError(
            f"{file.path}: expected a list that `weightbus digest --save` wrote; {error}"
        ) from error
    if saved.format != FORMAT:
        raise SpecError(f"{file.path}: expected format {FORMAT!r}, got {short(repr(saved.format))}")
    for name, tensor in saved.tensors.items():
        stored_spec(file.path, name, tensor.dtype, tensor.shape)
    return saved


class PartSums(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Sums under the stable seed of the boxes of one tensor that one rank has read or written."""

    name: str
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]
    sums: tuple[Residue, Residue]


def digests_of(rows: Iterable[PartSums], specs: Mapping[str, Spec]) -> dict[str, list[Digest]]:
    """Each tensor's digests of parts, to be combined. specs: of all tensors, by name."""
    found: dict[str, list[Digest]] = {}
    for row in rows:
        spec, boxes = specs[row.name], tuple(Box(*pair) for pair in row.boxes)
        digest = Digest(sums=row.sums, dtype=spec.dtype, shape=spec.shape, boxes=boxes, seed=STABLE_SEED)
        found.setdefault(row.name, []).append(digest)
    return found


def differences(expected: Saved, got: Saved) -> dict[str, list[str]]:
    """Names by what is wrong with them: missing, unexpected or mismatching."""
    both = expected.tensors.keys() & got.tensors.keys()
    return {
        "missing": sorted(expected.tensors.keys() - both),
        "unexpected": sorted(got.tensors.keys() - both),
        "mismatching": sorted(name for name in both if expected.tensors[name] != got.tensors[name]),
    }
