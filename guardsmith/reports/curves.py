"""Similarity against an attacker's steps or displacement, as an SVG."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from guardsmith.core.atomic_io import write_text
from guardsmith.gate.calibration import Levels
from guardsmith.gate.statistics import Interval
from guardsmith.reports.frontier import Point, frontier, in_words, percent

CURVE = (260, 110)  # of the drawing area, in units of the SVG
SIDES = (("base", "on the base model"), ("hardened", "on the hardened model"))


class Dot(NamedTuple):
    """One measurement.

    Attributes:
        x: place.
        y: of the mean.
        top: y of the upper end of its interval.
        bottom: y of the lower end.
        words: for those who point at it.
    """

    x: float
    y: float
    top: float
    bottom: float
    words: str


class Curve(NamedTuple):
    """Similarity against an attacker's steps or displacement, as points of an SVG.

    Attributes:
        lines: series -> "x,y x,y ..." of the means.
        bands: series -> the same around the interval.
        ticks: (x, what it stands for).
        limit: y of the limit.
        top: y of a genuine picture's similarity.
        words: the same for those who do not see it.
        axis: what the x axis is.
        dots: series -> every measurement.
        claim: x of the claimed displacement, where there is one within the drawing.
    """

    lines: dict[str, str]
    bands: dict[str, str]
    ticks: Sequence[tuple[float, int | str]]
    limit: float
    top: float
    words: str
    axis: str = "steps of the attacker"
    dots: Mapping[str, Sequence[Dot]] = {}
    claim: float | None = None


class Scale(NamedTuple):
    """From values to places of the drawing area, x on a logarithmic scale.

    Attributes:
        left: x value at its left side, above 0.
        right: at its right side, above `left`.
        lowest: y value at its bottom.
        highest: at its top.
    """

    left: float
    right: float
    lowest: float
    highest: float

    @classmethod
    def around(cls, xs: Iterable[float], intervals: Iterable[Interval], levels: Levels) -> Scale:
        """A scale on which all of them have room, and so has a genuine picture's similarity."""
        xs, intervals = list(xs), list(intervals)
        highest = max(levels.genuine, *(each.high for each in intervals)) + 0.05
        return cls(min(xs), max(xs), min(-0.1, *(each.low for each in intervals)), highest)

    def x(self, value: float) -> float:
        """Place of an x value."""
        return round(CURVE[0] * math.log(value / self.left) / math.log(self.right / self.left), 1)

    def y(self, value: float) -> float:
        """Place of a y value."""
        return round(CURVE[1] * float(self.highest - value) / float(self.highest - self.lowest), 1)


def curve(points: dict[str, dict[int, Interval]], levels: Levels, attack: str) -> Curve | None:
    """Curves over the steps of one subject under one attack; `None` unless there are two evaluation points.

    Args:
        points: side -> steps -> similarity, from the report.
        levels: of the class.
        attack: its label.
    """
    steps = sorted({step for side in points.values() for step in side})
    if len(steps) < 2:
        return None
    scale = Scale.around(steps, (each for side in points.values() for each in side.values()), levels)
    lines, bands, words = {}, {}, []
    for side, by_steps in points.items():
        ordered = sorted(by_steps.items())
        lines[side] = " ".join(f"{scale.x(step)},{scale.y(each.mean)}" for step, each in ordered)
        outline = [(step, each.high) for step, each in ordered] + [(step, each.low) for step, each in reversed(ordered)]
        bands[side] = " ".join(f"{scale.x(step)},{scale.y(value)}" for step, value in outline)
        text = ", ".join(f"{each.mean:z.2f} after {step} steps" for step, each in ordered)
        words.append(f"{attack} {dict(SIDES)[side]}: {text}")
    ticks = [(scale.x(step), step) for step in steps]
    return Curve(lines, bands, ticks, scale.y(levels.chance_high), scale.y(levels.genuine), "; ".join(words) + ".")


def _steps(best: Sequence[Point], end: float, scale: Scale) -> tuple[str, str]:
    """Line and band of a frontier: a similarity holds from its displacement on until a larger one is reached."""
    corners: list[tuple[float, Interval]] = []
    for point, following in zip(best, [*(each.displacement for each in best[1:]), end], strict=True):
        corners += [(point.displacement, point.similarity), (following, point.similarity)]
    line = " ".join(f"{scale.x(x)},{scale.y(each.mean)}" for x, each in corners)
    outline = [(x, each.high) for x, each in corners] + [(x, each.low) for x, each in reversed(corners)]
    return line, " ".join(f"{scale.x(x)},{scale.y(value)}" for x, value in outline)


def displacement_ticks(left: float, right: float) -> list[float]:
    """Round displacements in a range: 1, 2 and 5 times powers of ten; the ends of the range where there are fewer than two."""
    decades = range(math.floor(math.log10(left)), math.ceil(math.log10(right)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if left <= tick <= right]
    return inside if len(inside) > 1 else [left, right]


def frontier_curve(
    series: Mapping[str, Sequence[Point]], levels: Levels, names: Mapping[str, str], claim: float | None = None
) -> Curve | None:
    """Similarity against displacement; `None` unless there are two displacements.

    Args:
        series: of the drawing -> everything that an attack reached there, by displacement.
        levels: of the class.
        names: series -> for those who do not see it.
        claim: displacement that the policy claims.
    """
    everything = [point for each in series.values() for point in each]
    places = {point.displacement for point in everything}
    if len(places) < 2:
        return None
    scale = Scale.around((0.8 * min(places), 1.25 * max(places)), (point.similarity for point in everything), levels)
    lines, bands, dots, words = {}, {}, {}, []
    for name, ordered in series.items():
        if not ordered:
            continue
        lines[name], bands[name] = _steps(frontier(ordered), ordered[-1].displacement, scale)
        dots[name] = [
            Dot(
                scale.x(point.displacement), scale.y(point.similarity.mean), scale.y(point.similarity.high),
                scale.y(point.similarity.low),
                f"{point.attack} {names[name]}: {in_words(point.similarity)} at {percent(point.displacement)}, "
                f"{point.steps} steps",
            )
            for point in ordered
        ]  # fmt: skip
        text = ", ".join(f"{each.similarity.mean:z.2f} at {percent(each.displacement)}" for each in ordered)
        words.append(f"{names[name]}: {text}")
    ticks = [(scale.x(tick), f"{100 * tick:.2g} %") for tick in displacement_ticks(scale.left, scale.right)]
    inside = claim is not None and scale.left <= claim <= scale.right
    return Curve(
        lines, bands, ticks, scale.y(levels.chance_high), scale.y(levels.genuine), "; ".join(words) + ".",
        "displacement: relative change of the weights", dots, scale.x(claim) if inside and claim is not None else None,
    )  # fmt: skip


@functools.cache
def templates() -> Environment:
    """Where pages and pictures are filled in; every template is compiled once."""
    return Environment(
        loader=PackageLoader("guardsmith"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip


def save_frontiers(path: Path, charts: Sequence[tuple[str, Curve]], names: Mapping[str, str]) -> None:
    """Write charts below each other as one SVG; the file appears whole.

    Args:
        path: where to.
        charts: title and curve of each.
        names: series -> what the key says.
    """
    data: dict[str, Any] = {"charts": charts, "names": names, "size": CURVE}
    write_text(path, templates().get_template("frontier.svg").render(**data))
