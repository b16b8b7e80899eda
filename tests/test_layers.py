"""Imports go down the layers only, and the processes that need no torch do not load it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import weightbus

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "weightbus"

# Module or package -> layer; a package stands for all files in it. A new file must be placed here.
LAYERS = {
    1: ("errors", "box", "spec", "facts", "plan", "holders", "narrow", "exports", "peer_plan", "runs"),
    2: (
        "part",
        "_addresses",
        "torch_addresses",
        "layout",
        "ranks",
        "torch_dtensor",
        "torch_module",
        "once",
        "pieces",
        "cuda_kernels",
        "cuda_copy",
        "torch_copy",
        "lanes",
        "frozen",
        "bucket",
        "trace",
        "torch_trace",
        "torch_taint",
        "torch_owners",
        "hook",
        "install",
        "glance",
        "tree",
        "regions",
        "torch_flows",
        "derived",
        "constants",
        "account",
        "reads",
        "audit",
        "digest",
        "ledger",
        "changes",
        "perturbation",
        "host_bytes",
        "sha256",
    ),
    3: (
        "messages",
        "identity",
        "jobs",
        "rounds",
        "sketch",
        "asks",
        "wire",
        "keys",
        "roster",
        "requests",
        "rebuild",
        "judge",
        "protocol",
        "rendezvous",
        "overview",
        "roles",
        "door",
        "guard",
        "unfinished",
        "hub",
        "start",
        "link",
        "store",
        "group",
        "torch_group",
        "broadcast",
        "driver",
        "kernel_copies",
        "ipc",
        "sharing",
        "loopback",
        "peer",
        "progress",
        "opened",
        "bounded_json",
        "checkpoint",
        "disk",
        "saved_names",
        "torch_joins",
        "conversion",
        "scratch",
        "digest_list",
        "payload",
        "shared_payload",
        "reading",
        "_pread",
        "tasks",
        "joined",
        "sha256_ranks",
        "sha256_check",
    ),
    4: (
        "client",
        "report",
        "ends",
        "baseline",
        "witness",
        "planned",
        "giving_up",
        "turn",
        "load",
        "save_plan",
        "save",
        "probe",
        "task_turn",
        "torch_start",
        "session",
        "publisher",
        "subscriber",
        "colocated",
    ),
    5: (
        "cli",
        "operate",
        "metrics",
        "timeline",
        "digest_files",
        "load_command",
        "http_guard",
        "http_schema",
        "http_server",
        "http",
        "__main__",
    ),
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
SURFACES = ("benchmarks", "examples")
PURE = sys.stdlib_module_names | {"numpy", "msgspec"}  # what layer 1 may import: no torch, no I/O
TORCH_FREE = (
    "weightbus",
    "weightbus.plan",
    "weightbus.protocol",
    "weightbus.hub",
    "weightbus.client",
    "weightbus.timeline",
    "weightbus.metrics",
    "weightbus.disk",
    "weightbus.payload",
    "weightbus.cli",
)


def layer_of(module: str) -> int | None:
    """Layer of a dotted module name of this repository; 0 is the package's own facade; None: in no layer."""
    root, _, rest = module.partition(".")
    if root in SURFACES:
        return max(LAYERS)
    return LAYER_OF.get(rest.partition(".")[0]) if rest else 0


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
    own = layer_of(importer)
    where = path.relative_to(ROOT)
    if own is None:
        return [f"{where}: expected a layer in tests/test_layers.py, got none"]
    if importer == PACKAGE:
        return []  # the facade names everything and, being lazy, imports nothing (tested below)
    found = []
    for line, module in imports(path, source, home):
        if module.split(".")[0] not in (PACKAGE, *SURFACES):
            if own == 1 and module.split(".")[0] not in PURE:
                found.append(f"{where}:{line}: expected pure integers in layer 1, got {module}")
            continue
        layer = layer_of(module)
        if layer is None:
            found.append(f"{where}:{line}: expected a module that is in a layer, got {module}")
        elif layer > own:
            found.append(f"{where}:{line}: expected layer {own} or lower, got {module} of layer {layer}")
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


def test_every_layer_entry_exists() -> None:
    files = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / PACKAGE).rglob("*.pyi")]
    modules = {name_of(path).partition(".")[2].partition(".")[0] for path in files}
    assert sorted(set(LAYER_OF) - modules) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("weightbus/box.py", "import weightbus.layout", "weightbus.layout of layer 2"),
        ("weightbus/box.py", "def f():\n    from weightbus import hub", "weightbus.hub of layer 3"),
        ("weightbus/box.py", "from .publisher import Publisher", "weightbus.publisher of layer 4"),
        ("weightbus/digest/cpu.py", "from .. import Publisher", "weightbus.publisher of layer 4"),
        ("weightbus/spec.py", "import torch", "got torch"),
        ("weightbus/spec.py", "from zmq import Context", "got zmq"),
        ("weightbus/newcomer.py", "", "expected a layer"),
        ("weightbus/publisher.py", "import weightbus.newcomer", "got weightbus.newcomer"),
        ("weightbus/hub.py", "from examples.demo import minilm", "examples.demo of layer 5"),
    ],
)
def test_the_rule_refuses(path: str, source: str, expected: str) -> None:
    (message,) = violations(ROOT / path, source, facade())
    assert expected in message


def test_the_rule_allows_downward_imports() -> None:
    source = "import torch\nfrom weightbus import WeightbusError, __version__, box\nfrom .layout import Part"
    assert violations(ROOT / "weightbus/publisher.py", source, facade()) == []


def test_private_torch_names_are_found() -> None:
    source = "import torch._x\nfrom torch.d._y import z\nfrom torch.a import _b\ntorch.c._d\ntorch.e.__name__"
    assert private_torch(source) == ["torch._x", "torch.d._y.z", "torch.a._b", "torch.c._d"]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "False", "")
