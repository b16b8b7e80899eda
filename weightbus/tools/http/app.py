"""The weight routes of inference engines over HTTP, as SGLang names them: mounted in an app, or beside it.

Each request becomes a task at the hub, and is answered once all ranks of the replica have finished it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer

from weightbus import __version__
from weightbus.control import messages as m
from weightbus.control.client import Client
from weightbus.control.identity import address_of, job_of
from weightbus.control.keys import Keys, load_keys
from weightbus.control.start import listens
from weightbus.errors import HubError, SpecError
from weightbus.report import unproved_lines
from weightbus.storage.opened import Files
from weightbus.storage.payload import refuse_pickle
from weightbus.tools.http.guard import Access, Intake, Refusal
from weightbus.tools.http.route import _answer, _Route
from weightbus.tools.http.schema import (
    Answer,
    CheckTensors,
    CheckWeights,
    Continue,
    GetChecksum,
    Pause,
    Payload,
    UpdateFromDisk,
    UpdateFromTensor,
    WeightVersion,
)

DEFAULT_PORT = 5780

# A hub answers what it knows at once.
ANSWER_S = 5.0
QUICK_THREADS = 4
DEFAULT_BODY_BYTES = 512 << 20
TOKEN_VARIABLE = "WEIGHTBUS_HTTP_TOKEN"  # noqa: S105 - a name, no token


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What the routes ask of the engine whose app they are mounted in; None is answered by 400.

    pause: called with SGLang's mode (``abort``, ``retract``, ``in_place``). flush_cache: called after a load
    with ``flush_cache=true``; ranks can flush in ``on_commit`` instead.
    """

    pause: Callable[[str], object] | None = None
    resume: Callable[[], object] | None = None
    flush_cache: Callable[[], object] | None = None


def _call(name: str, callback: Callable[[], object]) -> None:
    try:
        callback()
    except Exception as error:
        raise Refusal(f"the engine's {name} raised {type(error).__name__}: {error}", 500) from error


