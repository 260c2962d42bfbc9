"""Kernel inception distance (Binkowski et al. 2018; hf.co/papers/1801.01401) on any features.

The squared maximum mean discrepancy under the cubic polynomial kernel. The V-statistic (diagonal included) is used: it is
never negative, so "base against hardened" can be put in relation to "base against base with other seeds" at the same n.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x . y / d + 1)^3 for all pairs, (n, m)."""
    gram: Tensor = (x @ y.T / x.shape[1] + 1) ** 3
    return gram


def kid(x: Tensor, y: Tensor) -> float:
    """MMD^2 between two sets of features (n, d) and (m, d); 0 for equal sets, larger for different ones."""
    x, y = x.double(), y.double()
    return float(kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean())


def kid_interval(x: Tensor, y: Tensor, *, resamples: int = 200, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval around `kid`, resampling the pictures of both sets.

    A resample repeats pictures, which raises the V-statistic of all of them alike; the interval is moved back by that.
    """
    rng = torch.Generator().manual_seed(seed)
    x, y = x.double(), y.double()
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    values = []
    for _ in range(resamples):
        i = torch.randint(len(x), (len(x),), generator=rng)
        j = torch.randint(len(y), (len(y),), generator=rng)
        values.append(float(xx[i][:, i].mean() + yy[j][:, j].mean() - 2 * xy[i][:, j].mean()))
    samples = torch.tensor(values)
    centred = samples - samples.mean() + kid(x, y)
    low, high = centred.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def kid_ratio_interval(reference: Tensor, again: Tensor, other: Tensor) -> tuple[float, float, float]:
    """How many times further `other` is from `reference` than `again` is, with a 95 % interval.

    The three sets answer the same n prompts in the same order, and `again` and `other` were drawn from the same noise, so
    what chance does to one it does to the other. The interval is the delete-one jackknife over prompts, which keeps that
    pairing; resampling each set on its own would not.

    Args:
        reference: features of the base's pictures, (n, d), n at least 3.
        again: of the base's pictures with other seeds, (n, d).
        other: of the hardened model's pictures with those seeds, (n, d).

    Returns:
        Ratio, low, high.
    """
    x, n = reference.double(), len(reference)

    def rest(k: Tensor) -> Tensor:
        """Mean of a kernel matrix without row and column 0, 1, ...: (n,)."""
        return (k.sum() - k.sum(0) - k.sum(1) + k.diagonal()) / (n - 1) ** 2

    own = rest(kernel(x, x))

    def without_each(y: Tensor) -> Tensor:
        return own + rest(kernel(y, y)) - 2 * rest(kernel(x, y))

    jackknife = without_each(other.double()) / without_each(again.double())
    error = 1.96 * float(((n - 1) / n * (jackknife - jackknife.mean()).square().sum()).sqrt())
    value = kid(reference, other) / kid(reference, again)
    return value, value - error, value + error
