"""Pages in browsers, tokens, slow and half-open requests, and bodies that cost more than they are long."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import threading
import time
import tracemalloc
from types import MappingProxyType

import httpx
import pytest
import uvicorn
from fastapi import testclient
from hypothesis import given
from hypothesis import strategies as st
from processes import free_port

from weightbus.tools import cli
from weightbus.tools.http import app as http
from weightbus.tools.http import guard as http_guard
from weightbus.tools.http import server as http_server
from weightbus.tools.http.guard import Access, Intake, Refusal

NO_HUB = "tcp://127.0.0.1:1"
CALLS: list[str] = []


def app(**options):
    engine = http.Engine(pause=CALLS.append, resume=lambda: CALLS.append("resume"))
    return http.create_app(NO_HUB, engine=engine, **options)


@contextlib.contextmanager
def serving(application, **settings):
    """A real server on a port of its own, as the shell starts it."""
    port = free_port()
    config = uvicorn.Config(
        application, port=port, log_level="error", http=http_server.PatientProtocol, **settings
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def web():
    with serving(app()) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        yield client


@pytest.fixture(autouse=True)
def calls():
    CALLS.clear()
    return CALLS


FOREIGN = [
    {"origin": "http://elsewhere.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1"},  # another port of this host
    {"origin": "http://127.0.0.1:1"},
    {"origin": ""},
    {"origin": "http://[broken"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    {"sec-fetch-site": "anything"},
    {"host": "elsewhere.example"},
    {"host": "elsewhere.example:5780", "origin": "http://elsewhere.example:5780"},
    {"host": "localhost.elsewhere.example"},
    {"host": "127.0.0.1.elsewhere.example"},
    {"host": "localhost:80@elsewhere.example"},
    {"host": "2130706433.example"},
    {"host": "[::1"},
]
BODIES = [
    {},
    {"content": b'{"mode": "abort"}', "headers": {"content-type": "text/plain"}},
    {"content": b'{"mode": "abort"}', "headers": {"content-type": "application/json"}},
    {"content": b"mode=abort", "headers": {"content-type": "application/x-www-form-urlencoded"}},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=range(len(FOREIGN)))
@pytest.mark.parametrize("body", BODIES, ids=["no body", "text", "JSON", "form"])
def test_no_page_of_another_site_asks_for_anything(web, headers, body):
    sent = {**body, "headers": {**body.get("headers", {}), **headers}}
    for path in ("/pause_generation", "/weights_checker", "/update_weights_from_tensor"):
        answer = web.post(path, **sent)
        assert answer.status_code == 403, answer.text
        assert answer.json()["success"] is False
        assert "access-control-allow-origin" not in answer.headers
    for path in ("/health", "/weight_version"):
        assert web.get(path, headers=headers).status_code == 403
    assert CALLS == []


def test_programs_and_pages_of_this_server_are_heard(web):
    own = str(web.base_url).rstrip("/")
    for headers in (
        {},
        {"origin": own, "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {"host": "localhost:5780"},
        {"host": "LOCALHOST"},
        {"host": "[::1]:5780"},
        {"host": "192.0.2.7:5780"},
        {"host": "localhost:5780", "origin": "http://localhost:5780"},
    ):
        answer = web.post("/pause_generation", json={"mode": "retract"}, headers=headers)
        assert answer.status_code == 200, (headers, answer.text)
    assert set(CALLS) == {"retract"}
    assert web.post("/pause_generation").status_code == 200  # without a body, as the page says
    assert CALLS[-1] == "abort"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
def test_bodies_are_json_by_their_type(web, kind):
    request = web.build_request("POST", "/pause_generation", content=b'{"mode": "abort"}')
    if kind:
        request.headers["content-type"] = kind
    answer = web.send(request)
    assert (answer.status_code, CALLS) == (415, [])
    assert "expected application/json" in answer.json()["message"]


def test_names_of_this_host_can_be_told():
    with testclient.TestClient(app(hosts=["engine-0.svc"]), base_url="http://engine-0.svc:5780") as client:
        assert client.post("/pause_generation").status_code == 200
        assert client.post("/pause_generation", headers={"host": "engine-1.svc"}).status_code == 403
        assert client.post("/pause_generation", headers={"host": "localhost"}).status_code == 200


def test_with_a_token_any_name_is_good_and_a_page_is_not():
    headers = {"authorization": "Bearer right"}
    served = app(token="right")  # noqa: S106 - guards nothing
    with testclient.TestClient(served, base_url="http://engine-0.svc:5780") as client:
        assert client.post("/pause_generation", headers=headers).status_code == 200
        assert client.post("/pause_generation").status_code == 401
        answer = client.post("/pause_generation", headers=headers | {"origin": "http://elsewhere.example"})
        assert answer.status_code == 403


@pytest.mark.parametrize("token", ["", " ", "\t\n"])
def test_an_empty_token_lets_nobody_in(token, monkeypatch, capsys):
    with testclient.TestClient(app(token=token), base_url="http://localhost") as client:
        for given_token in (None, "Bearer", "Bearer ", f"Bearer {token}", "Bearer None"):
            headers = {} if given_token is None else {"authorization": given_token.strip("\n")}
            answer = client.post("/pause_generation", headers=headers)
            assert answer.status_code == 401
            assert "empty token" in answer.json()["message"]
    monkeypatch.setenv(http.TOKEN_VARIABLE, token)
    assert cli.main(["http"]) == 2
    assert "WEIGHTBUS_HTTP_TOKEN: expected a token, got an empty one" in capsys.readouterr().err


@given(st.dictionaries(st.sampled_from(["host", "origin", "sec-fetch-site", "authorization"]), st.text()))
def test_any_headers_are_let_in_or_refused(headers):
    with_token = Access(token="right")  # noqa: S106 - guards nothing
    for access in (Access(token=None), with_token, Access(token=None, hosts=("name",))):
        with contextlib.suppress(Refusal):
            access.check(headers)


# -- bodies ------------------------------------------------------------------------------------------


def numbered(count):
    return {str(number): 0 for number in range(count)}


COSTLY = {
    "wrong values": {"target_module": "m", "expected_named_tensors_sha256": numbered(200_000)},
    "more of them": {"target_module": "m", "expected_named_tensors_sha256": numbered(400_000)},
    "wrong list": {"target_module": "m", "expected_named_tensors_sha256": [0] * 250_000},
    "fields": numbered(200_000),
    "objects": [{}] * 400_000,
    "long name": {"x" * 4_000_000: 0},
    "long value": {"target_module": "x" * 4_000_000},
}


@pytest.mark.parametrize("what", COSTLY)
def test_a_wrong_body_costs_little_more_than_its_length(what):
    """Where pydantic would make an error of each value, at a kilobyte each."""
    text = json.dumps(COSTLY[what]).encode()
    with testclient.TestClient(app(), base_url="http://localhost") as client:
        post = lambda body: client.post(  # noqa: E731
            "/update_weights_from_tensor_checker", content=body, headers={"content-type": "application/json"}
        )
        post(b"{}")  # what is loaded at first use
        gc.collect()
        tracemalloc.start()
        try:
            answer = post(text)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert answer.status_code in (400, 413)
    assert len(answer.content) < 4096
    assert peak < 60 * 2**20


def test_bodies_are_bounded_all_together():
    """Each is small enough; what is held of all is not."""
    intake = Intake(100)

    async def read(pieces):
        taken = []
        iterator = iter(pieces)

        class Asked:
            headers = MappingProxyType({"content-type": "application/json"})

            @staticmethod
            async def receive():
                piece, more = next(iterator)
                return {"type": "http.request", "body": piece, "more_body": more}

        intake.enter()
        try:
            return await intake.read(Asked(), taken), taken
        except Refusal as refusal:
            return refusal.status, taken

    first = asyncio.run(read([(b"1" * 50, True), (b"1" * 40, False)]))
    assert first[0] == b"1" * 90
    second = asyncio.run(read([(b"1" * 100, False)]))
    assert second[0] == b"1" * 100
    third = asyncio.run(read([(b"1" * 11, False)]))
    assert third[0] == 503
    assert asyncio.run(read([(b"1" * 101, False)]))[0] == 413
    for _, taken in (first, third):
        intake.leave(sum(map(len, taken)))
    assert asyncio.run(read([(b"1" * 80, False)]))[0] == b"1" * 80


def test_so_many_requests_at_a_time(monkeypatch):
    """More are refused at once; health is answered while all are going on."""
    monkeypatch.setattr(http_guard, "MAX_REQUESTS", 3)
    going, ending = threading.Semaphore(0), threading.Event()

    def pause(mode):
        going.release()
        assert ending.wait(30)

    application = http.create_app(NO_HUB, engine=http.Engine(pause=pause))
    with serving(application) as port:
        url = f"http://127.0.0.1:{port}"
        threads = [threading.Thread(target=httpx.post, args=(f"{url}/pause_generation",)) for _ in range(3)]
        try:
            for thread in threads:
                thread.start()
                assert going.acquire(timeout=20)
            answer = httpx.post(f"{url}/pause_generation")
            assert (answer.status_code, "at most 3 requests" in answer.text) == (503, True)
            assert "no hub listens" in httpx.get(f"{url}/health").json()["message"]
        finally:
            ending.set()
            for thread in threads:
                thread.join()
        ending.set()
        assert httpx.post(f"{url}/pause_generation").status_code == 200


# -- clients that are slow ---------------------------------------------------------------------------


def connect(port, data=b""):
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(data)
    return connection


HEAD = b"POST /pause_generation HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    "sent", [b"", b"GET", HEAD, b"GET /docs HTTP/1.1\r\nhost: localhost\r\n\r\nGET"], ids=range(4)
)
def test_a_half_open_connection_is_closed(sent, monkeypatch):
    monkeypatch.setattr(http_server, "HEAD_S", 0.3)
    reset = contextlib.suppress(ConnectionResetError)
    with serving(app(), timeout_keep_alive=60) as port, connect(port, sent) as connection, reset:
        while connection.recv(1 << 16):
            pass
    assert CALLS == []


@pytest.mark.parametrize("trickle", [False, True])
def test_a_body_that_comes_slowly_is_answered(trickle, monkeypatch):
    monkeypatch.setattr(http_guard, "PAUSE_S", 0.4)
    head = HEAD + b"content-length: 1000\r\n\r\n"
    with serving(app()) as port, connect(port, head) as connection:
        begun = time.monotonic()
        connection.settimeout(0.05)
        answer = b""
        while b"}" not in answer and time.monotonic() < begun + 20:
            with contextlib.suppress(TimeoutError):
                answer += connection.recv(1 << 16)
            if trickle and not answer:
                connection.sendall(b" ")  # never a pause as long as the bound
    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.rpartition(b"\r\n")[2])["success"] is False


def test_connections_that_say_nothing_do_not_starve_health(monkeypatch):
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 8)
    with serving(app()) as port, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(port, HEAD * (i % 2))) for i in range(30)]
        answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=20)
        assert "no hub listens" in answer.json()["message"]
        gone = 0
        for connection in silent:
            connection.settimeout(0.01)
            try:
                gone += connection.recv(1) == b""
            except ConnectionResetError:
                gone += 1
            except TimeoutError:
                pass  # one of those that are left
        assert len(silent) - 8 <= gone < len(silent)


def test_a_request_that_is_served_does_not_give_way(monkeypatch):
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 4)
    monkeypatch.setattr(http_server, "HEAD_S", 0.3)
    going, ending = threading.Event(), threading.Event()

    def pause(mode):
        going.set()
        assert ending.wait(30)

    application = http.create_app(NO_HUB, engine=http.Engine(pause=pause))
    with serving(application) as port, contextlib.ExitStack() as stack:
        answers = []
        url = f"http://127.0.0.1:{port}/pause_generation"
        thread = threading.Thread(target=lambda: answers.append(httpx.post(url, timeout=30).status_code))
        thread.start()
        assert going.wait(20)
        for _ in range(12):
            stack.enter_context(connect(port, b"GET"))
        time.sleep(0.5)  # past the time for a head
        ending.set()
        thread.join()
    assert answers == [200]
