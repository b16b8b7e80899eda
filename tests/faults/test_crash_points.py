"""A few of the points at which ``crash_points.py`` hurts a rank or the hub; all of them are a run by itself."""

from __future__ import annotations

import crash_points
import pytest

CHOSEN = [
    ("trainer", "sent done", "interrupt"),
    ("trainer", "heard go", "kill"),
    ("server", "heard sources", "raise"),
    ("server", "sent done", "kill"),
    ("hub", "COMMIT", "kill"),
]


@pytest.mark.timeout(240)
def test_after_these_steps_all_holds():
    chosen = [p for p in crash_points.points() if (p.role, p.step, p.fault) in CHOSEN]
    assert len(chosen) == len(CHOSEN)
    rows = crash_points.run(chosen)
    assert [row["broken"] for row in rows] == [[]] * len(rows)
    assert [row["next"] for row in rows] == ["ok"] * len(rows)


def test_each_role_is_hurt_at_each_step():
    points = crash_points.points()
    assert len(points) == len(set(points)) == 10 * 4 + 11 * 4 + 7 + 6
