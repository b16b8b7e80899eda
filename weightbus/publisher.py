"""The trainer's side: publish new weights, and check what the servers hold."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Literal, SupportsIndex, overload

import torch

from weightbus import messages as m
from weightbus.box import Box
from weightbus.ends import Origin
from weightbus.errors import SpecError, TornError, UpdateError, WeightbusError
from weightbus.frozen import Where
from weightbus.hub import DEAD_AFTER_S
from weightbus.install import matches
from weightbus.keys import Keys, load_keys
from weightbus.layout import Source
from weightbus.link import REJOIN_S
from weightbus.planned import ROUTES, Settings
from weightbus.progress import Bar
from weightbus.ranks import rank_and_size
from weightbus.report import Mismatch, Report, Saved, Verdict, both_ends
from weightbus.save import Save
from weightbus.saved_names import modules_of
from weightbus.session import Session
from weightbus.torch_start import start_token
from weightbus.turn import Progress, SourceCopy

log = logging.getLogger("weightbus")

# A wave's bytes: enough that the link's pauses between waves do not count, little enough that the first
# wave's packing and the last one's installing do not either.
CUDA_BUCKET_BYTES = 256 << 20
CPU_BUCKET_BYTES = 64 << 20
DEFAULT_NUM_BUCKETS = 2

DEFAULT_FILE_BYTES = 4 << 30
Route = Literal["auto", "peer", "broadcast"]


class Publisher:
    """One trainer rank's publisher; every trainer rank makes one, rank 0 starts the hub.

    source: the model that is trained: an ``nn.Module``, a mapping of names to modules, or an iterable
        of (name, tensor). Plain tensors, or DTensors of any mesh and placement but ``Partial``.
    address: the hub's, else ``WEIGHTBUS_ADDRESS``, else port 5757 of this host. job: which job this is, else
        ``WEIGHTBUS_JOB``; jobs of different names never pair, whether at one hub or not.
    rank, size: default from the model's device mesh, else torchrun's variables.
    min_replicas: an update waits until so many replicas of the server job are complete.
    bucket_bytes, num_buckets: staging memory of each rank, as far as it is needed; by default 2 buckets of
        64 MiB on the CPU, of 256 MiB on CUDA. So much is sent together, or more where it needs no bucket.
    route: ``auto`` takes ``peer`` (server ranks copy out of this rank's GPU memory, docs/peer.md) where all
        ranks share a host and nothing has to be cast, else ``broadcast``; both can be asked for.
    join_timeout_s: to wait for ranks and replicas; ready_timeout_s: for each rank to get ready, longer
        than an engine's step; transfer_timeout_s: for the bytes to move and be digested.
    reconnect_timeout_s: to find a lost hub again, or another in its place, before a call fails; rank 0 starts
        one where none listens. dead_after_s: such a hub drops a rank whose heartbeats stop for so long.
    keys: a directory of CURVE keys (``weightbus keygen``), else of the environment; needed for an address
        that is not this host's alone, unless ``insecure=True`` (docs/security.md).
    progress: called with (done, total) bytes as this rank moves them, which by the route ``peer`` it does
        not; by default a bar on rank 0's terminal.
    copy_to: where ``update(wait=False)`` copies the source, which takes as much memory: ``device``, or
        ``host`` for pinned memory.
    exclude: patterns of the source's names that are not sent nor looked at, such as ``"v_head.*"``. rename: a
        mapping from the source's names to those that servers know, or a function.
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
        min_replicas: int = 1,
        bucket_bytes: int | None = None,
        num_buckets: int = DEFAULT_NUM_BUCKETS,
        route: Route = "auto",
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
    ) -> None:
        if min_replicas < 1:
            raise SpecError(f"min_replicas: expected at least 1, got {min_replicas}")
        if route not in ROUTES:
            raise SpecError(f"route: expected one of {', '.join(ROUTES)}, got {route!r}")
        self._origin = Origin(source, wire_names(exclude, rename))
        device = self._origin.layout.device
        if bucket_bytes is None:
            bucket_bytes = CUDA_BUCKET_BYTES if device.type == "cuda" else CPU_BUCKET_BYTES
        if copy_to not in ("device", "host"):
            raise SpecError(f"copy_to: expected 'device' or 'host', got {copy_to!r}")
        if bucket_bytes < 1 << 10 or num_buckets < 1:
            raise SpecError(
                f"staging: expected at least 1 bucket of 1024 bytes, got {num_buckets} of {bucket_bytes}"
            )
        self.rank, self.size = rank_and_size(self._origin.layout, rank, size)
        self._min_replicas, self._bucket_bytes, self._route = min_replicas, bucket_bytes, route
        self._timeouts = (join_timeout_s, ready_timeout_s, transfer_timeout_s)
        self._progress, self._copy_to = progress, copy_to
        self._background: ThreadPoolExecutor | None = None
        self._pending: Future[Report] | None = None
        self.version: int | None = None
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
        self._session.origin = self._origin

    @overload
    def update(
        self,
        version: int,
        *,
        verify: bool = True,
        modules: Sequence[str] | None = None,
        wait: Literal[True] = True,
    ) -> Report: ...

    @overload
    def update(
        self, version: int, *, verify: bool = True, modules: Sequence[str] | None = None, wait: Literal[False]
    ) -> Future[Report]: ...

    @torch.inference_mode(False)
    def update(
        self, version: int, *, verify: bool = True, modules: Sequence[str] | None = None, wait: bool = True
    ) -> Report | Future[Report]:
        """Send the source's tensors to all complete replicas; returns once they are committed.

        Collective over trainer ranks, with equal arguments. The source must not change until it returns.
        version: an integer above the last one committed. modules: names of a mapping source's modules;
        all by default. verify: digest both ends, and commit only if all sums match.
        wait: if False, the source is copied (see ``copy_to``) in the order of the current stream, and may
        change at once; the returned future has the report, or raises. Calls that follow wait for it first.
        Raises UpdateError if nothing was written (the text names each rank and reason), TornError if
        server ranks were left with a mixture, HubError if the hub is lost.
        """
        begun = time.monotonic()
        version = checked_version(version)
        self._settle()
        if not wait and self._origin.refresh(in_place=True):
            self._session.forget_plans()
        enter = self._enter("update", version, modules, verify, "live" if wait else self._copy_to)
        if wait:
            bar = Bar(f"version {version}") if self._progress is None and self.rank == 0 else None
            try:
                report = self._send(enter, begun, self._progress or bar, None)
            finally:
                if bar:
                    bar.close()
            self._run_tasks()
            return report
        if self._session.destination is not None:
            raise UpdateError("wait: expected True, got False: this process serves the weights that it updates")
        copied = None
        if not enter.refusal:
            frozen = self._origin.frozen(self._copy_to)
            copied = SourceCopy(frozen=frozen, filled=frozen.fill(modules))
        if self._background is None:
            self._background = ThreadPoolExecutor(1, "weightbus-update")
        self._pending = self._background.submit(self._send, enter, begun, self._progress, copied)
        return self._pending

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
        progress, version = Progress(report=on_progress), enter.version
        try:
            outcome = self._session.call(enter, progress, copied)
        except BaseException:
            if self._session.committed == version:  # interrupted, or a callback raised, when it was
                self.version = version
            raise
        seconds = time.monotonic() - begun
        processes = self._session.processes()
        if not outcome.ok:
            reasons = "\n  ".join(["", *map(str, outcome.failures)])
            if outcome.moved:
                raise TornError(f"version {version} was not committed, servers may hold a mixture:{reasons}")
            if outcome.servers and not outcome.job and (ends := both_ends(processes)):
                reasons += f"\n  unnamed job: {ends}"
            raise UpdateError(f"version {version} was refused, nothing was written:{reasons}")
        self.version = version
        report = Report(
            word=outcome.verdict,
            version=version,
            job=outcome.job,
            incarnation=outcome.incarnation,
            epoch=outcome.epoch,
            tensors=progress.tensors,
            nbytes=progress.nbytes,
            seconds=seconds,
            stages=progress.stages,
            staging_bytes=self._session.staging.nbytes,
            trainers=outcome.trainers,
            servers=outcome.servers,
            replicas=tuple(outcome.replicas),
            partial=outcome.partial,
            skipped=progress.skipped,
            route=progress.choice.route if progress.choice else "",
            route_reason=progress.choice.reason if progress.choice else "",
            processes=processes,
        )
        if self.rank == 0:
            log.info("%s", report)
        self._tasks += outcome.tasks
        return report

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
                self._session.call(self._enter("check", self.version or 0, None, True), Progress())
            else:
                version = task.version or 0
                enter = self._enter("label", version, None, False)
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
        outcome = self._session.call(self._enter("check", self.version or 0, None, True), Progress())
        if outcome.verdict == "failed":
            wrong = [failure for failure in outcome.failures if failure.reason.startswith("expected version")]
            if len(wrong) < len(outcome.failures) or not wrong:
                raise UpdateError("check:" + "\n  ".join(["", *map(str, outcome.failures)]))
        partial = dict(outcome.partial)
        partial |= {module: "no verified update of this module counts" for module in self._origin.unproved()}
        word = outcome.verdict if outcome.ok else "mismatch"
        return Verdict(
            word="partial" if partial and word == "verified" else word,
            version=self.version,
            mismatches=tuple(
                Mismatch(
                    rank=failure.rank,
                    tensor=failure.tensor,
                    reason=failure.reason,
                    kind=failure.kind,
                    where=failure.where,
                    box=Box(tuple(span.offsets), tuple(span.sizes)) if span else None,
                )
                for failure in outcome.failures
                for span in [failure.box]
            ),
            partial=partial,
            exempt=outcome.exempt,
            servers=outcome.servers,
            seconds=time.monotonic() - begun,
            digest_s=outcome.digest_s,
        )

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
        bar = Bar(f"saving {os.path.basename(task.path)}") if self.rank == 0 else None
        report = bar or (lambda done, total: None)
        self._settle()
        if self._origin.refresh(in_place=True):
            self._session.forget_plans()

        def work(offer: m.TaskOffer, task: m.SaveTask, place: int, look: Callable[[], None]) -> Save:
            modules = modules_of(self._origin.source)
            return Save(task, place, self._origin.layout, look=look, progress=report, modules=modules)

        try:
            outcome, turn = self._session.call_task(
                task, lead=self.rank == 0, timeout_s=timeout_s, report=report, save=work
            )
        finally:
            if bar:
                bar.close()
        if not outcome.ok:
            reasons = "\n  ".join(["", *map(str, outcome.failures)])
            raise UpdateError(f"save to {task.path} has failed:{reasons}")
        assert isinstance(turn.work, Save), "a save has ended well"
        return Saved(
            path=task.path,
            version=version,
            files=turn.work.files,
            tensors=turn.work.tensors,
            nbytes=turn.work.nbytes,
            seconds=outcome.seconds,
        )

    def _enter(
        self, kind: m.Kind, version: int, modules: Sequence[str] | None, verify: bool, sent: str = "live"
    ) -> m.Enter:
        facts = refusal = ""
        try:
            _, facts = self._origin.facts(modules)
        except WeightbusError as error:
            # The other trainer ranks are calling too: they get this reason instead of a deadline.
            refusal = str(error)
        jobs = self._origin.jobs() if kind == "check" else []
        if kind == "check" and not jobs:
            refusal = "check: expected a version committed by update(verify=True), got none"
        join_s, ready_s, transfer_s = self._timeouts
        settings = Settings(bucket_bytes=self._bucket_bytes, route=self._route, source=sent)
        return m.Enter(
            peer=self._session.link.peer,
            kind=kind,
            version=version,
            modules=None if modules is None else list(modules),
            verify=verify,
            facts=facts,
            settings=str(settings),
            min_replicas=self._min_replicas,
            join_s=join_s,
            ready_s=ready_s,
            transfer_s=transfer_s,
            jobs=jobs,
            refusal=refusal,
            task=self._task,
        )

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


def wire_names(
    exclude: Sequence[str] = (), rename: Mapping[str, str] | Callable[[str], str] | None = None
) -> Callable[[str], str | None] | None:
    """From a source's name to its wire name, or to None for what is excluded; None if all names stay."""
    if isinstance(exclude, str):
        raise SpecError(f"exclude: expected a list of patterns, got {exclude!r}")
    if not exclude and rename is None:
        return None

    def name_of(name: str) -> str | None:
        if matches(name, exclude):
            return None
        if rename is None:
            return name
        return rename(name) if callable(rename) else rename.get(name, name)

    return name_of


def checked_version(version: SupportsIndex) -> int:
    """``version`` as an int. Raises SpecError for what is none, and for one that the wire can't carry."""
    try:
        if isinstance(version, bool):
            raise TypeError
        number = index(version)
    except TypeError:
        raise SpecError(f"version: expected an integer, got {version!r} ({type(version).__name__})") from None
    if not 0 <= number < 1 << 62:
        raise SpecError(f"version: expected 0 <= version < 2**62, got {number}")
    return number
