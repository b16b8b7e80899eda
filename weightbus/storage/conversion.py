"""A checkpoint's tensors under the names and shapes of the model that takes them, where these are others.

transformers 5 keeps a model's weights in other names and shapes than its files have them (experts one by one in
the files, all in one tensor in the model). What it does about that is run here on tensors without data: so each
rank reads of the files what it holds, and nothing is assembled in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from weightbus.errors import SpecError
from weightbus.planning.box import Box
from weightbus.planning.spec import Spec
from weightbus.tensors.loaders.torch_joins import Move, trace_conversion
from weightbus.tensors.loaders.trace import Untraceable
from weightbus.tensors.torch_module import walk

COMPUTED = {"inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
"""Of buffers that older versions saved, and newer ones compute: how the model's end, and the files'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """specs: by the model's names. moves: by the same names, where the elements lie in the files' tensors.
    ignored: the files' tensors that the model's class leaves out on purpose."""

    specs: dict[str, Spec]
    moves: dict[str, list[Move]]
    ignored: set[str] = field(default_factory=set)


def unchanged(specs: Mapping[str, Spec]) -> Converted:
    """Every tensor as it is."""
    moves = {}
    for name, spec in specs.items():
        whole = Box.whole(spec.shape)
        moves[name] = [Move(name, whole, whole, tuple(range(len(spec.shape))))]
    return Converted(specs=dict(specs), moves=moves)


def convert(
    specs: Mapping[str, Spec], modules: Mapping[str, nn.Module], own: Mapping[str, Sequence[int]]
) -> Converted:
    """What the models' library makes of tensors of these specs.

    modules: by the prefix of their tensors' names. own: shapes by the model's names, tied ones under all.
    Raises SpecError, naming a tensor, for a conversion that is more than moving elements.
    """
    found = unchanged(specs)
    for prefix, module in modules.items():
        given = {name.removeprefix(prefix): spec for name, spec in specs.items() if name.startswith(prefix)}
        names = {name.removeprefix(prefix): shape for name, shape in own.items() if name.startswith(prefix)}
        if all(name in names and tuple(names[name]) == spec.shape for name, spec in given.items()):
            continue
        model = next((one for _, one in walk(module) if _is_theirs(one)), None)
        if model is None:
            continue
        for name in given:
            del found.specs[prefix + name], found.moves[prefix + name]
        patterns = _ignored(model)
        for name, (spec, moves) in _convert(model, given, names).items():
            wire = prefix + name
            if name not in names and any(pattern.search(name) for pattern in patterns):
                found.ignored.update(prefix + move.wire for move in moves)
                continue
            found.specs[wire] = Spec(name=wire, dtype=spec.dtype, shape=spec.shape)
            found.moves[wire] = [Move(prefix + m.wire, m.box, m.target, m.axes) for m in moves]
    return found


def _is_theirs(module: nn.Module) -> bool:
    """Whether it is a model of transformers; which is loaded then."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(module).__mro__)


def _ignored(model: Any) -> list[re.Pattern[str]]:
    """Of names in files that have no place in the model and are no mistake, as ``from_pretrained`` has it."""
    known = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    known += [pattern for end, pattern in COMPUTED.items() if any(name.endswith(end) for name in buffers)]
    return [re.compile(pattern) for pattern in known]


def _convert(
    model: nn.Module, given: Mapping[str, Spec], own: Mapping[str, Sequence[int]]
) -> dict[str, tuple[Spec, list[Move]]]:
    """By the model's names. What has no name of the model's stays as it is, and is unknown to others too."""
    found: dict[str, tuple[Spec, list[Move]]] = {}
    for first, (transform, pairs) in _grouped(model, given, own).items():
        named = [name for _, name in pairs]

        def run(
            tensors: Mapping[str, Tensor], transform: Any = transform, pairs: Any = pairs
        ) -> dict[str, Tensor]:
            if transform is None:
                return {first: tensors[pairs[0][1]]}  # noqa: B023
            for pattern, name in pairs:
                transform.collected_tensors[pattern].append(tensors[name])
            made = transform.convert(first, model=model, config=model.config)  # noqa: B023
            return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

        try:
            made = trace_conversion(run, {name: (given[name].shape, given[name].dtype) for name in named})
        except Untraceable as reason:
            raise SpecError(
                f"{first}: expected a conversion from {', '.join(named[:2])} that only moves elements: {reason}"
            ) from reason
        for name, (shape, dtype, moves) in made.items():
            if name in found:
                raise SpecError(f"{name}: expected one tensor of the files for it, got {named[0]} and another")
            if name in own and shape != tuple(own[name]):
                raise SpecError(
                    f"{name}: expected shape {list(own[name])}, got {list(shape)} from {len(named)} tensors of "
                    f"the files, {named[0]} and on"
                )
            found[name] = Spec(name=name, dtype=dtype, shape=shape), moves
    return found


def _grouped(
    model: Any, given: Mapping[str, Spec], own: Mapping[str, Sequence[int]]
) -> dict[str, tuple[Any, list[tuple[str, str]]]]:
    """By the first name that comes of it: the transform, or None, and each tensor with its pattern.

    As transformers' own ``convert_and_load_state_dict_in_model`` groups them.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:  # transformers 4 keeps weights as its files have them
        return {name: (None, [(name, name)]) for name in given}
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    prefix, known = model.base_model_prefix, dict(own)
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for name in _ordered(given, dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in own and name in own:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        if renamed not in own:
            renamed, pattern = name, None
        if pattern is None:
            if renamed in groups:
                raise SpecError(f"{renamed}: expected one tensor of the files for it, got {name} and another")
            groups[renamed] = None, [(name, name)]
        else:
            groups.setdefault(renamed, (deepcopy(by_pattern[pattern]), []))[1].append((pattern, name))
    return groups


def _ordered(names: Iterable[str], key: Any) -> list[str]:
    return sorted(names, key=key)
