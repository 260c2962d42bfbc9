"""Similarity against an attacker's steps, as an SVG of the page."""

from __future__ import annotations

import math
from typing import NamedTuple

from guardsmith.gate.calibration import Levels
from guardsmith.gate.statistics import Interval

CURVE = (260, 110)  # of the drawing area, in units of the SVG
SIDES = (("base", "on the base model"), ("hardened", "on the hardened model"))


class Curve(NamedTuple):
    """Similarity against an attacker's steps, as points of an SVG.

    Attributes:
        lines: side -> "x,y x,y ..." of the means.
        bands: side -> the same around the interval.
        ticks: (x, steps).
        limit: y of the limit.
        top: y of a genuine picture's similarity.
        words: the same for those who do not see it.
    """

    lines: dict[str, str]
    bands: dict[str, str]
    ticks: list[tuple[float, int]]
    limit: float
    top: float
    words: str


def curve(points: dict[str, dict[int, Interval]], levels: Levels, attack: str) -> Curve | None:
    """The curves of one subject under one attack; `None` unless there are two evaluation points.

    Args:
        points: side -> steps -> similarity, from the report.
        levels: of the class.
        attack: its label.
    """
    steps = sorted({step for side in points.values() for step in side})
    if len(steps) < 2:
        return None
    width, height = CURVE
    highest = max(levels.genuine, *(each.high for side in points.values() for each in side.values())) + 0.05
    lowest = min(-0.1, *(each.low for side in points.values() for each in side.values()))

    def x(step: int) -> float:
        return round(width * math.log(step / steps[0]) / math.log(steps[-1] / steps[0]), 1)

    def y(value: float) -> float:
        return round(height * float(highest - value) / float(highest - lowest), 1)

    lines, bands, words = {}, {}, []
    for side, by_steps in points.items():
        ordered = sorted(by_steps.items())
        lines[side] = " ".join(f"{x(step)},{y(each.mean)}" for step, each in ordered)
        outline = [(step, each.high) for step, each in ordered] + [(step, each.low) for step, each in reversed(ordered)]
        bands[side] = " ".join(f"{x(step)},{y(value)}" for step, value in outline)
        text = ", ".join(f"{each.mean:z.2f} after {step} steps" for step, each in ordered)
        words.append(f"{attack} {dict(SIDES)[side]}: {text}")
    ticks = [(x(step), step) for step in steps]
    return Curve(lines, bands, ticks, y(levels.chance_high), y(levels.genuine), "; ".join(words) + ".")
