"""Storage that a forward reads, beyond what a walk of the module tree finds: closures, globals, C++."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightbus.errors import SpecError
from weightbus.inventory.regions import Regions
from weightbus.inventory.torch_flows import Reads
from weightbus.inventory.tree import Tree, tensors_in

Inputs = Callable[[], object] | Tensor | Sequence[Any] | Mapping[str, Any] | None
"""What a forward is called with: one tensor, positional or named arguments; or a function that runs it. Of a
target that is a mapping of modules: such inputs by the module's name."""


def reads_of(tops: Mapping[str, nn.Module], inputs: Inputs, tree: Tree) -> dict[str, str]:
    """Run one forward without gradients; what it reads that ``tree`` does not have, by operation.

    Afterwards tensors that it wrote to, the containers and attributes of the tree, and random states are as
    before. Raises SpecError with its own error.
    """
    reads = Reads(Regions(one.tensor for one in tree.found), tensors_in(inputs))
    try:
        devices = {one.tensor.device for one in tree.found if one.tensor.device.type == "cuda"}
        with _restored(tree), torch.random.fork_rng(devices), torch.no_grad(), reads:
            for run in _runs(tops, inputs):
                run()
    except Exception as error:
        raise SpecError(f"example_inputs: the forward raised {type(error).__name__}: {error}") from error
    finally:
        reads.restore()
    return reads.found


def _runs(tops: Mapping[str, nn.Module], inputs: Inputs) -> list[Callable[[], object]]:
    if callable(inputs) and not isinstance(inputs, Tensor):
        return [inputs]
    if "" in tops:
        return [lambda: _call(tops[""], inputs)]
    if not isinstance(inputs, Mapping):
        raise TypeError(f"expected inputs by the names of modules, got a {type(inputs).__name__}")
    named = [(top, inputs[name]) for prefix, top in tops.items() if (name := prefix.rstrip(".")) in inputs]
    return [partial(_call, top, own) for top, own in named]


def _call(module: nn.Module, inputs: Any) -> object:
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(inputs) if isinstance(inputs, Tensor) else module(*inputs)


@contextlib.contextmanager
def _restored(tree: Tree) -> Iterator[None]:
    """What modules, objects and containers hold is put back."""
    dicts = [(held, dict(held)) for held in (*tree.glance.dicts, *tree.glance.empty, *tree.glance.registered)]
    rows = [(held, held.copy()) for held in tree.glance.rows if isinstance(held, list | set | deque)]
    slots = [(slot, value, slot.__get__(value)) for slot, value in tree.glance.slots if _is_set(slot, value)]
    try:
        yield
    finally:
        for held, before in dicts:
            if list(held) != list(before) or any(held[key] is not before[key] for key in before):
                held.clear()
                held.update(before)
        for row, items in rows:
            row.clear()
            row.update(items) if isinstance(row, set) else row.extend(items)
        for slot, value, item in slots:
            with contextlib.suppress(AttributeError, TypeError):
                slot.__set__(value, item)


def _is_set(slot: Any, value: object) -> bool:
    try:
        slot.__get__(value)
    except AttributeError:
        return False
    return True
