"""Thresholds with a stated false-alarm rate: how similar to a protected subject pictures of strangers are.

The measured quantity is the similarity of one stranger's picture to one subject, the largest over all variants that are undone.
An upload of n pictures against S subjects is n x S such comparisons; the threshold is the level that one comparison exceeds with
probability rate / (n x S). Comparisons of one upload are alike, so an upload's true rate is lower than the one stated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from guardsmith.core.errors import UserError
from guardsmith.metrics.embedded import JUDGES

FILE = JUDGES / "screening.json"
GRID = tuple(10 ** (-exponent / 4) for exponent in range(4, 29))  # rates 0.1, 0.056, ... 1e-7 at which levels are kept
LEAST_BEYOND = 10  # comparisons above a level, so that it counts as measured


@dataclass(frozen=True)
class Threshold:
    """A similarity, and what is known of it.

    Attributes:
        level: pictures at or above it are alarms.
        rate: stated false-alarm rate for an upload; larger than the requested one where not enough strangers were measured.
    """

    level: float
    rate: float


def tail_levels(scores: Tensor) -> list[tuple[float, float]]:
    """(rate, level) pairs, falling rates: `level` is exceeded by that share of the scores, which are of strangers.

    Args:
        scores: float, any shape; as many as there are, since the smallest rate is 10 of their number.

    Raises:
        UserError: there are fewer than 100.
    """
    flat = scores.flatten().double().sort(descending=True).values
    if len(flat) < 10 * LEAST_BEYOND:
        raise UserError(f"levels need at least {10 * LEAST_BEYOND} comparisons with strangers; there are {len(flat)}")
    return [
        (rate, float(flat[math.ceil(rate * len(flat)) - 1])) for rate in GRID if rate * len(flat) >= LEAST_BEYOND - 1e-9
    ]


def threshold(table: Sequence[Sequence[float]], rate: float, comparisons: int) -> Threshold:
    """The threshold for an upload.

    Args:
        table: what `tail_levels` gave.
        rate: false alarms for each upload, in (0, 1).
        comparisons: pictures times subjects.
    """
    pair_rate = rate / comparisons
    rates, levels = zip(*table, strict=True)
    if pair_rate >= rates[0]:
        return Threshold(levels[0], rate)
    if pair_rate <= rates[-1]:
        return Threshold(levels[-1], max(rate, min(1.0, rates[-1] * comparisons)))
    for (above, low), (below, high) in pairwise(table):
        if below <= pair_rate:
            part = math.log(above / pair_rate) / math.log(above / below)
            return Threshold(low + part * (high - low), rate)
    raise AssertionError("the rate lies between two of the table")


Tables = Mapping[str, Sequence[Sequence[float]]]
"""Class noun of the subject -> what `tail_levels` gave."""


@cache
def shipped_levels() -> dict[str, Tables]:
    """The levels of the embedded judge, measured on strangers: how much is undone -> class noun -> table."""
    levels: dict[str, Tables] = json.loads(FILE.read_text(encoding="utf-8"))["levels"]
    return levels


def table_of(tables: Tables, noun: str) -> Sequence[Sequence[float]]:
    """The levels of a class.

    Raises:
        UserError: there are none.
    """
    if noun not in tables:
        raise UserError(
            f"there are no measured levels for class {noun} (only {', '.join(tables)}): name pictures of strangers with "
            "--strangers, so that they can be measured"
        )
    return tables[noun]


def best_scores(embeddings: Tensor, subjects: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity of pictures to subjects, the largest over variants.

    Args:
        embeddings: unit vectors of every variant of every picture, (variants, n, width).
        subjects: unit vectors, (S, width).

    Returns:
        Similarity (n, S), and the number of the variant that reached it, int64 (n, S).
    """
    scores = embeddings @ subjects.T
    best = scores.max(dim=0)
    return best.values, best.indices


def measured_levels(strangers: Tensor, subjects: Tensor, nouns: Sequence[str]) -> Tables:
    """Levels of strangers' pictures against subjects, for every class.

    Args:
        strangers: unit vectors (variants, n, width) of pictures of unprotected people.
        subjects: unit vectors (S, width).
        nouns: the class noun of each subject.

    Raises:
        UserError: there are too few pictures.
    """
    scores, _ = best_scores(strangers, subjects)
    return {
        noun: tail_levels(scores[:, torch.tensor([other == noun for other in nouns])]) for noun in dict.fromkeys(nouns)
    }
