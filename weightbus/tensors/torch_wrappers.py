"""Modules that stand around a model or a layer: which child it is, and whether it is all that is used.

One table for both ends (docs/wrappers.md). Classes are known by name, so that no other library is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from weightbus.errors import SpecError

UNDO = "remove_parametrizations() or remove_weight_norm() where there is one, or have it on both ends"

_ORIGINAL = re.compile(r"(|.*\.)parametrizations\.([^.]+)\.original\d*")
_NORMED = re.compile(r"(.+)_(?:g|v|orig)")


def _child(key: str) -> Callable[[nn.Module], nn.Module | None]:
    return lambda module: module._modules.get(key)


def _adapters(layer: Any) -> str:
    """Of a PEFT layer."""
    held = {key for name in layer.adapter_layer_names for key in getattr(layer, name, ())}
    active = [name for name in layer.active_adapters if name in held]
    if layer.merged and layer.disable_adapters:
        return "the next forward takes out an adapter that is merged and disabled; unmerge_adapter() first"
    if layer.merged or layer.disable_adapters or not active:
        return ""
    return (
        f"the adapter {active[0]!r} is not merged; merge_adapter() before the update and unmerge_adapter() "
        f"after it, or update within disable_adapter() to send the weights without adapters"
    )


def _prompt(model: Any) -> str:
    """Of a PEFT model."""
    if model._modules.get("prompt_encoder") and not getattr(model, "_adapters_disabled", False):
        return "a learnt prompt is no weight of the model; use get_base_model() to send the model without it"
    return ""


def _trained(wrapper: Any) -> nn.Module | None:
    """Of PEFT's ``modules_to_save``: the copy that its forward uses, or the original."""
    copies, active = wrapper._modules["modules_to_save"], wrapper.active_adapters
    used = active and not wrapper.disable_adapters and all(name in copies for name in active)
    return copies[active[0]] if used else wrapper._modules["original_module"]  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Rule:
    """For a class of this name and those that inherit from it, in a library; ``*`` is any of it.

    inner: the module that is wrapped, which takes the wrapper's name; None if there is none. Whatever else the
    wrapper holds is beside the model. differs: why the wrapper computes with other weights than the inner
    module's, and what to do; empty if it does not. cure: what to do if there is no inner one.
    """

    library: str
    kind: str
    inner: Callable[[Any], nn.Module | None]
    differs: Callable[[Any], str] = lambda module: ""
    cure: str = "expected another version of it"


_FLAT = "its flat parameters have no boxes; use FSDP2 (fully_shard)"
_PEFT = "use the model that it was made of, or what unload() gives"

RULES = (
    Rule("torch", "OptimizedModule", _child("_orig_mod")),
    Rule("torch", "ActivationWrapper", _child("_checkpoint_wrapped_module")),
    Rule("torch", "DistributedDataParallel", _child("module")),
    Rule("torch", "DataParallel", _child("module")),
    Rule("torch", "AveragedModel", _child("module")),
    Rule("torch", "FullyShardedDataParallel", lambda module: None, cure=_FLAT),
    Rule("deepspeed", "DeepSpeedEngine", _child("module")),
    Rule("lightning", "_FabricModule", _child("_forward_module")),
    Rule("lightning_fabric", "_FabricModule", _child("_forward_module")),
    Rule("peft", "PeftModel", _child("base_model"), _prompt),
    Rule("peft", "PeftMixedModel", _child("base_model")),
    Rule("peft", "BaseTuner", _child("model"), cure=_PEFT),
    Rule("peft", "BaseTunerLayer", _child("base_layer"), _adapters, cure=_PEFT),
    Rule("peft", "ModulesToSaveWrapper", _trained),
    Rule("peft", "TrainableTokensWrapper", _child("token_adapter")),
    # What else it puts into a model computes with more than the model's weights: not guessed at.
    Rule("peft", "*", lambda module: None, cure=_PEFT),
)


@cache
def _rule(kind: Any) -> Rule | None:
    names = {(base.__module__.partition(".")[0], base.__name__) for base in kind.__mro__}
    names |= {(library, "*") for library, _ in names}
    return next((rule for rule in RULES if (rule.library, rule.kind) in names), None)


def _rule_of(module: Any) -> Rule | None:
    kind: Any = type(module)
    return _rule(kind)


def is_wrapper(module: nn.Module) -> bool:
    return _rule_of(module) is not None


def kind_of(module: nn.Module) -> str:
    """Of a wrapper, for people to read."""
    rule = _rule_of(module)
    return f"{type(module).__name__} of {rule.library}" if rule else type(module).__name__


def inside(prefix: str, module: nn.Module) -> nn.Module | None:
    """The module that this one only wraps; None if it is no wrapper.

    Raises SpecError for a wrapper that holds none.
    """
    if (rule := _rule_of(module)) is None:
        return None
    if (inner := rule.inner(module)) is None:
        raise SpecError(
            f"{prefix.rstrip('.') or 'model'}: expected a module with tensors of its own, got a "
            f"{kind_of(module)}: {rule.cure}"
        )
    return inner


def beside(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a wrapper holds beside the one that it wraps, by their own names."""
    inner = inside(prefix, module)

    def others(prefix: str, one: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for key, child in one._modules.items():
            if child is not None and child is not inner:
                yield f"{prefix}{key}.", child
                yield from others(f"{prefix}{key}.", child)

    if inner is not None:
        yield from others(prefix, module)


def differs(module: nn.Module) -> str:
    """Why this module computes with other weights than those of the one that it wraps; empty if it does not."""
    rule = _rule_of(module)
    return rule.differs(module) if rule else ""


def weight_of(name: str) -> str | None:
    """The weight that a tensor of this name may be made for: by a parametrization, weight or spectral norm, or
    pruning."""
    found = _ORIGINAL.fullmatch(name) or _NORMED.fullmatch(name)
    return "".join(found.groups()) if found else None


def check_renamed(name: str, other: str) -> None:
    """Raise SpecError if one of a tensor's two names is what a parametrization computes from, one is not."""
    if bool(_ORIGINAL.fullmatch(name)) != bool(_ORIGINAL.fullmatch(other)):
        raise SpecError(
            f"{name}: expected both ends to compute a weight from it by a parametrization, or neither, got "
            f"{other!r} for it; {UNDO}"
        )
