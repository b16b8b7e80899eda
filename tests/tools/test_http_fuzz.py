"""Whatever a client sends: an answer in the routes' form, never a 5xx; and what bounds a request."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import threading

import httpx
import pytest
import schemathesis
import torch
from fastapi import FastAPI, testclient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline import pipeline, versions_held, write_pipeline
from processes import free_address
from safetensors.torch import save
from schemathesis import GenerationMode

import weightbus
from weightbus.control.keys import generate, load_keys
from weightbus.hub.server import Hub
from weightbus.tools import cli
from weightbus.tools.http import app as http
from weightbus.tools.http import command as served_by

TestClient = functools.partial(testclient.TestClient, base_url="http://localhost")

# Of each route; WEIGHTBUS_FUZZ=1000 for a long run.
EXAMPLES = int(os.environ.get("WEIGHTBUS_FUZZ", "15"))


@contextlib.contextmanager
def living(modules, keys=None):
    """A hub and one server rank, in threads; gives the hub's address."""
    address = free_address()
    hub = Hub(address, keys=load_keys(keys) if keys else None)
    threads = [threading.Thread(target=hub.serve)]
    threads[0].start()
    subscriber = weightbus.Subscriber(modules, address=address, rank=0, replica_size=1, keys=keys)
    threads.append(threading.Thread(target=subscriber.serve))
    threads[1].start()
    try:
        yield address
    finally:
        subscriber.stop()
        threads[1].join()
        subscriber.close()
        hub.stop()
        threads[0].join()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    modules = pipeline()
    root = tmp_path_factory.mktemp("models")
    write_pipeline(root / "good", 2)
    with living(modules) as address:
        calls = http.Engine(pause=lambda mode: None, resume=lambda: None)
        bounds = {"max_body_bytes": 1 << 16, "wait_s": 2, "run_s": 5}
        app = http.create_app(address, roots=[root], engine=calls, hosts=["testserver"], **bounds)
        yield app, modules, root


def test_no_request_brings_a_5xx(engine):
    """Valid and invalid requests to every route of the OpenAPI page; reset weights are not healthy."""
    api = schemathesis.openapi.from_asgi("/openapi.json", engine[0])
    operations = [found.ok() for found in api.get_all_operations()]
    seen = set()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def ask(data):
        for operation in operations:
            mode = data.draw(st.sampled_from(GenerationMode))
            case = data.draw(operation.as_strategy(generation_mode=mode))
            response = case.call()
            seen.add((operation.path, response.status_code))
            assert response.status_code < 500 or operation.path == "/health", (case, response.text)
            assert response.headers["content-type"] == ["application/json"]

    ask()
    assert {path for path, _ in seen} == set(engine[0].openapi()["paths"])
    assert {status for path, status in seen if path != "/health"} >= {200, 400}


BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"module_names": ["\\ud800"]}',
    b'{"\\ud800": 1}',
    b'{"module_names": [1]}',
    b"\xff\xfe",
    b"[" * 10_000,
    b'{"module_names": ' + b"1" * 5000 + b"}",
    b'{"module_names": NaN}',
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_bodies_that_are_no_json_of_ours(engine, body):
    with TestClient(engine[0]) as client:
        answer = client.post(
            "/get_weights_checksum", content=body, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"success", "message"}


def test_a_request_is_bounded_with_or_without_its_length(engine):
    app, modules, _ = engine
    before = versions_held(modules, 0, 1)
    text = base64.b64encode(save({"norm.weight": torch.zeros(64)})).decode()
    body = json.dumps({"serialized_named_tensors": [text], "target_modules": ["x" * 70_000]}).encode()

    def pieces():
        for i in range(0, len(body), 1000):
            yield body[i : i + 1000]

    with TestClient(app) as client:
        for content in (body, pieces()):
            answer = client.post(
                "/update_weights_from_tensor", content=content, headers={"content-type": "application/json"}
            )
            assert (answer.status_code, answer.json()["success"]) == (413, False)
            assert "expected at most 65536 bytes" in answer.json()["message"]
    assert versions_held(modules, 0, 1) == before


@pytest.mark.parametrize(
    "path",
    ["../outside", "good/../../outside", "/etc", "good\x00", "nowhere", "good/vae/part-0.safetensors/x", "~"],
)
def test_paths_outside_the_roots(engine, path):
    app, _, root = engine
    (root.parent / "outside").mkdir(exist_ok=True)
    with TestClient(app) as client:
        answer = client.post("/update_weights_from_disk", json={"model_path": str(root / path)})
    assert answer.status_code == 400
    assert "expected " in answer.json()["message"]


def test_without_roots_nothing_is_loaded(engine):
    with TestClient(http.create_app("tcp://127.0.0.1:1")) as client:
        answer = client.post("/update_weights_from_disk", json={"model_path": "/"})
        assert (answer.status_code, "no roots" in answer.text) == (400, True)
        assert client.get("/health").status_code == 503
        assert "no hub listens" in client.post("/get_weights_checksum", json={}).json()["message"]


