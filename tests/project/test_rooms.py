"""The rooms: none too large to read, drawn as they are, and typed for those who use them."""

from __future__ import annotations

import pytest
from count import PACKAGE, by_room, code_lines, core
from processes import run_python

ROOT = PACKAGE.parent


def test_the_picture_of_the_rooms_is_theirs() -> None:
    found = run_python(ROOT / "docs" / "rooms.py", "--check", timeout=60)
    assert found.returncode == 0, f"run docs/rooms.py; {found.stderr}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140


def test_code_lines_are_counted_without_comments_and_docstrings() -> None:
    text = '''"""Doc.

Of a module."""

# A comment.
A = """two
lines"""


def f(  # one
    x,
):
    """Doc."""
    return x  # and another


class C:
    """Doc."""
'''
    assert code_lines(text) == 7
    assert sum(by_room().values()) > core() > 0


def test_users_types_are_checked_strictly() -> None:
    pytest.importorskip("mypy")
    path = "tests/project/public_api.py"
    found = run_python("-m", "mypy", "--strict", "--follow-imports=silent", path, cwd=ROOT, timeout=110)
    assert found.returncode == 0, found.stdout
