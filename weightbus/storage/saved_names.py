"""Under which names a module's own library looks for its weights in files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from weightbus.storage.checkpoint import STEMS
from weightbus.tensors.torch_module import walk


def modules_of(source: object) -> dict[str, nn.Module]:
    """The modules of a model or a mapping, by name; that of a model is "". None for (name, tensor) pairs."""
    if isinstance(source, nn.Module):
        return {"": source}
    return dict(source) if isinstance(source, Mapping) else {}


def file_stem(module: nn.Module | None) -> str:
    """What its files are named by: diffusers' classes by their own name, all others as transformers does."""
    libraries = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    return STEMS[1] if "diffusers" in libraries else STEMS[0]


def tied_patterns(module: nn.Module) -> list[str]:
    """Names, as patterns to search for, that ``save_pretrained`` leaves out where they are tied to another one:
    ``_tied_weights_keys`` of the module and those in it, a list in transformers 4, a mapping in 5."""
    return [
        prefix + key
        for prefix, one in walk(module)
        for key in _strings(getattr(one, "_tied_weights_keys", None))
    ]


def _strings(found: object) -> Iterator[str]:
    yield from (key for key in found if isinstance(key, str)) if isinstance(found, Iterable) else ()


def kept_name(names: Iterable[str], patterns: Iterable[str]) -> str:
    """The one of a tied tensor's names that stays: the last one if all may be left out."""
    patterns = list(patterns)
    ordered = sorted(names, key=str.encode)
    left = [name for name in ordered if not any(re.search(pattern, name) for pattern in patterns)]
    return left[0] if left else ordered[-1]