def test_the_shell_loads_and_says_how_it_ended(tmp_path, capsys):
    good = write_pipeline(tmp_path / "three", 3)
    with living(pipeline()) as address:
        assert cli.main(["update-from-disk", str(good), "--hub", address, "--version", "9"]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"verified load version 9 of {good} on 1 ranks in ")
        assert cli.main(["update-from-disk", str(good), "--hub", address, "--module", "unet"]) == 1
        said = capsys.readouterr().err
        assert "refused, nothing was written" in said
        assert "unet: expected a module among transformer, vae, text_encoder" in said
    assert cli.main(["update-from-disk", str(good), "--hub", "tcp://127.0.0.1:1"]) == 2
    assert "no hub answered at tcp://127.0.0.1:1" in capsys.readouterr().err


def test_with_keys_the_shell_loads_and_the_routes_answer(tmp_path, capsys, monkeypatch):
    good, keys = write_pipeline(tmp_path / "three", 3), tmp_path / "keys"
    generate(keys)
    served = []
    monkeypatch.setattr(served_by, "serve", lambda app, host, port: served.append(app))
    with living(pipeline(), keys) as address:
        load = ["update-from-disk", str(good), "--hub", address, "--keys", str(keys)]
        assert cli.main(load) == 0, capsys.readouterr().err
        assert cli.main(["http", "--hub", address, "--keys", str(keys)]) == 0
        with TestClient(served[0]) as client:
            assert client.get("/health").json()["message"] == "replica 0: 1 of 1 ranks, ready"
        monkeypatch.setattr("weightbus.tools.http.app.ANSWER_S", 1.0)
        with TestClient(http.create_app(address)) as client:  # without keys
            assert client.get("/health").status_code == 503


@pytest.mark.parametrize(
    "command", [["http"], ["update-from-disk", "/models"]], ids=["http", "update-from-disk"]
)
def test_to_other_hosts_the_shell_needs_keys(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(served_by, "serve", lambda app, host, port: None)
    monkeypatch.setattr("weightbus.tools.http.app.listens", lambda address: False)
    assert cli.main([*command, "--hub", "tcp://192.0.2.1:5757"]) == 2
    assert "address: expected a loopback address, or keys" in capsys.readouterr().err
    assert cli.main([*command, "--keys", str(tmp_path)]) == 2
    assert "expected hub.public and client.secret" in capsys.readouterr().err
    cli.main([*command, "--hub", "tcp://192.0.2.1:5757", "--insecure"])
    assert "expected a loopback address" not in capsys.readouterr().err


@pytest.mark.parametrize("given", [None, "Bearer ", "Bearer wrong", "Basic right", "right", "Bearer rightt"])
def test_a_wrong_token_opens_nothing(given):
    headers = {} if given is None else {"authorization": given}
    with TestClient(http.create_app("tcp://127.0.0.1:1", token="right")) as client:  # noqa: S106 - guards nothing
        for path in ("/get_weights_checksum", "/pause_generation"):
            assert client.post(path, json={}, headers=headers).status_code == 401
        assert client.get("/health", headers=headers).status_code == 401
        right = client.post("/pause_generation", json={}, headers={"authorization": "Bearer right"})
        assert right.status_code == 400
        assert "no engine is behind this server" in right.json()["message"]


def test_mounted_in_an_engines_app(engine):
    """The engine's own routes keep their own answers."""
    own = FastAPI()

    @own.post("/generate")
    def generate(prompt: str) -> str:
        return prompt

    with living(pipeline()) as address:
        own.include_router(http.router(address), prefix="/weights")
        with TestClient(own) as client:
            assert client.post("/weights/get_weights_checksum", json={"module_names": 3}).status_code == 400
            assert client.post("/generate").status_code == 422
            answer = client.post("/weights/get_weights_checksum", json={"module_names": ["vae"]})
            assert set(answer.json()) == {"vae"}


def test_an_engines_failing_callback_is_the_servers_fault():
    def broken(mode):
        raise RuntimeError("no scheduler")

    app = http.create_app("tcp://127.0.0.1:1", engine=http.Engine(pause=broken))
    with TestClient(app) as client:
        answer = client.post("/pause_generation", json={})
    assert (answer.status_code, answer.json()["message"]) == (
        500,
        "the engine's pause raised RuntimeError: no scheduler",
    )


def test_other_hosts_need_a_token(monkeypatch, capsys):
    monkeypatch.delenv(http.TOKEN_VARIABLE, raising=False)
    assert cli.main(["http", "--host", "0.0.0.0"]) == 2  # noqa: S104 - is refused
    assert "expected a loopback address, or a token in WEIGHTBUS_HTTP_TOKEN" in capsys.readouterr().err
    assert cli.main(["http", "--root", "/no/such/directory"]) == 2
    assert "/no/such/directory" in capsys.readouterr().err


def test_the_page_names_every_route(engine):
    page = engine[0].openapi()
    assert {path: set(methods) for path, methods in page["paths"].items()} == {
        **{
            path: {"post"}
            for path in (
                "/update_weights_from_disk",
                "/update_weights_from_tensor",
                "/update_weights_from_tensor_checker",
                "/get_weights_checksum",
                "/weights_checker",
                "/pause_generation",
                "/continue_generation",
                "/init_weights_update_group",
                "/update_weights_from_distributed",
            )
        },
        "/weight_version": {"get"},
        "/health": {"get"},
    }
    transport = httpx.ASGITransport(app=engine[0])
    assert transport is not None
    with TestClient(engine[0]) as client:
        assert client.get("/docs").status_code == 200
