"""Medians, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def timings(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """p50, p99 and least; and the ratio of medians to a baseline of the same rounds, with the interval that
    holds 95 % of the ratios of resampled rounds (bootstrap, seeded)."""
    one, other = np.array(seconds), np.array(baseline)
    picked = np.random.default_rng(0).integers(len(one), size=(2000, len(one)))
    ratios = np.median(one[picked], axis=1) / np.median(other[picked % len(other)], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {
        "rounds": len(one),
        "p50_s": float(np.median(one)),
        "p99_s": float(np.quantile(one, 0.99, method="higher")),
        "least_s": float(one.min()),
        "of_raw": float(np.median(one) / np.median(other)),
        "of_raw_95": [float(low), float(high)],
    }
