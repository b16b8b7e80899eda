"""The process group of one epoch: all trainer and server ranks, in the order of the offer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from weightbus import torch_group
from weightbus.errors import UpdateError
from weightbus.link import Link
from weightbus.loopback import Loopback
from weightbus.store import HubStore

# How long a wait for one transfer goes without looking at what the hub says.
_SLICE = timedelta(milliseconds=50)


class Group:
    """NCCL for CUDA, gloo for CPU; rendezvous through the hub. Collective: every member makes one."""

    def __init__(
        self, link: Link | Loopback, *, epoch: int, rank: int, size: int, device: torch.device, timeout_s: float
    ) -> None:
        self.epoch, self.rank, self.size, self.device = epoch, rank, size, device
        self._backend: Any = None
        if size == 1:
            return
        assert isinstance(link, Link), "a process by itself is a group of one"
        self._store = HubStore(link, epoch, timeout_s)
        try:
            if device.type == "cuda":
                self._backend = torch_group.nccl_backend(self._store, rank, size, timeout_s, device)
            else:
                self._backend = torch_group.gloo_backend(self._store, rank, size, timeout_s, link.address)
        except Exception:
            self._store.close()
            raise

    def broadcast(self, buffers: Sequence[tuple[torch.Tensor, int]]) -> list[Any]:
        """Start broadcasts together, each of a buffer (uint8, contiguous) from a group rank.

        Returns their works. On CUDA they are put into the current stream, and there are none.
        """
        return [] if self._backend is None else torch_group.broadcast(self._backend, buffers, self.device)

    def wait(self, work: Any, check: Callable[[], None]) -> None:
        """Until ``work`` is done.

        check: called while waiting; raises once the update has ended.
        Raises UpdateError if the transfer failed.
        """
        while not work.is_completed():
            with contextlib.suppress(RuntimeError):  # the slice is over, or what the wait below raises again
                work.wait(_SLICE)
            check()
        try:
            work.wait()
        except RuntimeError as error:
            raise UpdateError(f"broadcast failed: {str(error).splitlines()[0]}") from error

    def close(self, *, abort: bool = False) -> None:
        """Leave the group. ``abort``: other ranks may be gone, so wait for nobody."""
        backend, self._backend = self._backend, None
        if backend is None:
            return
        if abort or self.device.type == "cuda":
            backend.abort()
        else:
            backend.shutdown()
        del backend
        self._store.close()
