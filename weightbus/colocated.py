"""A source and a target in the same processes, as in colocated reinforcement learning: one object for both."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import nn

from weightbus.errors import SpecError, UpdateError, WeightbusError
from weightbus.hub.in_process import PREFIX
from weightbus.inventory.derived import Derived
from weightbus.inventory.reads import Inputs
from weightbus.publisher import Publisher
from weightbus.report import Report, Verdict
from weightbus.session.arguments import wire_names
from weightbus.session.baseline import Baseline
from weightbus.session.destination import State
from weightbus.subscriber import Subscriber
from weightbus.tensors.install import NameMap
from weightbus.tensors.layout import Source, layout_of
from weightbus.tensors.ranks import rank_and_size

_numbers = itertools.count()


class Pending:
    """An update whose source is copied, and whose target is not written before ``result()`` or ``poll()``."""

    def __init__(self, write: Callable[[], Report]) -> None:
        self._write: Callable[[], Report] | None = write
        self._report: Report | None = None
        self._error: WeightbusError | None = None

    @property
    def done(self) -> bool:
        """Whether it has been written, or has failed."""
        return self._write is None

    def result(self) -> Report:
        """The report; the first call, or ``Colocated.poll``, writes the target. Collective over the ranks.

        Raises as ``Colocated.update`` does, each time; and UpdateError if the pair was closed before.
        """
        write, self._write = self._write, None
        if write is not None:
            try:
                self._report = write()
            except WeightbusError as error:
                self._error = error
            except BaseException as error:
                self._error = UpdateError(f"its update was interrupted: {error!r}")
                raise
        if self._report is None:
            raise self._error or UpdateError("the pair was closed before this update was written")
        return self._report

    def _drop(self) -> None:
        self._write = None


class Colocated:
    """What ``colocate`` returns: a publisher and a subscriber of this process."""

    def __init__(self, publisher: Publisher, subscriber: Subscriber) -> None:
        self._publisher, self._subscriber = publisher, subscriber
        self._pending: Pending | None = None

    @overload
    def update(
        self,
        version: int | None = None,
        *,
        verify: bool = True,
        modules: Sequence[str] | None = None,
        wait: Literal[True] = True,
    ) -> Report: ...

    @overload
    def update(
        self,
        version: int | None = None,
        *,
        verify: bool = True,
        modules: Sequence[str] | None = None,
        wait: Literal[False],
    ) -> Pending: ...

    def update(
        self,
        version: int | None = None,
        *,
        verify: bool = True,
        modules: Sequence[str] | None = None,
        wait: bool = True,
    ) -> Report | Pending:
        """Write the source's tensors into the target; as ``Publisher.update``. Collective over the ranks.

        wait: if False, only the source is copied, in the order of the current stream, and may change at once;
        ``poll()``, or ``result()`` of what is returned, writes the target. The copy, whose memory is kept
        (``copy_to``), has the dtypes in which the target took float32 last, if these are bfloat16 or float16.
        Raises UpdateError while an earlier update waits to be written.
        """
        if self._pending is not None and not self._pending.done:
            raise UpdateError("update: expected the last one to be written first, by poll() or its result()")
        if wait:
            return self._publisher.update(version, verify=verify, modules=modules)
        self._pending = Pending(self._copied(version, modules, verify=verify))
        return self._pending

    @torch.inference_mode(False)
    def _copied(
        self, version: int | None, modules: Sequence[str] | None, *, verify: bool
    ) -> Callable[[], Report]:
        """What writes the source as it is now."""
        publisher = self._publisher
        enter, copied = publisher._begin(version, modules, verify=verify, wait=False, narrow=True)

        @torch.inference_mode(False)
        def write() -> Report:
            report = publisher._send(enter, time.monotonic(), publisher._progress, copied)
            publisher._run_tasks()
            return report

        return write

    def poll(self) -> Report | None:
        """Write the update that waits, if one does, while the engine stands still; its report.

        Collective over the ranks. Raises as ``update`` does.
        """
        pending, self._pending = self._pending, None
        return None if pending is None or pending.done else pending.result()

    def check(self) -> Verdict:
        """Digest what the target holds, live, against the last version's sums; as ``Publisher.check``."""
        return self._publisher.check()

    @property
    def state(self) -> State:
        """The target's: ``empty``, ``ready``, ``updating`` or ``torn``."""
        return self._subscriber.state

    @property
    def version(self) -> int | None:
        """The last version committed to the target."""
        return self._subscriber.version

    @property
    def error(self) -> WeightbusError | None:
        """Why the last update was not committed; None after one that was."""
        return self._subscriber.error

    def close(self) -> None:
        """Give back all memory that the updates took. One that waits to be written is dropped."""
        if self._pending is not None:
            self._pending._drop()
        self._publisher.close()
        self._subscriber.close()

    def __enter__(self) -> Colocated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def colocate(
    source: Source,
    target: Source,
    *,
    rank: int | None = None,
    size: int | None = None,
    address: str | None = None,
    job: str | None = None,
    name_map: NameMap | None = None,
    local: Sequence[str] = (),
    derived: Derived = (),
    require_proof: bool = False,
    example_inputs: Inputs = None,
    baseline: Baseline | None = None,
    trust_traces: bool = False,
    on_update: Callable[[int | None], None] | None = None,
    on_commit: Callable[[int | None], None] | None = None,
    on_torn: Callable[[WeightbusError], None] | None = None,
    on_refused: Callable[[WeightbusError], None] | None = None,
    **options: Any,
) -> Colocated:
    """Updates of ``target`` from ``source``, both held by the same processes; made once, replayed at will.

    Both may differ in dtype and sharding: each rank copies what it holds itself, the rest comes from the other
    ranks. Collective over the ranks: rank, size default as a Publisher's. In a job of one process the two may
    also lie on different devices, and no hub is started; otherwise one is, on this host, until all ranks have
    closed, at ``address`` or at a free port that the ranks tell each other through the default group.
    name_map, local, derived, require_proof, example_inputs, baseline, trust_traces and the callbacks are a
    Subscriber's;
    options are a Publisher's.
    Raises SpecError for a source or target that can't be moved, and for ranks with neither group nor address.
    """
    if not isinstance(source, nn.Module | Mapping):
        source = list(source)  # pairs may be an iterator
    names = wire_names(options.get("exclude", ()), options.get("rename"))
    layout = layout_of(source, name_of=names)
    rank, size = rank_and_size(layout, rank, size)
    if size == 1:
        address = f"{PREFIX}{next(_numbers)}"
    elif address is None:
        address = _free_address(rank, layout.device)
    publisher = Publisher(source, address=address, job=job, rank=rank, size=size, **options)
    try:
        subscriber = Subscriber(
            target,
            address=address,
            job=job,
            rank=rank,
            replica_size=size,
            name_map=name_map,
            local=local,
            derived=derived,
            require_proof=require_proof,
            example_inputs=example_inputs,
            baseline=baseline,
            trust_traces=trust_traces,
            on_update=on_update,
            on_commit=on_commit,
            on_torn=on_torn,
            on_refused=on_refused,
        )
    except BaseException:
        publisher.close()
        raise
    return Colocated(publisher, subscriber)


def _free_address(rank: int, device: torch.device) -> str:
    """Of this host; rank 0 picks it. Collective over the default group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise SpecError("address: expected one, or a default process group through which ranks agree on it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = torch.tensor(probe.getsockname()[1], device=_group_device(device))
    dist.broadcast(port, 0)
    return f"tcp://127.0.0.1:{int(port)}"


def _group_device(device: torch.device) -> torch.device:
    """One that the default group can send from."""
    return torch.device("cpu") if "gloo" in str(dist.get_backend_config()) else device
