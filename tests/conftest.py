"""Marks: ``cuda`` and ``gpus(n)`` tests are skipped where the devices are not there."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "support"))
sys.path.append(os.path.join(os.path.dirname(os.path.dirname(__file__)), "benchmarks"))
# Ranks are forked with this process's environment: one thread each, as there are more ranks than cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    found = torch.cuda.device_count()
    for item in items:
        mark = item.get_closest_marker("gpus")
        needed = mark.args[0] if mark else 1 if item.get_closest_marker("cuda") else 0
        if needed > found:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices, found {found}"))


@pytest.fixture
def address() -> str:
    from processes import free_address

    return free_address()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run in which everything was skipped proves nothing: it fails, as pytest does for an empty one."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly:  # a worker of pytest-xdist; nothing to run
        return
    if session.exitstatus == pytest.ExitCode.OK and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
