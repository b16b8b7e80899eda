"""Several servers of vLLM's routes: one that fails is left out and says so, the others go on."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch
from processes import Job, free_port, run_jobs
from torch import nn

import weightbus
from weightbus.engines.receiver import Receiver
from weightbus.engines.vllm import Servers, servers
from weightbus.engines.vllm.gate import TORN


def model():
    made = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(made.weight)
    return made


class Served:
    """What stands behind the routes of one server; ``calls`` are its paths, in order."""

    def __init__(self, fails):
        self.model, self.calls, self.receiver = model(), [], None
        self.cut = [name.removeprefix("cut ") for name in fails if name.startswith("cut ")]
        self.fails = [name for name in fails if not name.startswith("cut ")]

    def take(self, path, body):
        name, _, query = path.strip("/").partition("?")
        self.calls.append(path.strip("/"))
        if f"{name} later" in self.fails:
            self.fails[self.fails.index(f"{name} later")] = name  # the next time
        elif name in self.fails:
            self.fails.remove(name)
            raise weightbus.UpdateError(f"planted in {name}")
        if name == "get_world_size":
            return {"world_size": 1}
        if name == "init_weight_transfer_engine":
            info = body["init_info"]
            self.receiver = Receiver(
                self.model, address=info["address"], rank=0, replica_size=1, replica=info["replica"]
            )
        elif name == "start_weight_update":
            self.receiver.start()
            if "tear" in self.fails:
                self.fails.remove("tear")
                self.receiver.subscriber._destination.audit.derive = self.broken
        elif name == "update_weights":
            info = body["update_info"]
            if info.get("check") and "flip" in self.fails:
                self.fails.remove("flip")
                self.model.weight.data.view(torch.int32)[2, 1] ^= 1
            try:
                self.receiver.check(info["timeout_s"]) if info.get("check") else self.receiver.receive(**info)
            except weightbus.TornError as error:
                raise weightbus.TornError(f"{TORN}: {error}") from error
        elif name == "finish_weight_update":
            self.receiver.finish()
        return {"query": query}

    def broken(self, *args, **kwargs):
        del self.receiver.subscriber._destination.audit.derive
        raise RuntimeError("planted in mid-update")


def serve(rank, size, port, fails):
    """Answers until the transfer is shut down. Its calls, and what it holds at the end."""
    served = Served(list(fails))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            try:
                status, answer = 200, served.take(self.path, body)
            except weightbus.WeightbusError as error:
                status, answer = 500, str(error)
            self.send_response(status)
            if self.path.strip("/") in served.cut:
                served.cut.remove(self.path.strip("/"))
                self.send_header("Content-Length", "1000")  # and less comes
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", port), Handler) as server:
        while "shutdown_weight_transfer_engine" not in served.calls:
            server.handle_request()
    held = served.model.weight[0, 0].item()
    if served.receiver is not None:
        served.receiver.close()
    return served.calls, held


def train(rank, size, address, urls, versions):
    """What each update, or check for a version of None, gave."""
    source, said = model(), []
    with Servers(source, urls, address=address, rank=rank, size=size, ready_timeout_s=5) as servers:
        for version in versions:
            if version is None:
                try:
                    verdict = servers.check()
                except weightbus.UpdateError as error:
                    said.append((type(error).__name__, str(error)))
                    continue
                rows = [(one.reason, one.torn, one.paused_s) for one in verdict.servers]
                said.append((verdict.verdict.word, rows, [str(one) for one in verdict.verdict.mismatches]))
                continue
            with torch.no_grad():
                source.weight.fill_(version)
            try:
                report = servers.update(version)
                rows = [(one.reason, one.torn, one.paused_s) for one in report.servers]
                said.append((report.report.word, rows, len(report.report.left_out)))
            except weightbus.WeightbusError as error:
                said.append((type(error).__name__, str(error)))
    return said


def run(address, *fails, trainers=1, versions):
    ports = [free_port() for _ in fails]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    servers = [Job(run=serve, arguments={"port": p, "fails": f}) for p, f in zip(ports, fails, strict=True)]
    arguments = {"address": address, "urls": urls, "versions": versions}
    trainer = Job(run=train, size=trainers, arguments=arguments)
    said, *rows = run_jobs(trainer, *servers, timeout_s=90)
    return said, [row[0] for row in rows]


UPDATE = [
    "pause?mode=keep",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "reset_prefix_cache?reset_running_requests=true",
    "resume",
]


def test_two_servers_and_two_trainer_ranks(address):
    said, rows = run(address, [], [], trainers=2, versions=[1, 2])
    assert [[word for word, *_ in rank] for rank in said] == [["verified"] * 2] * 2
    assert [len(rows) for _, rows, _ in said[1]] == [0, 0]
    for calls, held in rows:
        assert calls[2:-1] == ["init_weight_transfer_engine", *UPDATE, *UPDATE]
        assert held == 2
    assert all(not reason and 0 < paused_s < 30 for _, rows, _ in said[0] for reason, _, paused_s in rows)


def test_a_server_that_does_not_start_is_left_out_and_serves_the_old_version(address):
    said, ((calls, held), (_, other)) = run(address, ["start_weight_update"], [], versions=[1])
    ((word, rows, left_out),) = said[0]
    assert (word, left_out) == ("verified", 1)
    assert "planted in start_weight_update" in rows[0][0]
    assert (rows[0][1], rows[1][0]) == (False, "")
    assert "update_weights" not in calls
    assert "finish_weight_update" not in calls
    assert calls[-2] == "resume"
    assert (held, other) == (0, 1)


def test_a_server_that_the_hub_leaves_out_is_told_so_at_once(address):
    """It has failed to start, so the next update may go without it, although it waits."""
    said, ((calls, held), (_, other)) = run(address, ["start_weight_update"], [], versions=[1, 2])
    _, (word, rows, left_out) = said[0]
    reason, torn, paused_s = rows[0]
    assert (word, torn, other) == ("verified", False, 2)
    assert paused_s < 20
    if left_out:
        assert "version 2 was committed without this replica" in reason
        assert held == 0
    else:
        assert (reason, held) == ("", 2)
    assert calls[-2] == "resume"


def test_all_that_do_not_start_refuse_the_update_on_every_trainer_rank(address):
    said, rows = run(address, ["start_weight_update"], trainers=2, versions=[1, 2])
    for rank in said:
        (kind, text), (word, *_) = rank
        assert (kind, word) == ("UpdateError", "verified")
        assert "planted in start_weight_update" in text
    assert rows[0][1] == 2


def test_a_torn_server_stays_paused_until_the_next_update(address):
    said, ((calls, held),) = run(address, ["tear"], versions=[1, 2])
    (kind, text), (word, rows, _) = said[0]
    assert (kind, word) == ("TornError", "verified")
    assert "planted in mid-update" in text
    assert calls[3:-1] == [*UPDATE[:3], *UPDATE]
    assert (rows[0][:2], held) == (("", False), 2)


@pytest.mark.parametrize("step", ["reset_prefix_cache", "finish_weight_update"])
def test_what_fails_at_the_end_leaves_it_paused(step, address):
    said, ((calls, _),) = run(address, [step], versions=[1])
    ((_, rows, _),) = said[0]
    assert f"planted in {step}" in rows[0][0]
    assert "resume" not in calls


def test_a_check_that_finds_all_well(address):
    said, ((calls, _),) = run(address, [], trainers=2, versions=[1, None, 2])
    assert [[word for word, *_ in rank] for rank in said] == [["verified"] * 3] * 2
    check = [*UPDATE[:4], "resume"]
    assert calls[3:-1] == [*UPDATE, *check, *UPDATE]


def test_a_server_that_holds_other_bytes_stays_paused_and_others_go_on(address):
    said, ((bad, _), (good, _)) = run(address, ["flip"], [], versions=[1, None, 2])
    _, (word, rows, found), (last, *_) = said[0]
    assert (word, last) == ("mismatch", "verified")
    assert [torn for _, torn, _ in rows] == [True, False]
    assert len(found) == 1
    assert found[0].startswith("weight: ")
    assert "replica 0 server rank 0" in found[0]
    assert "2" in found[0], "the row"
    check = [*UPDATE[:4], "resume"]
    assert bad[3:-1] == [*UPDATE, *check[:3], *UPDATE]
    assert good[3:-1] == [*UPDATE, *check, *UPDATE]


def test_a_check_before_an_update_is_refused_before_servers_are_paused(address):
    said, ((calls, _),) = run(address, [], versions=[None])
    assert "check: expected a version committed by update" in said[0][0][1]
    assert "pause?mode=keep" not in calls


def test_a_server_of_whose_update_nothing_is_known_stays_paused(address):
    """It may have it, and would go on with what it has cached of the version before."""
    said, ((cut, _), (good, _)) = run(address, ["cut update_weights"], [], versions=[1, 2])
    (word, rows, _), (last, after, _) = said[0]
    assert (word, last) == ("verified", "verified")
    assert "IncompleteRead" in rows[0][0]
    assert rows[1][0] == after[0][0] == ""
    assert cut[3:-1] == [*UPDATE[:3], *UPDATE]
    assert good[3:-1] == [*UPDATE, *UPDATE]


@pytest.mark.parametrize("step", ["pause?mode=keep", "start_weight_update"])
def test_an_answer_that_is_cut_before_the_update_leaves_that_server_out_and_resumes_it(step, address):
    said, ((cut, _), (good, _)) = run(address, [f"cut {step}"], [], versions=[1])
    ((word, rows, _),) = said[0]
    assert word == "verified"
    assert "IncompleteRead" in rows[0][0]
    assert rows[1][0] == ""
    assert cut[-2] == good[-2] == "resume"


def test_a_check_that_no_server_begins_is_refused_on_every_trainer_rank(address):
    """And is no update: the version that they hold stays what it was."""
    said, ((calls, held),) = run(address, ["start_weight_update later"], trainers=2, versions=[1, None, 2])
    for rank in said:
        (first, *_), (kind, text), (last, *_) = rank
        assert (first, kind, last) == ("verified", "UpdateError", "verified")
        assert "planted in start_weight_update" in text
    assert calls[-2] == "resume"
    assert held == 2


@pytest.mark.parametrize("kind", ["update", "check"])
def test_an_interrupt_before_the_call_leaves_no_server_paused(kind, monkeypatch):
    """They go on first; then the other trainer ranks, which are calling it, are told."""
    told: list[str] = []

    def call(url, path, *arguments, **more):
        if (url, path) == ("b", "start_weight_update"):
            raise KeyboardInterrupt
        told.append(f"{url} {path}")

    monkeypatch.setattr(servers, "_call", call)
    both = object.__new__(Servers)
    both.urls, both._pause, both._pause_s = ["a", "b"], "keep", 1.0
    both._threads = [ThreadPoolExecutor(1) for _ in both.urls]
    both.publisher = SimpleNamespace(rank=0, refuse=lambda version, why, kind: told.append(f"{kind} {why}"))
    with pytest.raises(KeyboardInterrupt):
        both._beside(kind, lambda: told.append("called"), 3, {}, False)
    assert "called" not in told
    assert {"a resume", "b resume"} <= set(told[:-1])
    assert told[-1] == f"{kind} KeyboardInterrupt"
