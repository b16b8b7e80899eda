"""The trainer's side: publish new weights, and check what the servers hold."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from pathlib import Path
from types import TracebackType
from typing import Literal, overload

import msgspec
import torch

from weightbus.control import messages as m
from weightbus.control.keys import Keys, load_keys
from weightbus.control.link import REJOIN_S
from weightbus.control.messages import DEAD_AFTER_S
from weightbus.errors import UpdateError
from weightbus.progress import Bar
from weightbus.report import Report, Saved, Verdict
from weightbus.session.arguments import checked_version, wire_names
from weightbus.session.attempts import update_with_retries
from weightbus.session.origin import Origin, SourceCopy
from weightbus.session.progress import Progress
from weightbus.session.results import reasons_of, report_of, verdict_of
from weightbus.session.saving import save_source
from weightbus.session.session import Session
from weightbus.session.terms import BUCKET_BYTES, DEFAULT_NUM_BUCKETS, Terms
from weightbus.session.torch_start import start_token
from weightbus.tensors.layout import Source
from weightbus.tensors.ranks import rank_and_size
from weightbus.tensors.source_copy import NOT_CAST, Where

log = logging.getLogger("weightbus")

DEFAULT_FILE_BYTES = 4 << 30


class Publisher:
    """One trainer rank's publisher; every trainer rank makes one, rank 0 starts the hub.

    source: the model that is trained: an ``nn.Module``, a mapping of names to modules, or an iterable
        of (name, tensor). Plain tensors, or DTensors of any mesh and placement but ``Partial``.
    address: the hub's, else ``WEIGHTBUS_ADDRESS``, else port 5757 of this host. job: which job this is, else
        ``WEIGHTBUS_JOB``; jobs of different names never pair, whether at one hub or not.
    rank, size: default from the model's device mesh, else torchrun's variables.
    min_replicas: an update waits until so many replicas of the server job are complete, and is committed if so
        many have it; ``report.left_out`` names the others. ``"all"``: all that are complete, or none.
    retries: so often an update that has failed by the fault of some replicas is repeated at once without them,
        as long as ``min_replicas`` are left. One that was left out is tried again after a pause, which grows.
    bucket_bytes, num_buckets: staging memory of each rank, as far as it is needed; by default 2 buckets of
        64 MiB on the CPU, of 256 MiB on CUDA. So much is sent together, or more where it needs no bucket.
    route: ``auto`` takes ``peer`` (server ranks copy out of this rank's GPU memory, docs/peer.md) where all
        ranks share a host and nothing has to be cast; else ``reshard`` (each rank gets only what it needs,
        docs/reshard.md) over gloo where that is clearly less, else ``broadcast``. All can be asked for.
    join_timeout_s: to wait for ranks and replicas; ready_timeout_s: for each rank to get ready, longer
        than an engine's step; transfer_timeout_s: for the bytes to move and be digested.
    reconnect_timeout_s: to find a lost hub again, or another in its place, before a call fails; rank 0 starts
        one where none listens. dead_after_s: such a hub drops a rank whose heartbeats stop for so long.
    keys: a directory of CURVE keys (``weightbus keygen``), else of the environment; needed for an address
        that is not this host's alone, unless ``insecure=True`` (docs/security.md).
    progress: called with (done, total) bytes as this rank moves them, by the route ``reshard`` only its
        share of them, by ``peer`` none; by default a bar on rank 0's terminal.
    copy_to: where ``update(wait=False)`` copies the source, which takes as much memory: ``device``, or
        ``host`` for pinned memory.
    exclude: patterns of the source's names that are not sent nor looked at, such as ``"v_head.*"``. rename: a
        mapping from the source's names to those that servers know, or a function.
    resume: the version that this job goes on from, as of the checkpoint that it has loaded: ``update()``
        without a number makes the next one. By default the last one that the hub knows of (``version``).
    catch_up: replicas that join, were left out or are torn get the committed version between updates, from
        another replica, where it can be proved (docs/operating.md).
    Raises HubError if no hub answers or it refuses this rank, SpecError for a source that can't be sent.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        source: Source,
        *,
        address: str | None = None,
        job: str | None = None,
        rank: int | None = None,
        size: int | None = None,
        min_replicas: int | Literal["all"] = 1,
        retries: int = 1,
        bucket_bytes: int | None = None,
        num_buckets: int = DEFAULT_NUM_BUCKETS,
        route: m.Route = "auto",
        connect_timeout_s: float = 60.0,
        join_timeout_s: float = 300.0,
        ready_timeout_s: float = 120.0,
        transfer_timeout_s: float = 300.0,
        reconnect_timeout_s: float = REJOIN_S,
        dead_after_s: float = DEAD_AFTER_S,
        keys: Keys | str | os.PathLike[str] | None = None,
        insecure: bool = False,
        progress: Callable[[int, int], None] | None = None,
        copy_to: Where = "device",
        exclude: Sequence[str] = (),
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        resume: int | None = None,
        catch_up: bool = True,
    ) -> None:
        self._origin = Origin(source, wire_names(exclude, rename))
        device = self._origin.layout.device
        self._terms = Terms(
            min_replicas=min_replicas,
            retries=retries,
            bucket_bytes=BUCKET_BYTES[device.type == "cuda"] if bucket_bytes is None else bucket_bytes,
            num_buckets=num_buckets,
            route=route,
            copy_to=copy_to,
            catch_up=catch_up,
            join_s=join_timeout_s,
            ready_s=ready_timeout_s,
            transfer_s=transfer_timeout_s,
        )
        self.rank, self.size = rank_and_size(self._origin.layout, rank, size)
        self._progress = progress
        self._background: ThreadPoolExecutor | None = None
        self._pending: Future[Report] | None = None
        self._resume = None if resume is None else checked_version(resume)
        self._closed = False
        self._task = ""
        self._tasks: list[m.Asked] = []
        keys = keys if isinstance(keys, Keys) else load_keys(keys, insecure=insecure)
        self._session = Session.open("trainer", address, job, device, num_buckets, keys, reconnect_timeout_s)
        try:
            self._session.join(
                "trainer",
                rank=self.rank,
                size=self.size,
                replica=0,
                device=device.type,
                timeout_s=connect_timeout_s,
                start_hub_dead_after_s=dead_after_s if self.rank == 0 else None,
                start=start_token(),
                model=self._origin.sketch(),
            )
        except BaseException:
            self._session.close("trainer")
            raise
        self._session.context.origin = self._origin
        known = self._session.last_known()
        self.version: int | None = known if self._resume is None else self._resume

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
    ) -> Future[Report]: ...

    @torch.inference_mode(False)
    def update(
        self,
        version: int | None = None,
        *,
        verify: bool = True,
        modules: Sequence[str] | None = None,
        wait: bool = True,
    ) -> Report | Future[Report]:
        """Send the source's tensors to all complete replicas; returns once they are committed.

        Collective over trainer ranks, with equal arguments. The source must not change until it returns.
        version: an integer above the last one committed since this trainer started; by default the next one, at
        first above ``resume`` or what the hub knows of, which gives it, alike on all ranks. modules: names of a
        mapping source's modules; all by default. verify: digest both ends, and commit only if all sums match.
        wait: if False, the source is copied (see ``copy_to``) in the order of the current stream, and may
        change at once; the returned future has the report, or raises. Calls that follow wait for it first.
        Raises UpdateError if nothing was written (the text names each rank and reason), TornError if
        server ranks were left with a mixture, HubError if the hub is lost.
        """
        begun = time.monotonic()
        if not wait and self._session.context.destination is not None:
            serves = "this process serves the weights that it updates; colocate(...).update does that"
            raise UpdateError(f"wait: expected True, got False: {serves}")
        enter, copied = self._begin(version, modules, verify=verify, wait=wait)
        if wait:
            title = "the next version" if version is None else f"version {version}"
            bar = Bar(title) if self._progress is None and self.rank == 0 else None
            try:
                report = self._send(enter, begun, self._progress or bar, None)
            finally:
                if bar:
                    bar.close()
            self._run_tasks()
            return report
        if self._background is None:
            self._background = ThreadPoolExecutor(1, "weightbus-update")
        self._pending = self._background.submit(self._send, enter, begun, self._progress, copied)
        return self._pending

    def _begin(
        self,
        version: int | None,
        modules: Sequence[str] | None,
        *,
        verify: bool,
        wait: bool,
        narrow: bool = False,
    ) -> tuple[m.Enter, SourceCopy | None]:
        """What an update says first; unless it waits, with a copy of the source as it is now. narrow: cast to
        what servers have taken last (``Origin.narrowed``)."""
        follows = version is None
        version = (self._resume or 0) if version is None else checked_version(version)
        self._settle()
        if not wait and self._origin.refresh(in_place=True):
            self._session.context.plans.clear()
        sent: m.Sent = "live" if wait else self._terms.copy_to
        dtypes = self._origin.narrowed(self._session.context.wire) if narrow else NOT_CAST
        enter = self._enter("update", version, modules, verify=verify, sent=sent, dtypes=dtypes)
        enter.follows, enter.after = follows, self._resume if follows else None
        copied = not wait and not enter.refusal
        return enter, self._origin.copy(self._terms.copy_to, modules, dtypes) if copied else None

    def _settle(self) -> None:
        """Wait for the update in the background; what became of it is its future's to say."""
        if self._pending is not None:
            wait_for_futures([self._pending])
            self._pending = None
            self._run_tasks()

    def _send(
        self,
        enter: m.Enter,
        begun: float,
        on_progress: Callable[[int, int], None] | None,
        copied: SourceCopy | None,
    ) -> Report:
        session, retries, committed = self._session, self._terms.retries, self._session.committed
        context = session.context
        try:
            version, outcome, progress = update_with_retries(session, enter, retries, on_progress, copied)
        except BaseException:
            if session.committed != committed:  # interrupted, or a callback raised, when it was
                self.version = session.committed
            raise
        self.version = version
        seconds = time.monotonic() - begun
        report = report_of(outcome, version, progress, seconds, context.staging.nbytes, context.processes())
        if self.rank == 0:
            log.log(logging.WARNING if report.left_out else logging.INFO, "%s", report)
        self._tasks += outcome.tasks
        return report

    def cancel(self, reason: str = "") -> bool:
        """End an update that waits, and what servers wait for (``Subscriber.wait``); whether anything did.

        From any thread of any trainer rank, once for all of them: whoever waits hears it at once, with
        ``reason``, and ``update`` raises UpdateError. An update whose bytes move goes on to its end.
        Raises HubError if the hub does not answer.
        """
        return self._session.cancel(reason)

    @torch.inference_mode(False)
    def refuse(self, version: int, reason: str, *, kind: Literal["update", "check"] = "update") -> None:
        """Called in place of ``update(version)``, or ``check()``, by a rank that can't make it: none then does.

        The other trainer ranks' call raises UpdateError with the reason, at once; nothing is written.
        """
        enter = self._enter(kind, checked_version(version))
        self._settle()
        self._session.call(msgspec.structs.replace(enter, refusal=reason), Progress())

    @torch.inference_mode(False)
    def poll(self) -> bool:
        """Run what a client has asked for (``weightbus update``, ``check``, ``set-version``); whether one did.

        Collective over trainer ranks, where the source is one that may be published. Costs a message each
        way, and waits for a rank that lags by more than one poll, 10 s at most. What becomes of the request,
        errors included, is the client's answer.
        """
        self._settle()
        task = self._session.poll()
        if task is not None:
            self._run(task)
        return task is not None

    def _run_tasks(self) -> None:
        """What came with an update's outcome, the same on all trainer ranks."""
        while self._tasks:
            self._run(self._tasks.pop(0))

    def _run(self, task: m.Asked) -> None:
        """One request. An update or check that fails is the client's matter; the next update mends it."""
        self._task = task.task
        try:
            if task.kind == "update":
                self.update(task.version or 1, verify=task.verify, modules=task.modules)
            elif task.kind == "check":
                self._session.call(self._enter("check", self.version or 0), Progress())
            else:
                version = task.version or 0
                enter = self._enter("label", version, verify=False)
                if self._session.call(enter, Progress()).ok:
                    self.version = version
        except UpdateError as error:
            log.warning("asked for: %s", error)
        finally:
            self._task = ""

    @torch.inference_mode(False)
    def check(self) -> Verdict:
        """Digest every live shard of the servers, and compare with the committed versions' sums.

        Collective over trainer ranks. The source may have moved on: its sums were kept at the commit.
        Raises UpdateError if no verified update has been committed, or if a rank could not answer.
        """
        self._settle()
        if not self._origin.jobs():
            raise UpdateError("check: expected a version committed by update(verify=True), got none")
        begun = time.monotonic()
        outcome = self._session.call(self._enter("check", self.version or 0), Progress())
        told = bool(outcome.failures) and all(failure.other_version for failure in outcome.failures)
        if outcome.verdict == "failed" and not told:
            raise UpdateError(f"check:{reasons_of(outcome.failures)}")
        return verdict_of(outcome, self.version, self._origin.unproved(), time.monotonic() - begun)

    @torch.inference_mode(False)
    def save(
        self,
        path: str | Path,
        *,
        version: int | None = None,
        modules: Sequence[str] | None = None,
        file_bytes: int = DEFAULT_FILE_BYTES,
        timeout_s: float = 600.0,
    ) -> Saved:
        """Write the source to safetensors files, with index and digest list, for ``update_from_disk``.

        Collective over trainer ranks, with equal arguments; each writes what it holds, in its own dtypes. The
        source must not change until it returns.
        path: a directory that does not exist yet, in one that all trainer ranks share; it appears, whole, at
            the end. A mapping source gets a sub-folder for each module. version: the label to record.
        file_bytes: no file has more data, unless one tensor has. timeout_s: to wait for the other ranks, and
            for each step.
        Raises UpdateError with each rank's reason, HubError if the hub is lost.
        """
        task = m.SaveTask(
            path=os.path.abspath(path),
            modules=None if modules is None else list(modules),
            version=version,
            file_bytes=file_bytes,
        )
        self._settle()
        if self._origin.refresh(in_place=True):
            self._session.context.plans.clear()
        return save_source(self._session, self._origin, task, lead=self.rank == 0, timeout_s=timeout_s)

    def _enter(
        self,
        kind: m.Kind,
        version: int,
        modules: Sequence[str] | None = None,
        *,
        verify: bool = True,
        sent: m.Sent = "live",
        dtypes: Mapping[str, str] = NOT_CAST,
    ) -> m.Enter:
        enter = self._terms.enter(self._origin, kind, version, modules, verify=verify, sent=sent, dtypes=dtypes)
        enter.peer, enter.task = self._session.link.peer, self._task
        return enter

    def close(self) -> None:
        """Leave the hub, once an update in the background has ended.

        When the last trainer rank has left, the servers' ``serve`` returns.
        """
        if not self._closed:
            self._closed = True
            self._settle()
            if self._background is not None:
                self._background.shutdown()
            self._session.close("trainer")

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
