"""Metrics: what Prometheus reads, and a server that no connection holds up."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families as parsed

from weightbus.control import client_messages as a
from weightbus.errors import HubError
from weightbus.tools import metrics

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


def status(ranks=2, name="replica 0 server rank"):
    peers = [
        a.PeerStatus(
            rank=f"{name} {rank}",
            replica=0,
            host="h",
            pid=1,
            device="cpu",
            state="ready",
            version=7,
            heard_s=0.0,
        )
        for rank in range(ranks)
    ]
    past = a.Past(
        kind="update", version=7, epoch=1, planned=True, began=1.7e9, seconds=0.25, verdict="verified",
        nbytes=8, servers=2, failures=[], phases={}, ranks=[],
    )  # fmt: skip
    return a.Status(
        id="i", hub="h", weightbus="0", up_s=1.0, version=7, paused_s=0.0, peers=peers, incomplete=[], phase="",
        missing=[], requests=0, counts={"messages": 12345678901, "refused": 0}, jobs=[], past=[past],
    )  # fmt: skip


@contextlib.contextmanager
def serving(ask):
    with metrics.serve_metrics(ask, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_address
        finally:
            server.shutdown()
            thread.join(10)


def scrape(address, timeout=30):
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/metrics", timeout=timeout) as page:
        return page.read().decode()


def test_a_parser_reads_what_the_status_says():
    found = {family.name: family for family in parsed(metrics.prometheus_text(status()))}
    assert [s.value for s in found["weightbus_version"].samples] == [7]
    assert [s.labels["rank"] for s in found["weightbus_server_version"].samples] == [
        "replica 0 server rank 0",
        "replica 0 server rank 1",
    ]
    total = {s.labels["what"]: (s.name, s.value) for s in found["weightbus_hub"].samples}
    assert total["messages"] == ("weightbus_hub_total", 12345678901)
    assert found["weightbus_hub"].type == "counter"
    (last,) = found["weightbus_last_seconds"].samples
    assert (last.labels, last.value) == ({"kind": "update", "verdict": "verified"}, 0.25)


def test_connections_that_are_silent_or_read_nothing_hold_up_nobody(monkeypatch):
    monkeypatch.setattr(metrics, "SILENT_S", 60.0)
    long = status(8192, "x" * 1000)  # more than a connection's buffers take
    with serving(lambda: long) as address, contextlib.ExitStack() as stack:
        for sent in (b"", REQUEST[:9], REQUEST, REQUEST):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(address)
            connection.sendall(sent)
        assert scrape(address).count("weightbus_server_version{") == 8192


@pytest.mark.parametrize("sent", [b"", REQUEST[:9], REQUEST])
def test_a_connection_that_stays_silent_is_closed(monkeypatch, sent):
    monkeypatch.setattr(metrics, "SILENT_S", 0.2)
    long = status(8192, "x" * 1000)
    with serving(lambda: long) as address, socket.create_connection(address, timeout=30) as connection:
        connection.sendall(sent)
        time.sleep(1.5)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(1 << 20):
                pass


def test_the_hub_is_asked_by_one_at_a_time_and_no_more_than_need_be(monkeypatch):
    monkeypatch.setattr(metrics, "FRESH_S", 60.0)
    asked = []

    def ask():
        asked.append(1)
        time.sleep(0.2)
        return status()

    with serving(ask) as address, ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(lambda _: scrape(address), range(32)))) == 1
    assert len(asked) == 1


def test_why_there_are_none_is_said():
    def ask():
        raise HubError("no hub answered at <b>\r\nSet-Cookie: a=b")

    with serving(ask) as address:
        with pytest.raises(urllib.error.HTTPError) as error:
            scrape(address)
        with error.value as page:
            assert page.code == 503
            assert page.headers["Set-Cookie"] is None
            assert "no hub answered at &lt;b&gt;" in page.read().decode()
