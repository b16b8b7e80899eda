"""A copy of a source's parts, from which an update is sent while the trainer goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from weightbus.memory.streams import Mark
from weightbus.memory.torch_copy import Copies
from weightbus.tensors.layout import Layout

Where = Literal["device", "host"]


class Frozen:
    """Memory for a copy of one layout's parts, allocated once and filled anew for each update.

    parts: as the layout's, in that memory: where the source lies, or (``host``) pinned on the host.
    """

    def __init__(self, layout: Layout, where: Where) -> None:
        self.layout = layout
        self.parts = {
            name: tuple(replace(part, tensor=_memory(part.tensor, where)) for part in parts)
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


def _memory(tensor: torch.Tensor, where: Where) -> torch.Tensor:
    if where == "host" and tensor.is_cuda:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
