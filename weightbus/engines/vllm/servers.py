"""A trainer beside servers of vLLM: one call pauses, updates and resumes all of them, over HTTP."""

from __future__ import annotations

import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, TypeVar

from weightbus.control.identity import address_of
from weightbus.engines.vllm.gate import TORN
from weightbus.errors import SpecError, UpdateError, WeightbusError
from weightbus.publisher import Publisher
from weightbus.report import Report, Verdict
from weightbus.tensors.layout import Source

log = logging.getLogger("weightbus")

T = TypeVar("T")
Pause = Literal["keep", "wait", "abort"]

CALL_S = 60.0
"""For a route that only does what it says: start, finish, resume."""

CHECK_S = 60.0
"""How long a server waits for the offer of a check."""


@dataclass(slots=True, kw_only=True)
class Server:
    """What became of one server in an update. reason: why it has not the version. torn: it stays paused, and
    serves nobody until it has another one. unheard: it stays paused, as what it has is not known. paused_s:
    from before its pause until it was resumed."""

    url: str
    reason: str = ""
    torn: bool = False
    unheard: bool = False
    paused_s: float = 0.0

    def __str__(self) -> str:
        state = "left out" if self.reason else "has it"
        if self.torn or self.unheard:
            state = "torn, stays paused" if self.torn else "gave no answer, stays paused"
        return f"{self.url}: {state}, paused for {1000 * self.paused_s:.0f} ms" + (
            f": {self.reason}" if self.reason else ""
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServersReport:
    """report: the publisher's. servers: on trainer rank 0 what became of each; empty on others."""

    report: Report
    servers: tuple[Server, ...] = field(default=())

    def __str__(self) -> str:
        return "\n  ".join(map(str, (self.report, *self.servers)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServersVerdict:
    """verdict: the publisher's. servers: on trainer rank 0 what became of each; empty on others."""

    verdict: Verdict
    servers: tuple[Server, ...] = field(default=())

    def __str__(self) -> str:
        return "\n  ".join(map(str, (self.verdict, *self.servers)))


class Servers:
    """One trainer rank's view of several ``vllm serve``; every trainer rank makes one, rank 0 calls them.

    model: what a Publisher takes. urls: of servers that were started with the backend ``weightbus``, and with
    ``VLLM_SERVER_DEV_MODE=1`` for these routes. pause: what becomes of requests in flight: they are kept and
    go on afterwards, waited for, or aborted. reset_prefix_cache: what was computed with old weights is computed
    anew, for requests in flight, too; if False, it is kept. address, job, keys, insecure, options: the
    Publisher's; keys is a directory that the servers can read, too. baseline: as ``InitInfo``'s.
    pause_timeout_s: for requests in flight, with ``wait``.
    Raises SpecError or UpdateError if a server refuses, by its URL.
    """

    def __init__(
        self,
        model: Source,
        urls: Sequence[str],
        *,
        pause: Pause = "keep",
        reset_prefix_cache: bool = True,
        address: str | None = None,
        job: str | None = None,
        keys: str | os.PathLike[str] | None = None,
        insecure: bool = False,
        baseline: bool = True,
        pause_timeout_s: float = 600.0,
        join_timeout_s: float = 300.0,
        ready_timeout_s: float = 60.0,
        transfer_timeout_s: float = 300.0,
        **options: Any,
    ) -> None:
        if pause not in ("keep", "wait", "abort"):
            raise SpecError(f"pause: expected 'keep', 'wait' or 'abort', got {pause!r}")
        self.urls = [url.rstrip("/") for url in urls]
        self._pause, self._reset, self._pause_s = pause, reset_prefix_cache, pause_timeout_s
        self._update_s = join_timeout_s + ready_timeout_s + transfer_timeout_s
        self._updated = False  # with what a check compares
        # One for each server, whose calls go in order.
        self._threads = [ThreadPoolExecutor(1, "weightbus-vllm") for _ in self.urls]
        self.publisher = Publisher(
            model,
            address=address,
            job=job,
            keys=keys,
            insecure=insecure,
            join_timeout_s=join_timeout_s,
            ready_timeout_s=ready_timeout_s,
            transfer_timeout_s=transfer_timeout_s,
            **options,
        )
        hub = {
            "address": address_of(address),
            "job": job,
            "keys": None if keys is None else os.fspath(keys),
            "insecure": insecure,
            "baseline": baseline,
        }
        try:
            if self.publisher.rank == 0:
                self._join(hub)
        except BaseException:
            self.close()
            raise

    def _join(self, hub: dict[str, Any]) -> None:
        sizes = [
            [
                int(_call(url, f"get_world_size?include_dp={dp}", get=True)["world_size"])
                for dp in ("true", "false")
            ]
            for url in self.urls
        ]
        replicas = [whole // one for whole, one in sizes]
        firsts = [sum(replicas[:place]) for place in range(len(replicas))]

        def join(url: str, first: int) -> None:
            _call(url, "init_weight_transfer_engine", {"init_info": {**hub, "replica": first}}, timeout_s=600.0)

        rows = zip(self._threads, self.urls, firsts, strict=True)
        for joined in [thread.submit(join, url, first) for thread, url, first in rows]:
            joined.result()

    def update(self, version: int | None = None) -> ServersReport:
        """Publish the model as ``version``, by default the next one. Collective over trainer ranks.

        On ranks other than 0 it returns at the commit, before the servers are resumed.
        Servers that fail are left out, as ``servers`` of the report says, as long as one has the version. Those
        that are torn stay paused and serve nobody until a later update; the others go on.
        Raises UpdateError if no server has it and none is torn, TornError if some are; on all ranks.
        """
        version = (self.publisher.version or 0) + 1 if version is None else version
        info = {"version": version, "timeout_s": self._update_s}
        report, servers = self._beside(
            "update", lambda: self.publisher.update(version), version, info, self._reset
        )
        self._updated = True
        return ServersReport(report=report, servers=servers)

    def check(self) -> ServersVerdict:
        """Compare what the servers hold with the last committed version. Collective over trainer ranks.

        They are paused for it. One that holds other bytes is as one that is torn: it stays paused and serves
        nobody until a later update.
        Raises UpdateError before an update has succeeded, and as ``Publisher.check``.
        """
        version = self.publisher.version
        if not self._updated or version is None:
            raise UpdateError("check: expected a version committed by update() before, got none")
        info = {"check": True, "timeout_s": CHECK_S}
        verdict, servers = self._beside("check", self.publisher.check, version, info, False)
        return ServersVerdict(verdict=verdict, servers=servers)

    def _beside(
        self,
        kind: Literal["update", "check"],
        call: Callable[[], T],
        version: int,
        info: dict[str, Any],
        reset: bool,
    ) -> tuple[T, tuple[Server, ...]]:
        """What the publisher's call gives; on rank 0 while the servers are paused and take part."""
        if self.publisher.rank != 0:
            return call(), ()
        begun, called, given_up = time.monotonic(), False, ""
        servers = [Server(url=url) for url in self.urls]
        try:
            self._each(servers, self._begin)
            if all(server.reason for server in servers):
                reason = "; ".join(f"{server.url}: {server.reason}" for server in servers)
                raise UpdateError(f"{kind} {version} was refused, nothing was written: {reason}")
            self._submit([one for one in servers if not one.reason], lambda server: self._receive(server, info))
            called = True
            result = call()
        except BaseException as error:
            if not called:
                given_up = str(error) or type(error).__name__
                for server in servers:
                    server.reason = server.reason or f"{kind} {version} was given up before it began"
            raise
        finally:  # after what each has been asked before
            self._each(servers, lambda server: self._end(server, version, begun, reset))
            for server in servers:
                if server.reason:
                    log.error("vLLM: %s", server)
            if given_up:  # which the other trainer ranks are calling
                try:
                    self.publisher.refuse(version, given_up, kind=kind)
                except WeightbusError as more:
                    log.error("vLLM: %s", more)
        return result, tuple(servers)

    def _each(self, servers: Sequence[Server], step: Callable[[Server], None]) -> None:
        for one in self._submit(servers, step):
            one.result()

    def _submit(self, servers: Sequence[Server], step: Callable[[Server], None]) -> list[Future[None]]:
        threads = dict(zip(self.urls, self._threads, strict=True))
        return [threads[server.url].submit(self._try, server, step) for server in servers]

    @staticmethod
    def _try(server: Server, step: Callable[[Server], None]) -> None:
        try:
            step(server)
        except Exception as error:
            text = str(error) if isinstance(error, WeightbusError) else f"{type(error).__name__}: {error}"
            server.reason = "; ".join(filter(None, [server.reason, text]))
            server.torn = server.torn or TORN in text

    def _begin(self, server: Server) -> None:
        _call(server.url, f"pause?mode={self._pause}", timeout_s=self._pause_s)
        _call(server.url, "start_weight_update")

    def _receive(self, server: Server, info: dict[str, Any]) -> None:
        try:
            _call(server.url, "update_weights", {"update_info": info}, timeout_s=info["timeout_s"] + CALL_S)
        except _NoAnswerError:
            server.unheard = True  # it may have it, and would serve what it has cached of the version before
            raise

    def _end(self, server: Server, version: int, begun: float, reset: bool) -> None:
        try:
            if not server.reason:  # what fails here leaves it paused
                _call(server.url, "finish_weight_update", {"weight_version": str(version)})
                if reset:
                    running = "true" if self._pause == "keep" else "false"
                    _call(server.url, f"reset_prefix_cache?reset_running_requests={running}")
            if not (server.torn or server.unheard):
                _call(server.url, "resume")
        finally:
            server.paused_s = time.monotonic() - begun

    def close(self) -> None:
        """Leave the hub; the servers go on with what they have."""
        if self.publisher.rank == 0:
            for url in self.urls:
                try:
                    _call(url, "shutdown_weight_transfer_engine")
                except UpdateError as error:
                    log.warning("vLLM: %s", error)
        self.publisher.close()
        for thread in self._threads:
            thread.shutdown()

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _NoAnswerError(UpdateError):
    """What became of a request is not known."""


def _call(
    url: str, path: str, body: dict[str, Any] | None = None, *, get: bool = False, timeout_s: float = CALL_S
) -> Any:
    """What a route answers. Raises UpdateError with the URL and what the server has said, _NoAnswerError if it
    has said nothing that can be read."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise UpdateError(f"{url}: expected a URL of http or https")
    data = None if get else json.dumps(body if body is not None else {}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/{path}", data, headers)  # noqa: S310 - checked above
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310 - checked above
            return json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        try:
            text = error.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as cut:
            text = f"{type(cut).__name__}: {cut}"
        cure = "; is VLLM_SERVER_DEV_MODE=1 set?" if error.code == 404 else ""
        raise UpdateError(f"{url}/{path}: {error.code}: {text[:2000]}{cure}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _NoAnswerError(f"{url}/{path}: {type(error).__name__}: {error}") from error