def router(
    address: str | None = None,
    *,
    job: str | None = None,
    keys: Keys | str | os.PathLike[str] | None = None,
    insecure: bool = False,
    replica: int | None = None,
    token: str | None = None,
    hosts: Sequence[str] = (),
    roots: Sequence[str | Path] = (),
    engine: Engine | None = None,
    max_body_bytes: int = DEFAULT_BODY_BYTES,
    wait_s: float = 60.0,
    run_s: float = 600.0,
) -> APIRouter:
    """The routes, to mount: ``app.include_router(weightbus.http.router(address, roots=["/models"]))``.

    address: the hub's. job, keys, insecure: as the publisher's. replica: whose ranks they are for; None is the
    only one. token: asked for as a bearer token, if given; an empty one lets nobody in. hosts: names by which
    requests may call this host, beside localhost and addresses; with a token and no names any. roots:
    directories where a ``model_path`` may lie, links followed; with none, loads from disk are refused.
    max_body_bytes: of a request. wait_s: for updates and other requests to end; run_s: for each step of a load.
    Raises HubError for keys that are none, or an address that needs some; SpecError for a root that is none.
    """
    keys = keys if isinstance(keys, Keys) else load_keys(keys, insecure=insecure)
    hub, job_name = address_of(address), job_of(job)
    keys.check(hub)
    allowed = [os.path.abspath(root) for root in roots]
    for root in allowed:
        if not Path(root).is_dir():
            raise SpecError(f"{root}: expected a directory to load models from, got none")
    engine = engine or Engine()

    class Route(_Route):
        access = Access(token=token, hosts=tuple(hosts))
        intake = Intake(max_body_bytes)

    security = HTTPBearer(auto_error=False, description="needed if the server was given a token")
    responses: dict[int | str, dict[str, Any]] = {
        code: {"model": Answer, "description": text}
        for code, text in {
            400: "refused, nothing was changed; or failed, as the message says",
            401: "no token, or a wrong one",
            403: "from a page of another site, or under another name of this host",
            408: "the body came too slowly",
            413: "too large",
            415: "no JSON",
            503: "no hub answers, or too much is going on",
        }.items()
    }
    routes = APIRouter(route_class=Route, dependencies=[Depends(security)], responses=responses)

    def client() -> Client:
        if not listens(hub):
            raise HubError(f"no hub listens at {hub}")
        return Client(hub, job=job_name, keys=keys, timeout_s=ANSWER_S)

    def run(task: m.Task, frames: Sequence[m.Frame] = (), payloads: Sequence[bytes] = ()) -> m.TaskEnd:
        with client() as asking:
            return asking.run(task, wait_s=wait_s, run_s=run_s, frames=frames, payloads=payloads)

    def loaded(end: m.TaskEnd, what: str, flush: bool) -> JSONResponse:
        if not end.ok:
            head = f"{what} failed, ranks may hold a mixture" if end.moved else f"{what} was refused"
            return _answer(False, f"{head}: " + "; ".join(map(str, end.failures[:20])))
        if flush and engine.flush_cache is not None:
            _call("flush_cache", engine.flush_cache)
        label = "" if end.version is None else f", version {end.version}"
        head = f"{what}: {end.verdict} on {end.ranks} ranks in {end.seconds:.3f} s{label}"
        return _answer(True, "; ".join([head, *unproved_lines(end.partial)]))

    @routes.post("/update_weights_from_disk", response_model=Answer)
    def update_weights_from_disk(body: UpdateFromDisk) -> JSONResponse:
        """Load safetensors files into the live weights, all target modules or none."""
        if not allowed:
            raise Refusal("model_path: this server was given no roots to load from (--root)")
        with Files(allowed) as files:
            files.find(Path(body.model_path))  # ranks look again, when they open it
        task = m.LoadTask(
            replica=replica,
            path=os.path.abspath(body.model_path),
            modules=body.target_modules,
            version=_version(body.weight_version),
            roots=allowed,
        )
        return loaded(run(task), f"load of {body.model_path}", body.flush_cache)

    @routes.post("/update_weights_from_tensor", response_model=Answer)
    def update_weights_from_tensor(body: UpdateFromTensor) -> JSONResponse:
        """Write the named tensors of the request; others stay. Answered when all ranks have finished."""
        frames, payloads = _frames(body.serialized_named_tensors)
        task = m.LoadTask(
            replica=replica,
            modules=body.target_modules,
            version=_version(body.weight_version),
            format=body.load_format or "safetensors",
            partial=True,
        )
        return loaded(run(task, frames, payloads), "load of tensors", body.flush_cache)

    @routes.post("/update_weights_from_tensor_checker", response_model=Answer)
    def update_weights_from_tensor_checker(body: CheckTensors) -> JSONResponse:
        """Compare live tensors of a module with expected SHA-256 digests."""
        argument = json.dumps(body.expected_named_tensors_sha256).encode()
        task = m.ProbeTask(replica=replica, question="sha256", modules=[body.target_module], argument=argument)
        end = run(task)
        if not end.ok:
            return _answer(False, "; ".join(map(str, end.failures[:20])))
        from weightbus.digest.sha256.check import Sha256Verdict  # here, as it imports torch

        verdict = Sha256Verdict.merged(msgspec.json.decode(a, type=Sha256Verdict) for a in end.answers)
        return _answer(verdict.ok, str(verdict))

    @routes.post("/get_weights_checksum", response_model=dict[str, str])
    def get_weights_checksum(body: GetChecksum) -> JSONResponse:
        """SHA-256 of each module: of all ranks if they are equal, else of the ranks' digests in order."""
        end = run(m.ProbeTask(replica=replica, question="checksum", modules=body.module_names))
        if not end.ok:
            return _answer(False, "; ".join(map(str, end.failures[:20])))
        return JSONResponse(_checksums(end.answers))

    @routes.post("/weights_checker", response_model=Answer)
    def weights_checker(body: CheckWeights) -> JSONResponse:
        """Whether live weights have changed since a moment, on every rank."""
        question = "perturb" if body.action == "reset_tensors" else body.action
        end = run(m.ProbeTask(replica=replica, question=question))
        if not end.ok:
            return _answer(False, "; ".join(map(str, end.failures[:20])))
        found = [json.loads(answer) for answer in end.answers]
        texts = [f"rank {rank}: {one['text']}" for rank, one in enumerate(found)]
        return _answer(all(one["ok"] for one in found), f"{body.action}: " + "; ".join(texts))

    @routes.post("/pause_generation", response_model=Answer)
    def pause_generation(body: Pause | None = None) -> JSONResponse:
        """Ask the engine to pause."""
        if engine.pause is None:
            raise Refusal(
                "pause_generation: no engine is behind this server; mount the routes in the engine's app"
            )
        _call("pause", lambda: engine.pause and engine.pause((body or Pause()).mode))
        return _answer(True, "paused")

    @routes.post("/continue_generation", response_model=Answer)
    def continue_generation(body: Continue | None = None) -> JSONResponse:
        """Ask the engine to go on."""
        if engine.resume is None:
            raise Refusal(
                "continue_generation: no engine is behind this server; mount the routes in the engine's app"
            )
        _call("resume", engine.resume)
        return _answer(True, "continued")

    # In threads of their own, so that they answer while all others are at work.
    quick = CapacityLimiter(QUICK_THREADS)

    @routes.get("/weight_version", response_model=WeightVersion)
    async def weight_version() -> JSONResponse:
        """The label of the live weights: the trainer's version, or a load's; null if there is none."""
        version = (await to_thread.run_sync(info, limiter=quick)).version
        return JSONResponse({"weight_version": None if version is None else str(version)})

    @routes.get("/health", response_model=Answer)
    async def health() -> JSONResponse:
        """200 if all ranks of the replica are here and their weights are no mixture, else 503."""
        found = await to_thread.run_sync(info, limiter=quick)
        ok = found.joined == found.size and found.state != "torn"
        text = f"replica {found.replica}: {found.joined} of {found.size} ranks, {found.state}"
        return _answer(ok, text, 200 if ok else 503)

    def info() -> m.ReplicaInfo:
        with client() as asking:
            known = asking.replicas().replicas
        found = [one for one in known if replica is None or one.replica == replica]
        if len(found) != 1:
            text = (
                f"replica: expected {'one' if replica is None else replica}, got {[r.replica for r in known]}"
            )
            raise Refusal(text, 503)
        return found[0]

    def cured() -> JSONResponse:
        """Always 400, with the cure."""
        return _answer(
            False,
            "weights over a process group come from a weightbus Publisher, which needs no such call: "
            "weightbus.Publisher(model).update(version)",
        )

    for path in ("/init_weights_update_group", "/update_weights_from_distributed"):
        routes.add_api_route(path, cured, methods=["POST"], response_model=Answer, name=path[1:])
    return routes


