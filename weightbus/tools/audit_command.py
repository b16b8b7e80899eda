"""``weightbus audit``: whether an engine's model, once updated, is in each tensor as one that was loaded."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from weightbus.engines.audit import Load, audit
from weightbus.errors import SpecError, WeightbusError


def main(arguments: list[str]) -> int:
    """0: all is as in a fresh load. 1: some tensors are not, as the text names. 2: a wrong call."""
    parser = argparse.ArgumentParser(prog="weightbus audit", description=__doc__)
    parser.add_argument(
        "factory", metavar="MODULE:FUNCTION", help="takes a directory and returns the model loaded from it"
    )
    parser.add_argument("checkpoint", type=Path, help="directory of safetensors files")
    for option, text in (
        ("local", "that no update feeds"),
        ("derived", "that the engine's own step makes again"),
    ):
        parser.add_argument(
            f"--{option}", action="append", default=[], metavar="PATTERN", help=f"names {text}; may be repeated"
        )
    parser.add_argument("--seed", type=int, default=0, help="of the other weights")
    options = parser.parse_args(arguments)
    given = {"seed": options.seed, "local": options.local, "derived": options.derived}
    try:
        report = audit(_factory(options.factory), options.checkpoint, **given)
    except WeightbusError as error:
        print(f"weightbus audit: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0 if report.ok else 1


def _factory(name: str) -> Load:
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        load: Load = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SpecError(f"{name}: expected MODULE:FUNCTION, got {type(error).__name__}: {error}") from error
    return load
