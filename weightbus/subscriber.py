"""The server's side: take part in updates and checks between the engine's steps."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from weightbus.control import messages as m
from weightbus.control.keys import Keys, load_keys
from weightbus.control.link import REJOIN_S
from weightbus.control.wire import FromHub
from weightbus.errors import SpecError, WeightbusError
from weightbus.inventory.derived import Derived
from weightbus.inventory.reads import Inputs
from weightbus.progress import Bar
from weightbus.report import Loaded
from weightbus.session.arguments import checked_version
from weightbus.session.baseline import Baseline, check_baseline
from weightbus.session.destination import Destination, State
from weightbus.session.hearing import log_missing
from weightbus.session.load import Load
from weightbus.session.progress import Progress
from weightbus.session.results import raise_for
from weightbus.session.session import Session
from weightbus.session.task_participant import take_part
from weightbus.session.terms import DEFAULT_NUM_BUCKETS
from weightbus.session.waiting import wait_for, wait_for_check
from weightbus.tensors.install import NameMap
from weightbus.tensors.layout import Source
from weightbus.tensors.ranks import rank_and_size

log = logging.getLogger("weightbus")


class Subscriber:
    """One server rank's subscriber; every rank of every replica makes one.

    target: the live model: an ``nn.Module``, a mapping of names to modules, or an iterable of (name,
        tensor). Plain tensors, DTensors, and parameters with a ``weight_loader`` are written in place; a
        module with ``load_weights`` is written where that would write (docs/checks.md). Tensors may lie on
        one GPU and in host memory; a module that keeps them elsewhere says where (docs/offload.md).
    device: where bytes arrive, by default the tensors' GPU. For a target that is all in host memory, beside
        trainers on GPUs.
    replica: which copy of the model this rank belongs to. rank, replica_size: this rank's place in it;
        default from the model's device mesh, else torchrun's variables.
    name_map: a function or mapping from a wire name to this model's name, to a tuple of a name and
        further arguments for its ``weight_loader``, or to None where another rank takes it. A module with
        ``load_weights`` is told the name that a wire name is mapped to.
        A ``weight_loader`` is called once more than there are updates: on tensors without data, on the
        meta device, to learn which elements it writes (docs/checks.md).
    local: patterns of this model's names that no update feeds, or, behind hooks, feeds in part.
    derived: patterns of names that the engine computes from others, as in ``on_commit``; or
        ``{pattern: function}``: the function takes the module that holds the tensor and returns a new one. It
        is copied into place after each update and proved by a second call (docs/checks.md).
    require_proof: an update or load of which something would not be proved is refused, before a byte moves.
    example_inputs: of one forward, run when a plan is made to find storage that it reads and no module holds:
        a tensor, a tuple, a dict of named ones, or a function that runs it. All is put back afterwards.
    trust_traces: a ``weight_loader`` that could be traced is not called: its writes are made directly, with
        no staging memory. Not for hooks that do more than write.
    on_update: called with the version before any byte is written (pause). Then exactly one of
        on_commit (with the version: flush caches, resume), on_torn (with the error: weights are a
        mixture) or on_refused (with the error: the old weights live on). Loads from disk or from tensors
        call them too, with None where a load has no version.
    baseline: the directory that the engine was loaded from, or a function that makes its model anew: refused,
        with SpecError, if what is live is not what loading gives (docs/checks.md).
    agree: for engines whose steps are collective: takes this rank's "an update is waiting" and returns
        the same answer on all ranks of the replica, such as an all-reduce with MAX; so that all enter an
        update between the same two steps. Called once in each ``poll``.
    cpu_group: the engine's own group of the replica's ranks, for CPU tensors: with it, SHA-256 digests of whole
        tensors are put together from shards. Without it, ranks are asked about their shards alone.
    address, job, reconnect_timeout_s, keys, insecure: as the publisher's.
    Raises HubError if no hub answers in ``connect_timeout_s`` or it refuses this rank.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        target: Source,
        *,
        address: str | None = None,
        job: str | None = None,
        device: torch.device | str | None = None,
        replica: int = 0,
        rank: int | None = None,
        replica_size: int | None = None,
        name_map: NameMap | None = None,
        local: Sequence[str] = (),
        derived: Derived = (),
        trust_traces: bool = False,
        require_proof: bool = False,
        example_inputs: Inputs = None,
        baseline: Baseline | None = None,
        on_update: Callable[[int | None], None] | None = None,
        on_commit: Callable[[int | None], None] | None = None,
        on_torn: Callable[[WeightbusError], None] | None = None,
        on_refused: Callable[[WeightbusError], None] | None = None,
        agree: Callable[[bool], bool] | None = None,
        cpu_group: dist.ProcessGroup | None = None,
        num_buckets: int = DEFAULT_NUM_BUCKETS,
        connect_timeout_s: float = 300.0,
        reconnect_timeout_s: float = REJOIN_S,
        keys: Keys | str | os.PathLike[str] | None = None,
        insecure: bool = False,
    ) -> None:
        self._destination = Destination(
            target,
            device=device,
            name_map=name_map,
            local=local,
            derived=derived,
            trust_traces=trust_traces,
            require_proof=require_proof,
            example_inputs=example_inputs,
            on_update=on_update,
            on_commit=on_commit,
            on_torn=on_torn,
            on_refused=on_refused,
            cpu_group=cpu_group,
        )
        if baseline is not None:
            check_baseline(self._destination, baseline)
        self.rank, self.replica_size = rank_and_size(self._destination.layout, rank, replica_size)
        self.replica = replica
        self._agree = agree
        self._stop = threading.Event()
        self._closed = self._left = False
        device = self._destination.device
        keys = keys if isinstance(keys, Keys) else load_keys(keys, insecure=insecure)
        self._session = Session.open("server", address, job, device, num_buckets, keys, reconnect_timeout_s)
        try:
            self._session.join(
                "server",
                rank=self.rank,
                size=self.replica_size,
                replica=replica,
                device=device.type,
                timeout_s=connect_timeout_s,
                model=self._destination.sketch(),
            )
        except BaseException:
            self._session.close("server")
            raise
        self._session.context.destination = self._destination

    @property
    def state(self) -> State:
        """``empty``, ``ready``, ``updating`` or ``torn``."""
        return self._destination.state

    @property
    def version(self) -> int | None:
        """The last version committed on this rank."""
        return self._destination.version

    @property
    def error(self) -> WeightbusError | None:
        """Why the last update was not committed; None after one that was."""
        return self._destination.error

    @property
    def tried(self) -> int | None:
        """The version of the last update that ended here, committed or not."""
        return self._destination.tried

    @property
    def again(self) -> bool:
        """Whether the last update failed by some replica's fault, so that the trainer may try again at once."""
        return self._destination.again

    @property
    def left(self) -> bool:
        """Whether the trainer job has left, as ``poll`` has seen."""
        return self._left

    @torch.inference_mode(False)
    def poll(self, timeout_s: float = 0.0) -> bool:
        """Take part in an update, check, load or probe if one waits; whether one did.

        Called by every rank of the replica between engine steps. Blocks for the update, else for at
        most ``timeout_s``. What became of it: ``state``, ``version``, ``error`` and the callbacks.
        Where other ranks of the replica do not poll, an update is put off before a byte moves, a heartbeat
        (0.5 s) after ``timeout_s`` is over: ``on_refused`` is called, and the next ``poll`` hears of it again.
        Raises HubError once the hub has been lost for ``reconnect_timeout_s``.
        """
        if self._session.context.origin is not None:
            # This process is a trainer rank too: its publisher's calls carry the server's part.
            return False
        alone = self.replica_size == 1 or self._agree is not None
        until = math.inf if alone else time.monotonic() + timeout_s
        try:
            message = self._hear(timeout_s)
            outcome = self._take(message, until)
            return isinstance(message, m.TaskOffer) or (outcome is not None and not outcome.put_off)
        finally:
            self._session.put_back()  # an interrupt, or an agreement that raises, loses no offer

    @torch.inference_mode(False)
    def wait(self, version: int, timeout_s: float = 600.0) -> int:
        """Take part in rounds until ``version``, or a later one of the same trainer, is committed here; which.

        For engines that are told of an update by a call of their own. Called by every rank of the replica,
        with equal arguments, and with one end for all of them: the version, or an error. It ends at once, with
        the reason, when the trainer refuses, cancels (``Publisher.cancel``), dies, leaves, or commits without
        this replica. ``timeout_s`` counts from the first rank's call. ``agree`` is not asked.
        Raises UpdateError if the weights are as before, TornError if they may be a mixture, HubError once the
        hub has been lost for ``reconnect_timeout_s``, SpecError where this process is a trainer rank, too.
        """
        version = checked_version(version)
        self._serves_alone("wait", "update")
        try:
            return wait_for(self._session, version, timeout_s, self._take_till)
        finally:
            self._session.put_back()

    @torch.inference_mode(False)
    def wait_for_check(self, timeout_s: float = 60.0) -> str:
        """Take part in rounds until a check has ended here; its word, as ``Verdict.word``.

        For engines that are told of a check by a call of their own. Called by every rank of the replica.
        ``mismatch`` is returned where other ranks are wrong, and this one is not.
        Raises TornError where this rank does not hold the bytes that were committed, or the check does not tell
        which rank does not; UpdateError where the check has failed or none has ended in ``timeout_s``; else as
        ``wait``.
        """
        self._serves_alone("wait_for_check", "check")
        try:
            return wait_for_check(self._session, timeout_s, self._take_till)
        finally:
            self._session.put_back()

    def _serves_alone(self, call: str, instead: str) -> None:
        if self._session.context.origin is not None:
            raise SpecError(
                f"{call}: expected a process of the servers alone; here publisher.{instead}() does all of it"
            )

    def _take_till(self, message: FromHub | None, until: float) -> m.Outcome | None:
        return self._take(message, math.inf if self.replica_size == 1 else until)

    def _hear(self, timeout_s: float) -> FromHub | None:
        message = self._session.receive(timeout_s)
        if self._agree is not None:
            waiting = self._agree(isinstance(message, m.Offer | m.TaskOffer))
            if waiting and message is None:
                message = self._session.receive(30.0)
        return message

    def _take(self, message: FromHub | None, until: float) -> m.Outcome | None:
        """The outcome of an update or check, if it was one. until: as of ``Session.follow``."""
        match message:
            case m.Offer():
                return self._session.follow(message, Progress(), until=until)
            case m.TaskOffer():
                take_part(self._session.context, message)
            case m.Farewell():
                self._left = True
                # A trainer that comes back needs the memory that they hold.
                self._session.context.plans.clear()
            case m.Missing():
                log_missing(message)
            case None:
                pass
            case _:
                # The end of an update that this rank has given up already.
                log.info("late: %s", type(message).__name__)
        return None

    @torch.inference_mode(False)
    def update_from_disk(
        self,
        path: str | Path,
        modules: Sequence[str] | None = None,
        *,
        version: int | None = None,
        atomic: bool = False,
        verify: bool = True,
        timeout_s: float = 600.0,
    ) -> Loaded:
        """Load safetensors files into the live weights; all modules or none.

        Collective over the replica's ranks, with equal arguments; ranks that are in ``poll`` or ``serve`` take
        part too, if rank 0 calls. Each rank reads only what it holds.
        path: that every rank can read: a directory (with a sub-folder for each module of a mapping target), a
            safetensors file, or an index file. modules: names of a mapping target's modules; all by default.
        version: the label that ``version`` gives from now on; by default what ``publisher.save`` recorded.
        atomic: read everything into host memory before the first write, so that a file that can't be read any
            more leaves the old weights live. verify: compare with the directory's digest list, if it has one.
        timeout_s: to wait for other ranks and rounds, and for each step.
        Raises UpdateError if nothing was written (the text names rank, file and tensor), TornError if ranks
        hold a mixture, HubError if the hub is lost.
        """
        task = m.LoadTask(
            replica=self.replica,
            path=os.path.abspath(path),
            modules=None if modules is None else list(modules),
            version=version,
            atomic=atomic,
            verify=verify,
        )
        bar = Bar(f"loading {os.path.basename(task.path)}") if self.rank == 0 else None
        try:
            outcome, participant = self._session.call_task(
                task, lead=self.rank == 0, timeout_s=timeout_s, report=bar or (lambda done, total: None)
            )
        finally:
            if bar:
                bar.close()
        raise_for(outcome, f"load of {task.path}")
        work = participant.work
        assert isinstance(work, Load), "a load has been committed"  # noqa: S101 - for mypy
        return Loaded(
            word=outcome.verdict,
            version=work.version,
            nbytes=work.nbytes,
            seconds=outcome.seconds,
            servers=outcome.servers,
            partial=outcome.partial,
        )

    def serve(self) -> None:
        """Take part in updates, checks and loads until the trainer job leaves, or ``stop`` is called."""
        while not self._left and not self._stop.is_set():
            if self._session.context.origin is None:
                self.poll(timeout_s=0.5)
            else:
                time.sleep(0.5)
        self._left = False

    def stop(self) -> None:
        """Make ``serve`` return; may be called from another thread."""
        self._stop.set()

    def close(self) -> None:
        """Leave the hub."""
        if not self._closed:
            self._closed = True
            self._session.close("server")

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
