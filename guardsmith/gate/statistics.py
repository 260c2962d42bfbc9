"""Means with bootstrap intervals over units and their pictures.

A unit is one attack on one subject with one identifier and seed; its pictures are not independent of each other, so units are
resampled first and pictures within them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

RESAMPLES = 2000

Units = Sequence[Sequence[float | None]]
"""Per unit (identifier x seed), one score per picture; `None` is a picture that could not be scored."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    """Over units and their pictures."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    n: int
    """Pictures scored."""
    unscored: int
    """Pictures that could not be."""

    @property
    def ends(self) -> tuple[float, float, float]:
        """Mean, lower and upper end."""
        return self.mean, self.low, self.high


def _resampled_means(units: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Bootstrap over units, then over the pictures of each drawn unit; (RESAMPLES,) means."""
    means = np.empty((RESAMPLES, len(units)))
    for k, unit in enumerate(units):
        means[:, k] = unit[rng.integers(len(unit), size=(RESAMPLES, len(unit)))].mean(axis=1)
    samples = rng.integers(len(units), size=(RESAMPLES, len(units)))
    result: np.ndarray = np.take_along_axis(means, samples, axis=1).mean(axis=1)
    return result


def _scored(units: Units) -> tuple[list[np.ndarray], int]:
    scored = [np.array([s for s in unit if s is not None]) for unit in units]
    return [unit for unit in scored if len(unit)], sum(s is None for unit in units for s in unit)


def interval(units: Units, seed: int = 0) -> Interval | None:
    """Mean and 95 % interval over units and pictures; `None` if nothing was scored."""
    scored, unscored = _scored(units)
    if not scored:
        return None
    means = _resampled_means(scored, np.random.default_rng(seed))
    low, high = np.quantile(means, [0.025, 0.975])
    mean = float(np.mean([unit.mean() for unit in scored]))
    return Interval(mean, float(low), float(high), sum(map(len, scored)), unscored)


def ratio_interval(above: Units, below: Units, seed: int = 0) -> Interval | None:
    """Ratio of two means with its 95 % interval; `None` if either has no scores or the lower one is not above zero."""
    (a, missing_a), (b, missing_b) = _scored(above), _scored(below)
    if not a or not b or np.mean([unit.mean() for unit in b]) <= 0:
        return None
    rng = np.random.default_rng(seed)
    ratios = _resampled_means(a, rng) / np.maximum(_resampled_means(b, rng), 1e-6)
    low, high = np.quantile(ratios, [0.025, 0.975])
    value = float(np.mean([unit.mean() for unit in a]) / np.mean([unit.mean() for unit in b]))
    scored = min(sum(map(len, a)), sum(map(len, b)))
    return Interval(value, float(low), float(high), scored, missing_a + missing_b)


Z = 1.959964
"""Of a normal distribution, 95 % are within so many deviations."""


def share_interval(hits: int, of: int) -> Interval:
    """A share with its 95 % interval (Wilson 1927); `of` is at least 1."""
    z, share = Z, hits / of
    middle, half = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return Interval(share, (middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of), of, 0)


def share_pictures(share: float, limit: float) -> int | None:
    """Of how many pictures such a share's interval (`share_interval`) ends at the limit; `None` where no few thousand do.

    Args:
        share: in [0, 1].
        limit: in (0, 1).
    """
    distance = abs(share - limit)
    if distance * 100 < limit * (1 - limit):
        return None
    return math.ceil(round(Z * Z * limit * (1 - limit) / distance**2, 6))
