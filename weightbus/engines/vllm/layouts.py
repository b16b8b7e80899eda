"""Weights that vLLM would repack for the CPU are kept as they were loaded, where this backend is asked for.

Linear layers and heads: vLLM's own way for layers that its packed kernels don't take, torch's linear over the
weight itself. Experts: the packed copy that vLLM's kernel computes with lies beside the weights as loaded, and
is made of these again, by vLLM's own step, after each update. On GPUs nothing is done here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from weightbus.errors import SpecError

PACKED = {"w13_weight": "weightbus_packed_w13", "w2_weight": "weightbus_packed_w2"}
"""The packed copy of experts, by the weight that it is made of; attributes of the layer."""

REPACK = "weightbus_repack"
"""What makes them; an attribute of the layer, too."""

KEPT = "weightbus_kept"
"""Attribute of a linear layer that was not packed."""

Step = Callable[[Any, nn.Module], None]


def keep_linear(dispatch: Callable[..., None], asked: Callable[[], bool]) -> Callable[..., None]:
    """vLLM's ``dispatch_cpu_unquantized_gemm``, that leaves matrices alone where ``asked``."""

    def keeping(layer: nn.Module, remove_weight: bool) -> None:
        if not asked() or layer.weight.is_meta or layer.weight.ndim != 2:
            dispatch(layer, remove_weight)
            return
        for name, value in (("cpu_linear", nn.functional.linear), (KEPT, True)):
            setattr(layer, name, value)

    return keeping


def keep_experts(step: Step, asked: Callable[[], bool]) -> Step:
    """``process_weights_after_loading`` of vLLM's experts for the CPU, that packs a copy where ``asked``."""

    def packing(experts: Any, layer: nn.Module) -> None:
        if not asked():
            step(experts, layer)
            return
        repack = _Repack(step, experts)
        for name, value in {REPACK: repack, **repack(layer)}.items():
            setattr(layer, name, value)
        experts.weightbus_layer = layer

    return packing


def use_packed(apply: Callable[..., None]) -> Callable[..., None]:
    """``apply`` of the same, with the packed copy in place of the weights that vLLM gives it."""

    def applying(
        experts: Any, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        layer = getattr(experts, "weightbus_layer", None)
        if layer is not None:
            w1, w2 = (getattr(layer, name, w) for name, w in zip(PACKED.values(), (w1, w2), strict=True))
        apply(experts, output, hidden_states, w1, w2, *args, **kwargs)

    return applying


class _Repack:
    """vLLM's own step on a stand-in for the layer, which shares the weights and takes the packed ones."""

    def __init__(self, step: Step, experts: Any) -> None:
        self._step, self._experts = step, experts

    def __call__(self, layer: nn.Module) -> dict[str, Tensor]:
        """New packed tensors, by the attributes that hold them; none where vLLM's step packs nothing."""
        held = {name: tensor for name, tensor in layer._parameters.items() if tensor is not None}
        shared = {name: nn.Parameter(tensor.data, requires_grad=False) for name, tensor in held.items()}
        own: dict[str, nn.Parameter] = dict(shared)
        stand_in = object.__new__(type(layer))
        stand_in.__dict__ = {**layer.__dict__, "_parameters": own}
        self._step(self._experts, stand_in)
        made = {}
        for name, tensor in held.items():
            now = own[name]
            if now.data_ptr() == tensor.data_ptr() and now.shape == tensor.shape:
                continue
            if name not in PACKED:
                raise SpecError(f"{name}: expected experts of which only {', '.join(PACKED)} are packed")
            made[PACKED[name]] = now.data
        return made


def derived(module: nn.Module) -> dict[str, Callable[[Any], dict[str, Tensor]]]:
    """By attribute, what makes a module's packed copies again."""
    repack = module.__dict__.get(REPACK)
    return {name: repack for name in PACKED.values() if repack is not None and name in module.__dict__}


def is_packed(module: nn.Module) -> bool:
    """Whether it computes with a packed copy beside its weights."""
    return bool(derived(module))


def is_settled(module: nn.Module) -> bool:
    """Whether its experts went through ``keep_experts``."""
    return REPACK in module.__dict__


def is_kept(module: nn.Module) -> bool:
    """Whether it went through ``keep_linear``."""
    return KEPT in module.__dict__
