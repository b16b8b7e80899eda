"""Whether an engine's model may be updated in place, and which of its tensors no update feeds.

A vLLM model is updated in the layout of its checkpoint. Where vLLM computes with something else, the update
would be proved and the answers wrong, so what is not known to be plain is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weightbus.engines.vllm import layouts
from weightbus.errors import SpecError
from weightbus.inventory.derived import Function

PLAIN_METHODS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod"}
"""Quantisation methods, by class, that compute with weights as they were loaded."""

PLAIN_EXPERTS = {"TRITON", "BATCHED_TRITON", "CPU"}
"""Backends of unquantised experts with weights as they were loaded; on the CPU by ``layouts``."""

SCALES = ("_q_scale", "_k_scale", "_v_scale", "_prob_scale", "_k_scale_cpu", "_v_scale_cpu")
"""Scales of attention that the engine sets for its cache; checkpoints without quantisation have none."""

CACHE = "kv_cache"
"""The attribute that holds a layer's part of the cache: a tensor, or several in a list."""

MLA_VIEWS = ("W_UV", "W_UK_T")
"""What multi-head latent attention makes of ``kv_b_proj``: views of it where this is not quantised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """What a Subscriber is told of an engine's model.

    local: names that no update feeds. derived: what makes those that the engine computes from others.
    notes: what was done to keep the model updatable, to say at start.
    """

    local: tuple[str, ...]
    derived: Mapping[str, Function | None]
    notes: tuple[str, ...] = field(default=())


def admit(model: nn.Module, vllm_config: Any) -> Admitted:
    """What is local and derived in this worker's model. Raises SpecError for one that can't be kept right."""
    for what, why in _refused(vllm_config):
        raise SpecError(f"{what}: {why}")
    local: list[str] = []
    derived: dict[str, Function | None] = {}
    packed = plain = 0
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for why in _unplain(module):
            raise SpecError(f"{name or type(module).__name__}: {why}")
        for key, parameter in module.named_parameters(recurse=False):
            if not parameter.numel():
                raise SpecError(
                    f"{prefix}{key}: expected the weight that was loaded, got shape {list(parameter.shape)}: "
                    f"a step after loading has packed it elsewhere"
                )
        local += [f"{prefix}{key}" for key in SCALES if isinstance(getattr(module, key, None), Tensor)]
        local += [f"{prefix}{key}" for key in _views(name, module)]
        if hasattr(module, CACHE):
            local += [f"{prefix}{CACHE}", f"{prefix}{CACHE}[[]*"]
        for key, function in layouts.derived(module).items():
            derived[f"{prefix}{key}"] = function
        packed += layouts.is_packed(module)
        plain += layouts.is_kept(module)
    notes = [f"{plain} linear layers keep their weights as loaded, unpacked"] if plain else []
    notes += [f"{packed} layers of experts keep a copy as loaded beside the packed one"] if packed else []
    return Admitted(local=tuple(local), derived=derived, notes=tuple(notes))


def checkpoint_of(model_config: Any, load_config: Any) -> Path | None:
    """The directory of safetensors files that this engine has loaded; None if there is none to be found."""
    if str(getattr(load_config, "load_format", "auto")) not in ("auto", "hf", "safetensors", "LoadFormat.auto"):
        return None
    path = Path(model_config.model)
    if not path.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model_config.model, "config.json", revision=model_config.revision)
        if not isinstance(found, str | os.PathLike):
            return None
        path = Path(found).parent
    return path if any(path.glob("*.safetensors")) else None


def _refused(vllm_config: Any) -> Iterator[tuple[str, str]]:
    parallel = vllm_config.parallel_config
    if vllm_config.quant_config is not None:
        name = type(vllm_config.quant_config).__name__
        yield "quantization", f"expected none, got {name}; serve the model unquantised"
    if vllm_config.lora_config is not None:
        yield "enable_lora", "expected False: adapters rename and wrap the weights; merge them on the trainer"
    if getattr(parallel, "enable_eplb", False):
        yield "enable_eplb", "expected False: load balancing moves experts between ranks while they are updated"


def _unplain(module: nn.Module) -> Iterator[str]:
    method = getattr(module, "quant_method", None)
    if method is None:
        return
    kind = type(method).__name__
    if kind not in PLAIN_METHODS:
        yield f"expected a method that computes with the weights as loaded, got {kind}"
    backend = getattr(method, "unquantized_backend", None)
    if backend is not None and backend.name not in PLAIN_EXPERTS:
        yield (
            f"expected experts in the layout of the checkpoint, got the backend {backend.name}, which repacks "
            f"them; start vLLM with moe_backend='triton'"
        )
    if backend is not None and backend.name == "CPU" and not layouts.is_settled(module):
        yield "expected experts that were kept as loaded, got packed ones; is weightbus in VLLM_PLUGINS?"


def _views(name: str, module: nn.Module) -> Iterator[str]:
    """MLA's views of ``kv_b_proj``, which is fed under its own name."""
    base = getattr(module, "kv_b_proj", None)
    for key in MLA_VIEWS:
        view = getattr(module, key, None)
        if not isinstance(view, Tensor):
            continue
        if base is None or not _share(view, base.weight):
            raise SpecError(
                f"{name}.{key}: expected a view of kv_b_proj, as in a model that is not quantised, got a copy, "
                f"which updates would leave behind"
            )
        yield key


def _share(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
