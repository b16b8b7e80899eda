"""A picture of horizontal bars, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, LEFT, RIGHT, TOP, ROW, HIGH = 900, 330, 90, 64, 34, 22
OURS, OTHERS = "#3b6ea5", "#b5bfc9"


def bars(title: str, subtitle: str, rows: Sequence[tuple[str, float, bool]], unit: str) -> str:
    """rows: label, value, and whether it is ours; bars begin at 0."""
    most = max(value for _, value, _ in rows)
    height = TOP + ROW * len(rows) + 12
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="26" font-size="18" font-weight="bold" fill="#1b2b3a">{escape(title)}</text>',
        f'<text x="16" y="48" font-size="13" fill="#51606e">{escape(subtitle)}</text>',
    ]
    for number, (label, value, ours) in enumerate(rows):
        y = TOP + ROW * number
        wide = round((WIDTH - LEFT - RIGHT) * value / most, 1)
        middle = y + HIGH // 2 + 5
        out += [
            f'<text x="{LEFT - 10}" y="{middle}" text-anchor="end" font-size="14" fill="#1b2b3a">'
            f"{escape(label)}</text>",
            f'<rect x="{LEFT}" y="{y}" width="{wide}" height="{HIGH}" rx="3" '
            f'fill="{OURS if ours else OTHERS}"/>',
            f'<text x="{LEFT + wide + 6}" y="{middle}" font-size="14" fill="#1b2b3a">{value:.1f} {unit}</text>',
        ]
    return "\n".join([*out, "</svg>", ""])
