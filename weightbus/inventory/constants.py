"""Which tensors of a module are constants: what its constructor makes again, bit for bit, and without weights.

The module that holds a tensor, or one around it, is made a second time, under a dispatch mode that records
which storage flows into which, and whose values go to Python.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MethodType
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from weightbus.inventory.derived import steps
from weightbus.inventory.torch_flows import recorded
from weightbus.inventory.tree import Found, Tree, plain, tree_of
from weightbus.memory.shard import bits_of
from weightbus.tensors.torch_module import tensors_of, walk

MAX_ENCLOSING = 2
"""How many modules around a tensor's own are tried, where that one can't be made alone; more if they are made
of a ``config`` alone."""

MAX_FAILURES = 4
"""A class of which so many instances could not be made is not tried again."""

BUDGET_S = 30.0
"""Time for all constructors of one layout."""


class Constants:
    """Finds constants of one tree; keeps count of what could not be made, and of time."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        weights = [one for one in tree.found if isinstance(one.held, nn.Parameter)]
        self._sizes = {(id(one.owner), one.tensor.numel()) for one in weights}
        self._failures: dict[type, int] = {}
        self._tried: set[int] = set()
        self._reasons: dict[int, str] = {}
        self._until = time.monotonic() + BUDGET_S

    def among(self, found: Sequence[Found]) -> tuple[list[Found], dict[str, str]]:
        """The constants, and why each of the others is not known to be one."""
        unknown: dict[str, str] = {}
        left: dict[str, Found] = {}
        for one in found:
            if placeholder(one.tensor) and (id(one.owner), one.tensor.numel()) in self._sizes:
                unknown[one.name] = "zeros or ones, a place for as many elements as a weight beside it has"
            else:
                left[one.name] = one
        for one in found:
            if one.name in left and id(one.owner) not in self._reasons:
                self._reasons[id(one.owner)] = self._try(one.owner, left)
        unknown |= {
            name: f"not fed by updates, nor known to be a constant: {self._reasons[id(one.owner)]}"
            for name, one in left.items()
        }
        return [one for one in found if one.name not in unknown], unknown

    def _try(self, owner: nn.Module, left: dict[str, Found]) -> str:
        """Take constants of this module out of ``left``, and of others made with it. Why others are not."""
        chain = self._tree.around.get(id(owner), (("", owner),))
        first = max((i for i, (_, module) in enumerate(chain) if steps(module)), default=0)
        why = f"{type(owner).__name__} does not keep its constructor's arguments, nor does a module around it"
        for index, (prefix, module) in list(enumerate(chain))[first:]:
            kind = _class_of(module)
            if id(module) in self._tried or (index > MAX_ENCLOSING and not _of_a_config(kind)):
                continue
            self._tried.add(id(module))
            if self._failures.get(kind, 0) >= MAX_FAILURES or time.monotonic() > self._until:
                why = f"other instances of {kind.__name__} could not be made again"
                continue
            before = len(left)
            for arguments in _bindings(kind, [module for _, module in chain[index:]]):
                for device, dtype in _settings(left.values()):
                    try:
                        self._compare(kind, arguments, device, dtype, prefix, left)
                        why = f"made again, {kind.__name__} gives other bytes, or makes it from weights"
                    except Exception as error:
                        why = f"{kind.__name__} can't be made again ({type(error).__name__}: {error})"
                    if not any(one.owner is owner for one in left.values()):
                        return ""
            if len(left) == before:
                self._failures[kind] = self._failures.get(kind, 0) + 1
        return why

    def _compare(
        self,
        kind: type[nn.Module],
        arguments: Mapping[str, object],
        device: torch.device,
        dtype: torch.dtype,
        prefix: str,
        left: dict[str, Found],
    ) -> None:
        with _apart(device, dtype), recorded() as flows:
            copied = {name: copy.deepcopy(value) for name, value in arguments.items()}
            again = kind(**copied)
            for _, module in reversed(list(walk(again))):
                for step in steps(module):
                    step()
        made = {one.name: one for one in tree_of({"": again}).found}
        fed = [t for p, m in walk(again) for _, t in tensors_of(p, m, persistent_only=True)]
        for name, live in list(left.items()):
            one = made.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
            if one is not None and _equal(one.tensor, live.tensor) and flows.free(one.tensor, fed):
                del left[name]


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The class that was written: not the one that ``fully_shard`` has made of it."""
    kinds = (kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
    return cast(type[nn.Module], next(kinds))


def _of_a_config(kind: type[nn.Module]) -> bool:
    """Whether a class is made of a configuration alone, as Hugging Face models are."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic] == ["config"]


def _bindings(kind: type[nn.Module], modules: Sequence[nn.Module]) -> Iterator[dict[str, object]]:
    """Arguments for a constructor: what the module, else those around it, hold under the same names."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    tried: list[dict[str, object]] = []
    for skip in range(len(modules)):
        places = [modules[0], *modules[1 + skip :]]
        bound: dict[str, object] = {}
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            values = (module.__dict__[parameter.name] for module in places if parameter.name in module.__dict__)
            value = next((v for v in values if not isinstance(v, MethodType) and plain(v)), parameter.empty)
            if value is not parameter.empty:
                bound[parameter.name] = value
            elif parameter.default is parameter.empty:
                break
        else:
            if not any(_same(bound, other) for other in tried):
                tried.append(bound)
                yield bound


def _same(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    return one.keys() == other.keys() and all(one[key] is other[key] for key in one)


def _settings(left: Iterable[Found]) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Devices and default dtypes under which the live tensors may have been made."""
    tensors = [one.tensor for one in left]
    devices = dict.fromkeys([*(tensor.device for tensor in tensors), torch.device("cpu")])
    floats = [t.dtype for t in tensors if t.dtype.is_floating_point and t.dtype.itemsize > 1]
    for device in devices:
        for dtype in dict.fromkeys([torch.get_default_dtype(), torch.float32, *floats]):
            yield device, dtype


@contextlib.contextmanager
def _apart(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Constructors leave no trace here in random states, defaults and warnings."""
    before, state = torch.get_default_dtype(), random.getstate()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                yield
        finally:
            torch.set_default_dtype(before)
            random.setstate(state)


def placeholder(tensor: Tensor) -> bool:
    """Zeros or ones throughout: what code may have made to be filled later, such as caches."""
    if tensor.numel() < 2 or not tensor.is_floating_point() or tensor.itemsize < 2:
        return False
    return bool((tensor == 0).all()) or bool((tensor == 1).all())


def _equal(again: Tensor, live: Tensor) -> bool:
    """Whether the bits are the same, once in the live one's dtype."""
    if again.shape != live.shape or again.device.type == "meta":
        return False
    if again.dtype != live.dtype and not (again.is_floating_point() and live.is_floating_point()):
        return False
    cast = again.detach().to(device=live.device, dtype=live.dtype)
    return torch.equal(bits_of(cast.contiguous()), bits_of(live.contiguous()))