def create_app(address: str | None = None, **options: Any) -> FastAPI:
    """An app with nothing but the routes, and an OpenAPI page at ``/docs``. options: as of ``router``."""
    app = FastAPI(title="weightbus", version=__version__, summary="Weights of running inference servers")
    app.include_router(router(address, **options))
    return app


def _frames(payloads: Sequence[Payload]) -> tuple[list[m.Frame], list[bytes]]:
    """Raw frames for a request's payloads. Raises Refusal for what is no base64, or a pickle."""
    frames, found = [], []
    for place, payload in enumerate(payloads):
        named = [(None, payload)] if isinstance(payload, str) else list(payload.items())
        if not named:
            raise Refusal(f"serialized_named_tensors.{place}: expected a payload for a module, got none")
        for module, text in named:
            where = f"serialized_named_tensors.{place}" + (f".{module}" if module else "")
            try:
                data = base64.b64decode(text.encode("ascii"), validate=True)
            except (binascii.Error, UnicodeEncodeError) as error:
                raise Refusal(f"{where}: expected base64 of a payload, got {error}") from error
            refuse_pickle(where, data)
            if len(data) > m.MAX_MESSAGE_BYTES:
                raise Refusal(f"{where}: expected at most {m.MAX_MESSAGE_BYTES} bytes, got {len(data)}")
            frames.append(m.Frame(place=place, module=module, nbytes=len(data)))
            found.append(data)
    return frames, found


def _version(given: int | str | None) -> int | None:
    return None if given is None else int(given)


def _checksums(answers: Sequence[bytes]) -> dict[str, str]:
    """Of each module the ranks' common digest, or the digest of theirs, a line each, in order."""
    of_ranks: list[dict[str, str]] = [json.loads(answer) for answer in answers]
    found = {}
    for module in of_ranks[0]:
        digests = [digests[module] for digests in of_ranks]
        joined = "\n".join(digests).encode()
        found[module] = digests[0] if len(set(digests)) == 1 else hashlib.sha256(joined).hexdigest()
    return found
