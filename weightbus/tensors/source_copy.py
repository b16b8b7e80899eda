"""A copy of a source's parts, from which an update is sent while the trainer goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import torch

from weightbus.memory.streams import Mark
from weightbus.memory.torch_copy import Copies
from weightbus.tensors.bucket import torch_dtype
from weightbus.tensors.layout import Layout, Part

Where = Literal["device", "host"]
NOT_CAST: Mapping[str, str] = MappingProxyType({})


class Frozen:
    """Memory for a copy of one layout's parts, allocated once and filled anew for each update.

    dtypes: by wire name, of tensors that are cast as they are copied. parts: as the layout's, but cast, in that
    memory: where the source lies, or (``host``) pinned on the host.
    """

    def __init__(self, layout: Layout, where: Where, dtypes: Mapping[str, str] = NOT_CAST) -> None:
        self.layout, self.dtypes = layout, dtypes
        self.parts = {
            name: tuple(_copied(part, where, dtypes.get(name, part.spec.dtype)) for part in parts)
            for name, parts in layout.parts.items()
        }
        self._copies: dict[tuple[str, ...] | None, Copies] = {}

    def fill(self, modules: Sequence[str] | None) -> Mark:
        """Copy these modules' parts, in the order of the current stream; the mark is reached once they are."""
        key = None if modules is None else tuple(modules)
        if key not in self._copies:
            copies = self._copies[key] = Copies()
            for name, parts in self.layout.select(modules).parts.items():
                for mine, part in zip(self.parts[name], parts, strict=True):
                    copies.add(mine.tensor, part.tensor)
        self._copies[key].run()
        device = self.layout.device
        return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _copied(part: Part, where: Where, dtype: str) -> Part:
    pinned = where == "host" and part.tensor.is_cuda
    device = torch.device("cpu") if pinned else part.tensor.device
    memory = torch.empty(part.tensor.shape, dtype=torch_dtype(dtype), device=device, pin_memory=pinned)
    return replace(part, spec=replace(part.spec, dtype=dtype), tensor=memory)
