"""Which files of a directory are its checkpoint, by their names alone. Names are those of Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from weightbus.errors import SpecError

SUFFIX = ".safetensors"
INDEX_SUFFIX = f"{SUFFIX}.index.json"
STEMS = ("model", "diffusion_pytorch_model")
"""What transformers and diffusers name their files by."""

_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<variant>\.\w+)?\.safetensors")
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model-00001-of-00002.fp16.safetensors, and
# model.safetensors.index.fp16.json.
_KNOWN = re.compile(
    rf"(?P<stem>{'|'.join(STEMS)})(?:\.(?P<before>\w+))?(?:-\d{{5}}-of-\d{{5}})?(?:\.(?P<after>\w+))?"
    r"\.safetensors(?:\.index(?:\.(?P<index>\w+))?\.json)?"
)


def is_index(name: str) -> bool:
    return _INDEX.fullmatch(name) is not None


def single_of(index: str) -> str:
    """The one file that stands in for an index and its files."""
    match = _INDEX.fullmatch(index)
    assert match is not None, "an index"  # noqa: S101 - for mypy
    variant = f".{match['variant']}" if match["variant"] else ""
    return f"{match['stem']}{variant}{SUFFIX}"


def choose_files(where: Path, names: Sequence[str]) -> tuple[str, list[str]]:
    """The index of a directory ("" where it has none) and its safetensors files, without those of a variant
    (``fp16``) beside the plain ones.

    Raises SpecError for several indexes, and for several variants without plain files.
    """
    meant = [name for name in names if name.endswith(SUFFIX) or is_index(name)]
    for stem in STEMS:
        variants = {name: found for name in meant if (found := _variant(stem, name)) is not None}
        kinds = sorted(set(variants.values()))
        if "" not in kinds and len(kinds) > 1:
            raise SpecError(f"{where}: expected one variant of {stem}, got {', '.join(kinds)}; name a file")
        kept = "" if "" in kinds else kinds[0] if kinds else ""
        meant = [name for name in meant if variants.get(name, kept) == kept]
    indexes = [name for name in meant if is_index(name)]
    if len(indexes) > 1:
        raise SpecError(f"{where}: expected one index file, got {', '.join(indexes)}; name one")
    return indexes[0] if indexes else "", [name for name in meant if not is_index(name)]


def whole_set(files: Sequence[str]) -> list[str]:
    """``files`` if they are all parts of one checkpoint, ``-00001-of-00002`` and on; else none."""
    parts = [_SHARD.fullmatch(name) for name in files]
    kinds = {(part["stem"], part["count"], part["variant"]) if part else None for part in parts}
    whole = len(kinds) == 1 and parts[0] is not None and len(parts) == int(parts[0]["count"])
    return list(files) if whole else []


def _variant(stem: str, name: str) -> str | None:
    """Of a file or index of this stem; "" is the plain one; None is another stem."""
    match = _KNOWN.fullmatch(name)
    if match is None or match["stem"] != stem:
        return None
    return match["before"] or match["after"] or match["index"] or ""
