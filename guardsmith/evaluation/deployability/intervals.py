"""Intervals of paired comparisons: both models draw the same prompts from the same noise, which narrows them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from guardsmith.gate.statistics import RESAMPLES, Interval, share_interval


def paired_ratio(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Interval | None:
    """Ratio of two means over the same rows, with its 95 % bootstrap interval over rows.

    Args:
        above: n finite values.
        below: n values of the same rows.
        seed: of the resampling.

    Returns:
        `None` where the lower mean is not clearly above zero (2.5 % of its resamples are not): nothing can be compared with it.
    """
    a, b = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    rows = np.random.default_rng(seed).integers(len(a), size=(RESAMPLES, len(a)))
    over, under = a[rows].mean(1), b[rows].mean(1)
    if b.mean() <= 0 or np.quantile(under, 0.025) <= 0:
        return None
    low, high = np.quantile(over / np.maximum(under, 1e-9), [0.025, 0.975])
    return Interval(float(a.mean() / b.mean()), float(low), float(high), len(a), 0)


def paired_excess(hits: Sequence[bool], of: Sequence[bool]) -> Interval:
    """How much larger one share is than another over the same rows, with its 95 % interval (Newcombe 1998, method 10).

    Args:
        hits: n rows of the one.
        of: the same rows of the other.
    """
    first, second = np.asarray(hits, dtype=bool), np.asarray(of, dtype=bool)
    n = len(first)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only, other = int((first & ~second).sum()), int((~first & second).sum())
    one, two = share_interval(both + only, n), share_interval(both + other, n)
    size = math.prod((both + only, both + other, neither + only, neither + other)) ** 0.5
    # Where one side has all rows or none, the correlation is not defined; identical rows are perfectly correlated all the same.
    correlation = (both * neither - only * other) / size if size else float(only == other == 0)

    def half(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0.0))

    value = one.mean - two.mean
    low = value - half(one.mean - one.low, two.high - two.mean)
    high = value + half(one.high - one.mean, two.mean - two.low)
    return Interval(value, max(low, -1.0), min(high, 1.0), n, 0)
