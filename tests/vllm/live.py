"""A worker extension of vLLM's: SHA-256 of every tensor that the live model holds, found through its tree."""

from __future__ import annotations

import hashlib
from fnmatch import fnmatchcase

import torch

from weightbus.inventory.tree import tree_of

# What the engine writes while it runs: its cache of keys and values.
RUNNING = ("*.kv_cache", "*.kv_cache[[]*")


class Live:
    def live_tensors(self) -> dict[str, str]:
        tree = tree_of({"": self.get_model()})
        found = {
            one.name: f"{one.tensor.dtype}{list(one.tensor.shape)} {_sha256(one.tensor)}"
            for one in tree.found
            if not any(fnmatchcase(one.name, pattern) for pattern in RUNNING)
        }
        return found | {name: f"unseen: {why}" for name, why in tree.unseen.items()}

    def flip_bit(self, name: str, row: int) -> None:
        """In the live parameter, on the last worker alone."""
        if self.rank == self.vllm_config.parallel_config.world_size - 1:
            parameter = dict(self.get_model().named_parameters())[name]
            parameter.data[row].view(torch.uint8)[3] ^= 4

    def break_update(self) -> None:
        """The next update fails on this worker once its bytes are in place."""
        audit = self.weight_transfer_engine._receiver.subscriber._destination.audit

        def fail(*args: object, **kwargs: object) -> None:
            del audit.derive
            raise RuntimeError("planted by a test")

        audit.derive = fail


def _sha256(tensor: torch.Tensor) -> str:
    plain = tensor.detach().contiguous().cpu().view(torch.uint8) if tensor.dim() else tensor.detach().cpu()
    return hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
