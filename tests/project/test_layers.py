"""Imports go down the rooms only, and the processes that need no torch do not load it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from processes import run_python

import weightbus

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "weightbus"

# Rooms, and files that stand alone: each imports only itself and what is named before it.
ORDER = (
    "errors",
    "planning",
    "memory",
    "tensors",
    "digest",
    "inventory",
    "control",
    "hub",
    "storage",
    "routes",
    "report",
    "progress",
    "session",
    "publisher",
    "subscriber",
    "colocated",
    "engines",
    "tools",
    "http",
    "__main__",
)
SURFACES = ("benchmarks", "examples")
PURE = sys.stdlib_module_names | {"numpy", "msgspec"}  # what planning may import: no torch, no I/O
TORCH_FREE = (
    "weightbus",
    "weightbus.planning.plan",
    "weightbus.control.client",
    "weightbus.hub.coordinator",
    "weightbus.hub.server",
    "weightbus.hub.in_process",
    "weightbus.storage.disk",
    "weightbus.storage.payload",
    "weightbus.tools.timeline",
    "weightbus.tools.metrics",
    "weightbus.tools.cli",
)


def place_of(module: str) -> int | None:
    """Where a dotted module name stands in ORDER; -1: the package's own facade; None: nowhere."""
    root, _, rest = module.partition(".")
    if root in SURFACES:
        return len(ORDER)
    top = rest.partition(".")[0]
    return -1 if not rest else ORDER.index(top) if top in ORDER else None


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    return sorted(path for top in (PACKAGE, *SURFACES) for path in (ROOT / top).rglob("*.py"))


def facade() -> dict[str, str]:
    """Public name -> module that defines it, from the imports for type checkers in __init__.py."""
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {
        alias.name: str(node.module)
        for node in nodes
        for alias in node.names
        if str(node.module).startswith(f"{PACKAGE}.")
    }


def imports(path: Path, source: str, home: dict[str, str]) -> Iterator[tuple[int, str]]:
    """(line, module) for each module that ``source`` names in an import, at any depth of the code."""
    importer = name_of(path)
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [base])])
            if base != PACKAGE:
                yield node.lineno, base
                continue
            for alias in node.names:  # `from weightbus import X`: a module, or a name that one defines
                yield (
                    node.lineno,
                    home.get(alias.name, base if alias.name.startswith("__") else f"{base}.{alias.name}"),
                )


def violations(path: Path, source: str, home: dict[str, str]) -> list[str]:
    importer = name_of(path)
    own = place_of(importer)
    where = path.relative_to(ROOT)
    if own is None:
        return [f"{where}: expected a place in ORDER of tests/project/test_layers.py, got none"]
    if importer == PACKAGE:
        return []  # the facade names everything and, being lazy, imports nothing (tested below)
    found = []
    for line, module in imports(path, source, home):
        top = module.split(".")[0]
        if top not in (PACKAGE, *SURFACES):
            if importer.startswith(f"{PACKAGE}.planning.") and top not in PURE:
                found.append(f"{where}:{line}: expected pure integers in planning, got {module}")
            continue
        place = place_of(module)
        if place is None:
            found.append(f"{where}:{line}: expected a module that has a place in ORDER, got {module}")
        elif place > own:
            found.append(f"{where}:{line}: expected what comes before {importer} in ORDER, got {module}")
    return found


def private_torch(source: str) -> list[str]:
    """Names with a leading underscore that ``source`` imports from torch or reaches through it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node))
    return [
        name
        for name in found
        if name.startswith("torch.")
        and any(p.startswith("_") and not p.startswith("__") for p in name.split("."))
    ]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    assert violations(path, path.read_text(), facade()) == []


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_private_torch_names_only_in_files_named_for_it(path: Path) -> None:
    if not path.name.startswith("torch_"):
        assert private_torch(path.read_text()) == []


def test_lazy_names_are_what_type_checkers_see() -> None:
    assert sorted(weightbus.__all__) == sorted(facade())
    for name, module in facade().items():
        assert getattr(weightbus, name) is getattr(import_module(module), name)


def test_every_room_exists() -> None:
    files = [path.relative_to(ROOT / PACKAGE) for path in (ROOT / PACKAGE).rglob("*.py")]
    assert sorted({file.parts[0].removesuffix(".py") for file in files} - {"__init__"}) == sorted(ORDER)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("weightbus/planning/box.py", "import weightbus.tensors.layout", "got weightbus.tensors.layout"),
        ("weightbus/planning/box.py", "def f():\n    from weightbus import hub", "got weightbus.hub"),
        ("weightbus/planning/box.py", "from ..publisher import Publisher", "got weightbus.publisher"),
        ("weightbus/digest/cpu.py", "from .. import Publisher", "got weightbus.publisher"),
        ("weightbus/planning/spec.py", "import torch", "got torch"),
        ("weightbus/planning/spec.py", "from zmq import Context", "got zmq"),
        ("weightbus/newcomer.py", "", "expected a place"),
        ("weightbus/publisher.py", "import weightbus.newcomer", "got weightbus.newcomer"),
        ("weightbus/hub/server.py", "from examples.demo import minilm", "got examples.demo"),
    ],
)
def test_the_rule_refuses(path: str, source: str, expected: str) -> None:
    (message,) = violations(ROOT / path, source, facade())
    assert expected in message


def test_the_rule_allows_downward_imports() -> None:
    source = (
        "import torch\nfrom weightbus import WeightbusError, __version__\nfrom .tensors.layout import Layout"
    )
    assert violations(ROOT / "weightbus/publisher.py", source, facade()) == []


def test_private_torch_names_are_found() -> None:
    source = "import torch._x\nfrom torch.d._y import z\nfrom torch.a import _b\ntorch.c._d\ntorch.e.__name__"
    assert private_torch(source) == ["torch._x", "torch.d._y.z", "torch.a._b", "torch.c._d"]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    result = run_python("-c", code, cwd=ROOT)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "False", "")
