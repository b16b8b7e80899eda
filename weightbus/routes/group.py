"""The process group of one epoch: all trainer and server ranks, in the order of the offer."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from datetime import timedelta
from typing import Any

import torch

from weightbus.control.link import Link
from weightbus.control.store import HubStore
from weightbus.errors import UpdateError, WeightbusError
from weightbus.hub.in_process import Loopback
from weightbus.routes import torch_group
from weightbus.routes.reach import unreached

# How long a wait goes without looking at what the hub says.
_SLICE = timedelta(milliseconds=50)
_LOOK_S = 0.01

# A backend that is given up has ended within this time, or waits for an operation that does not know so.
_END_S = 0.2

# What can go wrong while a group is made that is no other rank's doing.
_OWN = (WeightbusError, torch.OutOfMemoryError)


class GroupError(UpdateError):
    """A transfer has failed or stalled under this rank; that may be any other rank's doing.

    apart: group ranks that this one could not reach then.
    """

    apart: Sequence[int] = ()


class Group:
    """NCCL for CUDA, gloo for CPU; rendezvous through the hub. Collective: every member makes one.

    check: called while the group is made; raises once the update has ended elsewhere. A group that is given up
    then is made by nobody: what torch waits for in it is cut off.
    """

    def __init__(
        self,
        link: Link | Loopback,
        *,
        epoch: int,
        rank: int,
        size: int,
        device: torch.device,
        timeout_s: float,
        check: Callable[[], None],
    ) -> None:
        self.epoch, self.rank, self.size, self.device = epoch, rank, size, device
        self._timeout_s = timeout_s
        self._backend: Any = None
        if size == 1:
            return
        assert isinstance(link, Link), "a process by itself is a group of one"  # noqa: S101 - for mypy
        address = link.address
        self._store = store = HubStore(link, epoch, timeout_s)

        def make() -> Any:
            if device.type == "cuda":
                with torch.cuda.device(device):
                    return torch_group.nccl_backend(store, rank, size, timeout_s, device)
            return torch_group.gloo_backend(store, rank, size, timeout_s, address)

        try:
            self._backend = _in_a_thread(make, check)
        except BaseException as error:
            store.close()
            torch_group.cut(list(store.values.values()))
            if isinstance(error, RuntimeError) and not isinstance(error, _OWN):
                failed = GroupError(f"no group could be made: {str(error).splitlines()[0]}")
                failed.apart = self._apart()
                raise failed from error
            if isinstance(error, GroupError):
                error.apart = self._apart()
            raise

    def broadcast(self, buffers: Sequence[tuple[torch.Tensor, int]]) -> list[Any]:
        """Start broadcasts together, each of a buffer (uint8, contiguous) from a group rank.

        Returns their works. On CUDA they are put into the current stream, and there are none.
        """
        return (
            []
            if self._backend is None
            else torch_group.broadcast(self._backend, buffers, self.device, self._timeout_s)
        )

    def exchange(
        self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]
    ) -> list[Any]:
        """Start messages together: buffers (uint8, contiguous) to and from group ranks other than this one.

        Two ranks list what goes from one to the other in the same order. Returns works as ``broadcast`` does.
        """
        if self._backend is None or not (sends or receives):
            return []
        return torch_group.exchange(self._backend, sends, receives, self.device, self._timeout_s)

    def wait(self, work: Any, check: Callable[[], None]) -> None:
        """Until ``work`` is done.

        check: called while waiting; raises once the update has ended.
        Raises GroupError if the transfer failed or stalled.
        """
        try:
            self._wait(work, check)
        except GroupError as error:
            error.apart = self._apart()
            raise

    def _wait(self, work: Any, check: Callable[[], None]) -> None:
        while not work.is_completed():
            with contextlib.suppress(RuntimeError):  # the slice is over, or what the wait below raises again
                work.wait(_SLICE)
            check()
        try:
            work.wait()
        except RuntimeError as error:
            raise GroupError(f"transfer failed: {str(error).splitlines()[0]}") from error

    def _apart(self) -> list[int]:
        """Ranks that this one can't reach. Where NCCL's are is not known: they count as reached."""
        if self.device.type != "cpu":
            return []
        told = {key.rpartition("/")[2]: value for key, value in list(self._store.values.items())}
        found = {int(key): torch_group.told_address(value) for key, value in told.items() if key.isdigit()}
        others = {rank: to for rank, to in found.items() if to and rank != self.rank and rank < self.size}
        return unreached(others)

    def close(self, *, abort: bool = False) -> None:
        """Leave the group. ``abort``: other ranks may be gone, so wait for nobody."""
        backend, self._backend = self._backend, None
        if backend is None:
            return
        if abort and self.device.type == "cpu":
            held = [backend]
            del backend
            _abandon(held, list(self._store.values.values()))
        elif abort or self.device.type == "cuda":
            backend.abort()
        else:
            backend.shutdown()
        self._store.close()


def _abandon(held: list[Any], addresses: list[bytes]) -> None:
    """Give up a gloo backend, the only thing in ``held``, whose other ranks may be gone.

    Now and then an operation of gloo's does not notice that its connections are shut, and the backend's end
    waits for the operation's timeout: that is left to a thread. Nothing arrives once no connection is left.
    """
    torch_group.cut(addresses)

    def end() -> None:
        held.pop().abort()

    thread = threading.Thread(target=end, name="weightbus-group-end", daemon=True)
    thread.start()
    until = time.monotonic() + _END_S
    while thread.is_alive() and (time.monotonic() < until or torch_group.cut(addresses)):
        thread.join(_LOOK_S)


def _in_a_thread(make: Callable[[], Any], check: Callable[[], None]) -> Any:
    """What ``make`` gives. Constructors of torch's can't be interrupted: this thread looks meanwhile.

    check: raises where it is not wanted any more; what is made after all is dropped.
    """
    made: Future[Any] = Future()

    def run() -> None:
        try:
            backend = make()
        except BaseException as error:
            made.set_exception(error)
        else:
            made.set_result(backend)

    threading.Thread(target=run, name="weightbus-group", daemon=True).start()
    while True:
        with contextlib.suppress(TimeoutError):
            return made.result(_LOOK_S)
        check()
