"""These tests need vLLM, and import what it brings: only ``-m vllm`` collects them (make test-vllm)."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if "vllm" in config.option.markexpr.replace("not vllm", "") else True
