"""Where a rank's tensors lie: each one's spec, and the local view behind each of its boxes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightbus.box import Box
from weightbus.errors import SpecError
from weightbus.spec import ITEMSIZE, Spec
from weightbus.torch_dtensor import is_dtensor, local_boxes, local_tensor, mesh_position

Source = nn.Module | Mapping[str, nn.Module] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One box of a tensor, where it lies on this rank.

    tensor: plain view of the local storage, any strides, ``tensor.shape == box.sizes``; its dtype is
    ``spec.dtype``, and ``spec.shape`` is the global shape.
    """

    spec: Spec
    box: Box
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a tensor was found, so that its replacement is noticed: a module's own dict and key."""

    table: Mapping[str, Tensor | None]
    key: str


class Layout:
    """All tensors of a source on this rank: parameters and persistent buffers, tied ones once.

    tensors: by wire name. specs: with global shapes. parts: this rank's, empty where it holds nothing.
    aliases: further names of tied tensors, each to the name that is kept, the least in UTF-8 bytes.
    modules: the names of a mapping source; wire names begin with one and a dot.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        aliases: Mapping[str, str],
        modules: tuple[str, ...],
        homes: Mapping[str, _Home],
    ) -> None:
        self.tensors, self.aliases, self.modules = dict(tensors), dict(aliases), modules
        self.specs: dict[str, Spec] = {}
        self.parts: dict[str, tuple[Part, ...]] = {}
        for name, tensor in tensors.items():
            spec = self.specs[name] = _spec(name, tensor)
            self.parts[name] = tuple(
                Part(spec=spec, box=box, tensor=view) for box, view in _boxes(name, tensor)
            )
        self._homes = homes
        self._state = [_state(tensor) for tensor in tensors.values()]

    @property
    def device(self) -> torch.device:
        """Where the tensors lie. Raises SpecError if they lie on several devices."""
        devices = {part.tensor.device: name for name, parts in self.parts.items() for part in parts}
        if len(devices) > 1:
            (one, a), (two, b) = list(devices.items())[:2]
            raise SpecError(f"{b}: expected a tensor on {one} like {a}, got one on {two}")
        return next(iter(devices), torch.device("cpu"))

    def select(self, modules: Sequence[str] | None) -> Layout:
        """The tensors of some modules of a mapping source; all for None. Raises SpecError for others."""
        if modules is None:
            return self
        for module in modules:
            if module not in self.modules:
                known = list(self.modules) or "none: the model is no mapping of modules"
                raise SpecError(f"modules: expected some of {known}, got {module!r}")
        prefixes = tuple(f"{module}." for module in modules)
        tensors = {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefixes)}
        return Layout(tensors, self.aliases, tuple(modules), self._homes)

    def moved(self) -> str | None:
        """The first tensor that was replaced in its module, or whose storage, shape or strides changed
        since this layout was made; None if all is as it was. Cheap: run before every update."""
        for (name, tensor), state in zip(self.tensors.items(), self._state, strict=True):
            home = self._homes.get(name)
            if (home is not None and home.table.get(home.key) is not tensor) or _state(tensor) != state:
                return name
        return None

    def overlapping(self) -> list[tuple[str, str]]:
        """Pairs of names whose storage overlaps on this rank; writing one would change the other."""
        spans = sorted(
            (*_span(part.tensor), name) for name, parts in self.parts.items() for part in parts if part.box.volume
        )
        last: dict[str, tuple[int, str]] = {}
        found = []
        for device, low, high, name in spans:
            end, owner = last.get(device, (0, ""))
            if low < end and owner != name:
                found.append((owner, name))
            if high > end:
                last[device] = (high, name)
        return found


def _state(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    local = tensor._local_tensor if is_dtensor(tensor) else tensor
    return local.data_ptr(), local.shape, local.stride()


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """Device, and first and last byte plus one that the tensor's elements may lie in."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


def _spec(name: str, tensor: Tensor) -> Spec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    local = local_tensor(tensor) if is_dtensor(tensor) else tensor  # type: ignore[arg-type]
    if dtype not in ITEMSIZE:
        raise SpecError(f"{name}: expected a dtype of {sorted(ITEMSIZE)}, got {dtype}")
    if local.layout != torch.strided:
        raise SpecError(f"{name}: expected a dense tensor, got {local.layout}")
    if local.is_meta:
        raise SpecError(f"{name}: expected a tensor with storage, got one on the meta device")
    return Spec(name=name, dtype=dtype, shape=tuple(tensor.shape))


def _boxes(name: str, tensor: Tensor) -> list[tuple[Box, Tensor]]:
    if is_dtensor(tensor):
        return local_boxes(name, tensor)  # type: ignore[arg-type]
    return [(Box.whole(tensor.shape), tensor.detach())]


def layout_of(source: Source) -> Layout:
    """The layout of a model, of a mapping of names to models, or of an iterable of (name, tensor).

    Raises SpecError, naming the tensor: a name given twice, a dtype, layout or placement that can't travel.
    """
    modules: tuple[str, ...] = ()
    if isinstance(source, nn.Module):
        found = list(_walk(source, ""))
    elif isinstance(source, Mapping):
        modules = tuple(source)
        found = []
        for name, module in source.items():
            if not isinstance(module, nn.Module):
                raise SpecError(f"modules: expected a module as {name!r}, got {type(module).__name__}")
            found += _walk(module, f"{name}.")
    else:
        found = [(name, tensor, None) for name, tensor in source]
    tensors: dict[str, Tensor] = {}
    homes: dict[str, _Home] = {}
    kept: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor, home in sorted(found, key=lambda item: item[0].encode()):
        if name in tensors or name in aliases:
            raise SpecError(f"{name}: expected each name once, got it twice")
        if not isinstance(tensor, Tensor):
            raise SpecError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if id(tensor) in kept:
            aliases[name] = kept[id(tensor)]
            continue
        kept[id(tensor)] = name
        tensors[name] = tensor
        if home is not None:
            homes[name] = home
    return Layout(tensors, aliases, modules, homes)


def _walk(root: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor, _Home | None]]:
    for path, module in root.named_modules(prefix=prefix.removesuffix("."), remove_duplicate=False):
        start = f"{path}." if path else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield start + key, parameter, _Home(module._parameters, key)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield start + key, buffer, _Home(module._buffers, key)


def rank_and_size(layout: Layout, rank: int | None, size: int | None) -> tuple[int, int]:
    """A rank's place in its job: as given, else from the DTensors' mesh, else torchrun's variables, else
    0 of 1. Raises SpecError if only one is given or the rank is not below the size."""
    if (rank is None) != (size is None):
        raise SpecError(f"rank and size: expected both or neither, got {rank} and {size}")
    if rank is None or size is None:
        rank, size = mesh_position(layout.tensors.values()) or (
            int(os.environ.get("RANK", "0")),
            int(os.environ.get("WORLD_SIZE", "1")),
        )
    if not 0 <= rank < size:
        raise SpecError(f"rank: expected one of 0 to {size - 1}, got {rank}")
    return rank, size
