"""Draws docs/rooms.svg: the rooms of ``weightbus/`` and which each imports; what a room
imports through another one has no arrow of its own.

python docs/rooms.py           # writes the picture
python docs/rooms.py --check   # exit 1 if it shows something else than the code
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "rooms.svg"

# From the top: what imports nothing of the others comes first.
LEVELS = (
    ("planning",),
    ("memory", "control"),
    ("tensors", "hub"),
    ("digest",),
    ("inventory", "storage", "routes"),
    ("session",),
    ("publisher", "subscriber", "colocated"),
    ("engines",),
    ("tools",),
)
SHARED = ("errors", "report", "progress")  # which all may import, and which are left out of the picture
WIDTH, ROW, BOX, HIGH = 900, 80, 190, 40


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "weightbus").parts[0].removesuffix(".py")


def survey() -> set[tuple[str, str]]:
    """(room, room that it imports)."""
    arrows: set[tuple[str, str]] = set()
    for path in (ROOT / "weightbus").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("weightbus."):
                arrows.add((room_of(path), str(node.module).split(".")[1]))
    return {(a, b) for a, b in arrows if a != b}


def shortest(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those that no chain of others says too: a transitive reduction."""
    after: dict[str, set[str]] = {}
    for a, b in arrows:
        after.setdefault(a, set()).add(b)

    def reach(room: str) -> set[str]:
        return {far for near in after.get(room, ()) for far in {near, *reach(near)}}

    return {(a, b) for a, b in arrows if not any(b in reach(c) for c in after[a] - {b})}


def picture() -> str:
    arrows = shortest({(a, b) for a, b in survey() if a not in SHARED and b not in SHARED})
    place: dict[str, tuple[int, int]] = {}
    for level, names in enumerate(LEVELS):
        for i, name in enumerate(names):
            place[name] = WIDTH * (2 * i + 1) // (2 * len(names)), 40 + level * ROW
    height = 40 + len(LEVELS) * ROW
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#9aa7b4"/></marker></defs>',
    ]
    for a, b in sorted(arrows):
        if a in place and b in place:
            (x1, y1), (x2, y2) = place[a], place[b]
            out.append(
                f'<line x1="{x1}" y1="{y1 - HIGH // 2}" x2="{x2}" y2="{y2 + HIGH // 2 + 2}" '
                'stroke="#9aa7b4" stroke-width="1" marker-end="url(#tip)"/>'
            )
    for name, (x, y) in place.items():
        wide = BOX if name in ("publisher", "subscriber", "colocated") else BOX + 40
        out += [
            f'<rect x="{x - wide // 2}" y="{y - HIGH // 2}" width="{wide}" height="{HIGH}" rx="8" '
            'fill="#eef4fa" stroke="#3b6ea5"/>',
            f'<text x="{x}" y="{y + 6}" text-anchor="middle" font-size="16" fill="#1b2b3a">{name}</text>',
        ]
    return "\n".join([*out, "</svg>", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the picture shows something else")
    options = parser.parse_args()
    found = picture()
    if options.check:
        return int(not PICTURE.exists() or PICTURE.read_text() != found)
    PICTURE.write_text(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
