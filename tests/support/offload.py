"""Offloading as SGLang's diffusion server does it: layers in host memory, placeholders in the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Layerwise:
    """Keeps each child of ``model`` in a flat host buffer for each dtype, copied to ``device`` when it runs.

    Tensors of the model itself stay where they are. With ``hook`` the model tells weightbus.
    """

    def __init__(self, model: nn.Module, device: str = "cpu", *, hook: bool = True) -> None:
        self.model, self.device = model, device
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self.views: dict[str, tuple[tuple[str, torch.dtype], int, torch.Size]] = {}
        self.registered = dict(model.named_parameters()) | dict(model.named_buffers())
        self.resident: set[str] = set()
        for layer in sorted({name.split(".")[0] for name in self.registered if "." in name}):
            self._offload(layer)
        if hook:
            model.weightbus_tensors = self.tensors  # type: ignore[assignment]

    def _offload(self, layer: str) -> None:
        by_dtype: dict[torch.dtype, list[tuple[str, Tensor]]] = {}
        for name, tensor in self.registered.items():
            if name.startswith(f"{layer}."):
                by_dtype.setdefault(tensor.dtype, []).append((name, tensor))
        for dtype, held in by_dtype.items():
            total = sum(tensor.numel() for _, tensor in held)
            flat = torch.empty(total, dtype=dtype, pin_memory=self.device != "cpu")
            at = 0
            for name, tensor in held:
                flat[at : at + tensor.numel()].copy_(tensor.detach().flatten())
                self.views[name] = ((layer, dtype), at, tensor.shape)
                at += tensor.numel()
                tensor.data = torch.empty(1, dtype=dtype, device=self.device)
            self.buffers[layer, dtype] = flat

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, (buffer, at, shape) in self.views.items():
            yield name, self.buffers[buffer][at : at + shape.numel()].view(shape)

    def load(self, layer: str) -> None:
        """Copy a layer to the device, as before it runs."""
        for name, tensor in self.tensors():
            if name.startswith(f"{layer}."):
                self.registered[name].data = tensor.to(self.device, copy=True)
        self.resident.add(layer)

    def release(self, layer: str) -> None:
        for name, _ in self.tensors():
            if name.startswith(f"{layer}."):
                tensor = self.registered[name]
                tensor.data = torch.empty(1, dtype=tensor.dtype, device=self.device)
        self.resident.discard(layer)

    def refresh(self) -> None:
        """What is resident holds the old weights: once more from the host, as in ``on_commit``."""
        for layer in sorted(self.resident):
            self.load(layer)

    def reallocate(self) -> None:
        """The same values in other memory."""
        self.buffers = {key: flat.clone() for key, flat in self.buffers.items()}
