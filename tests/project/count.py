"""Counts code lines: without blank ones, comments and docstrings.

python tests/project/count.py [FOLDER]   # of weightbus/, by room
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "weightbus"

# What a reader has to know to understand one update.
CORE = (
    "planning",
    "tensors",
    "routes",
    "session/session.py",
    "session/context.py",
    "session/round.py",
    "session/participant.py",
    "session/agreement.py",
    "session/transfer.py",
    "session/endpoint.py",
    "session/origin.py",
    "session/destination.py",
    "publisher.py",
    "subscriber.py",
)
NOT_CORE = ("tensors/loaders", "routes/peer.py", "routes/sharing.py")


def code_lines(text: str) -> int:
    """Lines of a file without blank ones, comments and docstrings."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node) is not None:
            skipped |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    t = tokenize
    blank = {t.COMMENT, t.NL, t.NEWLINE, t.INDENT, t.DEDENT, t.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - skipped)


def by_room(package: Path = PACKAGE) -> Counter[str]:
    found: Counter[str] = Counter()
    for path in package.rglob("*.py"):
        found[path.relative_to(package).parts[0].removesuffix(".py")] += code_lines(path.read_text())
    return found


def core(package: Path = PACKAGE) -> int:
    """Code lines of the rooms that one update passes through."""

    def within(path: str, names: tuple[str, ...]) -> bool:
        return any(path == name or path.startswith(f"{name}/") for name in names)

    names = {str(path.relative_to(package)): path for path in package.rglob("*.py")}
    chosen = [path for name, path in names.items() if within(name, CORE) and not within(name, NOT_CORE)]
    return sum(code_lines(path.read_text()) for path in chosen)


if __name__ == "__main__":
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    rooms = by_room(package)
    for room, lines in rooms.most_common():
        print(f"{lines:6} {room}")
    print(f"{sum(rooms.values()):6} in all, {core(package)} of them core")
