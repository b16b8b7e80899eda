"""Tensors that an engine computes from others: made again after each update, into the live storage.

What makes them is a function of the caller's, or the module's own post-load step, which runs on a copy
of the module that shares its weights. Either runs a second time as proof.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightbus.errors import SpecError, UpdateError
from weightbus.inventory.torch_flows import ReadOnly
from weightbus.inventory.tree import Found, Tree, tree_of
from weightbus.memory.shard import bits_of, plain_view
from weightbus.tensors.install import matches
from weightbus.tensors.torch_dtensor import local_tensor

STEPS = ("weightbus_refresh", "process_weights_after_loading")
"""Methods by which a module makes what it computes with out of its weights: its post-load step."""

Made = Tensor | Mapping[str, Tensor]
Function = Callable[[Any], Made]
Derived = Sequence[str] | Mapping[str, Function | None]
"""Patterns of names; or by pattern, a function that takes the module which holds the tensor and returns the new
one. Where the pattern matches several tensors of one module, it returns a mapping by their names in it."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What makes some derived tensors. what: in words, for errors. make: new tensors, by their full names."""

    what: str
    found: tuple[Found, ...]
    make: Callable[[], Mapping[str, Tensor]]

    def refresh(self) -> None:
        """Compute and copy into place. Raises UpdateError."""
        made = self._made(UpdateError)
        with torch.inference_mode():
            for one in self.found:
                one.tensor.copy_(made[one.name])

    def differ(self) -> list[Found]:
        """Those whose live bytes are not what a new computation gives. Raises UpdateError."""
        made = self._made(UpdateError)
        return [
            one
            for one in self.found
            if not torch.equal(bits_of(made[one.name].contiguous()), bits_of(one.tensor.contiguous()))
        ]

    def try_out(self) -> None:
        """Compute once and throw away. Raises SpecError."""
        self._made(SpecError)

    def _made(self, kind: type[SpecError | UpdateError]) -> dict[str, Tensor]:
        name = self.found[0].name
        try:
            with torch.no_grad(), ReadOnly(one.tensor for one in self.found):
                made = {key: plain_view(local_tensor(tensor)) for key, tensor in self.make().items()}
        except Exception as error:
            raise kind(f"{name}: {self.what} raised {type(error).__name__}: {error}") from error
        for one in self.found:
            if one.name not in made:
                raise kind(f"{one.name}: expected a tensor from {self.what}, got none")
            new, live = made[one.name], one.tensor
            if (new.shape, new.dtype, new.device) != (live.shape, live.dtype, live.device):
                raise kind(f"{one.name}: expected {_text(live)} from {self.what}, got {_text(new)}")
            if new.untyped_storage().data_ptr() == live.untyped_storage().data_ptr():
                raise kind(f"{one.name}: expected a new tensor from {self.what}, got the live one")
        return made


def recipes_of(found: Sequence[Found], tree: Tree, derived: Derived) -> tuple[list[Recipe], dict[str, str]]:
    """What makes each of these tensors, all declared as derived; and why nothing makes the others."""
    by_function: dict[tuple[int, int], list[Found]] = {}
    by_step: dict[int, list[Found]] = {}
    functions: dict[int, Function] = {}
    holders: dict[int, tuple[str, nn.Module]] = {}
    unknown = {}
    for one in found:
        function = _function(one.name, derived)
        around = tree.around.get(id(one.owner), ((one.prefix, one.owner),))
        holder = next(((prefix, module) for prefix, module in around if steps(module)), None)
        if function is not None:
            functions[id(function)] = function
            by_function.setdefault((id(function), id(one.owner)), []).append(one)
        elif holder is not None:
            holders[id(holder[1])] = holder
            by_step.setdefault(id(holder[1]), []).append(one)
        else:
            unknown[one.name] = "declared as derived, without a function that makes it again"
    recipes = [_by_function(functions[function], rows) for (function, _), rows in by_function.items()]
    recipes += [_by_step(*holders[key], rows) for key, rows in by_step.items()]
    return recipes, unknown


def steps(module: nn.Module) -> list[Callable[[], object]]:
    """The post-load step of this one module, or of its quantisation method, if it has one.

    One that takes the ``act_dtype`` of vLLM's attention layers is given the default dtype.
    """
    for name in STEPS:
        if callable(function := getattr(type(module), name, None)):
            step: Callable[..., object] = getattr(module, name)
            takes_dtype = "act_dtype" in inspect.signature(function).parameters
            return [partial(_with_dtype, step) if takes_dtype else step]
    method = module.__dict__.get("quant_method")
    if method is not None and callable(getattr(type(method), STEPS[1], None)):
        return [lambda: getattr(method, STEPS[1])(module)]
    return []


def _with_dtype(step: Callable[..., object]) -> None:
    step(torch.get_default_dtype())


def _function(name: str, derived: Derived) -> Function | None:
    if not isinstance(derived, Mapping):
        return None
    return next((function for pattern, function in derived.items() if matches(name, (pattern,))), None)


def _by_function(function: Function, rows: Sequence[Found]) -> Recipe:
    owner, prefix = rows[0].owner, rows[0].prefix

    def make() -> dict[str, Tensor]:
        made = function(owner)
        if isinstance(made, Tensor) and len(rows) == 1:
            return {rows[0].name: made}
        if not isinstance(made, Mapping):
            names = ", ".join(row.name.removeprefix(prefix) for row in rows)
            raise TypeError(f"expected a tensor, or a mapping with {names}, got a {type(made).__name__}")
        return {prefix + name: tensor for name, tensor in made.items()}

    return Recipe(
        f"the function {getattr(function, '__name__', repr(function))} of derived=", tuple(rows), make
    )


def _by_step(prefix: str, module: nn.Module, rows: Sequence[Found]) -> Recipe:
    fresh = {id(one.held) for one in rows}

    def make() -> dict[str, Tensor]:
        held = [one.held for one in tree_of({prefix: module}).found]
        memo = {id(t): t.detach().clone() if id(t) in fresh else t for t in held}
        again = copy.deepcopy(module, memo)
        with ReadOnly(local_tensor(tensor) for tensor in held):
            for step in steps(again):
                step()
        return {one.name: one.tensor for one in tree_of({prefix: again}).found}

    return Recipe(f"the post-load step of {prefix.rstrip('.') or type(module).__name__}", tuple(rows), make)


def _text(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
