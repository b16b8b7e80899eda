"""``vllm serve`` over its HTTP routes: updated by its own client and by ours; refused; torn; whole again."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request

import pytest
import tiny
from processes import free_address, free_port
from processes_of_vllm import ended, engine, environment, started
from run_engine import PROMPTS

import weightbus
from weightbus.engines.vllm import Servers

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.release,
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(500),
]

KIND = "qwen3"


def get(url, body=None, timeout=60):
    """Status and text of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - our server's
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310 - as above
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@contextlib.contextmanager
def server(folder, name, *options, tp=1):
    """The URL of a server with version 0, once it is up."""
    port, log = free_port(), folder / f"{name}.log"
    arguments = [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", tiny.save(folder, KIND, 0)),
        *("--host", "127.0.0.1", "--port", port, "--skip-tokenizer-init", "--enforce-eager"),
        *("--max-model-len", 128, "--dtype", "bfloat16", "--worker-extension-cls", "live.Live"),
        *(
            "--tensor-parallel-size",
            tp,
            "--enable-scale-out",
            "--weight-transfer-config",
            '{"backend":"weightbus"}',
        ),
    ]
    env = environment(tp, VLLM_SERVER_DEV_MODE="1", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    with started(*arguments, *options, log=log, env=env) as process:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 150
        while time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()[-6000:]
            with contextlib.suppress(OSError):
                if get(f"{url}/health", timeout=5)[0] == 200:
                    break
            time.sleep(0.5)
        yield url


def said(url):
    """Tokens and logprobs that it gives for the prompts, and all tensors that each of its workers holds."""
    rows = []
    for prompt in PROMPTS:
        sampling = {"max_tokens": 8, "temperature": 0, "logprobs": 0}
        body = {"token_ids": prompt, "sampling_params": sampling}
        status, text = get(f"{url}/inference/v1/generate", body)
        assert status == 200, text
        rows.append(json.loads(text)["choices"][0])
    logprobs = [[one["logprob"] for one in row["logprobs"]["content"]] for row in rows]
    status, text = get(f"{url}/collective_rpc", {"method": "live_tensors"})
    assert status == 200, text
    return [row["token_ids"] for row in rows], logprobs, json.loads(text)["results"]


def test_over_http(tmp_path):
    """By vLLM's own client, then by a restarted trainer, refused, torn, and whole again; like a fresh load."""
    with server(tmp_path, "server") as url:
        log = tmp_path / "client.log"
        address, versions = free_address(), "1,2,3,4,5"
        with started("run_client.py", KIND, address, url, versions, log=log, env=environment()) as client:
            assert ended(client, log, 120).count("verified version") == 5
        by_client = said(url)
        assert json.loads(get(f"{url}/weight_info")[1]) == {"weight_version": "5"}

        model = tiny.fill(tiny.build(KIND), 6)
        with Servers(model, [url], address=free_address()) as servers:
            report = servers.update(1)
            assert (report.report.word, report.servers[0].reason) == ("verified", ""), report
            by_servers = said(url)
            assert 0 < report.servers[0].paused_s < 20
            assert json.loads(get(f"{url}/weight_info")[1]) == {"weight_version": "1"}

            assert get(f"{url}/collective_rpc", {"method": "break_update"})[0] == 200
            tiny.fill(model, 7)
            with pytest.raises(weightbus.TornError, match="planted by a test"):
                servers.update(2)
            generate = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 2}}
            for path, body in (("health", None), ("inference/v1/generate", generate)):
                status, text = get(f"{url}/{path}", body)
                assert status == 503, (path, text)
                assert "weightbus: torn" in text
            status, text = get(f"{url}/resume", {})
            assert status == 500, text
            assert "expected an update before requests are resumed" in text
            assert servers.update(3).servers[0].reason == ""
            assert get(f"{url}/health")[0] == 200
            by_mended = said(url)

        odd = [pair for pair in tiny.fill(model, 8).named_parameters() if "norm" not in pair[0]]
        with Servers(odd, [url], address=free_address()) as servers:
            with pytest.raises(weightbus.UpdateError, match="missing name") as refused:
                servers.update(1)
            assert not isinstance(refused.value, weightbus.TornError)
            assert get(f"{url}/health")[0] == 200
            assert said(url) == by_mended, "a refusal leaves the old version"
    paths = [str(tiny.save(tmp_path, KIND, version)) for version in (5, 6, 7)]
    fresh = engine({"models": paths, "backend": "weightbus"}, tmp_path, "fresh", 200)
    for live, loaded in zip((by_client, by_servers, by_mended), fresh, strict=True):
        assert live[0] == loaded["tokens"]
        assert live[1] == loaded["logprobs"]
        assert live[2] == loaded["tensors"]


def test_one_bit_of_a_fused_parameter(tmp_path):
    """A check names tensor, rank and row; the engine serves nobody until the next update."""
    heads, size = 4 // 2, tiny.SIZES["head_dim"]  # of queries on each of two ranks, behind which keys come
    with (
        server(tmp_path, "server", tp=2) as url,
        Servers(tiny.fill(tiny.build(KIND), 1), [url], address=free_address()) as servers,
    ):
        assert servers.update(1).servers[0].reason == ""
        before = said(url)
        assert servers.check().verdict.word == "verified"
        assert said(url) == before
        flip = {"method": "flip_bit", "args": ["model.layers.1.self_attn.qkv_proj.weight", heads * size + 5]}
        assert get(f"{url}/collective_rpc", flip)[0] == 200
        found = servers.check()
        assert found.verdict.word == "mismatch"
        (wrong,) = found.verdict.mismatches
        assert wrong.tensor == "model.layers.1.self_attn.k_proj.weight"
        assert "server rank 1" in wrong.rank
        assert wrong.box.offsets[0] == size + 5, wrong
        assert found.servers[0].torn
        status, text = get(f"{url}/health")
        assert status == 503, text
        assert servers.update(2).servers[0].reason == ""
        assert said(url) == before, "as the weights are the same"


def test_an_engine_that_sleeps(tmp_path):
    """It refuses an update; once sleep has discarded its weights it resumes with an update only."""
    with (
        server(tmp_path, "server") as url,
        Servers(tiny.fill(tiny.build(KIND), 1), [url], address=free_address()) as servers,
    ):
        servers.update(1)
        before = said(url)
        assert get(f"{url}/sleep?level=2", {})[0] == 200
        with pytest.raises(
            weightbus.UpdateError, match="expected the weights in memory, got an engine that sleeps"
        ):
            servers.update(2)
        status, text = get(f"{url}/wake_up", {})
        assert status == 500, text
        assert "discarded the weights: expected an update" in text
        assert servers.update(3).servers[0].reason == ""
        assert said(url) == before
