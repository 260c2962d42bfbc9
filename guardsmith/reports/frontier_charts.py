"""The charts of similarity against displacement, as page and comparison show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guardsmith.core.errors import UserError
from guardsmith.gate.calibration import Levels
from guardsmith.gate.evidence import SIDES
from guardsmith.reports.curves import SIDES as WORDS
from guardsmith.reports.curves import Curve, frontier_curve
from guardsmith.reports.frontier import HEADINGS, Point, groups_of, points, table
from guardsmith.reports.report import Report


def subject_curve(report: Report, label: str, subject: str, levels: Levels) -> Curve | None:
    """What an attack reaches on one subject by displacement; `None` where that was not measured."""
    series: dict[str, list[Point]] = {side: points(report, label, side, [subject]) for side in SIDES}
    return frontier_curve(series, levels, dict(WORDS), report.recipe.gate.claimed_displacement)


def frontiers(report: Report) -> list[dict[str, Any]]:
    """Chart and table of every attack and class, protected subjects pooled; none where no displacement was measured."""
    result, groups = [], groups_of(report)
    for label in report.recipe.verify.attacks:
        for noun, ids in groups.items():
            series: dict[str, list[Point]] = {side: points(report, label, side, ids) for side in SIDES}
            if any(series.values()):
                title = label if len(groups) == 1 else f"{label}, class {noun}"
                curve = frontier_curve(
                    series, report.calibration[noun], dict(WORDS), report.recipe.gate.claimed_displacement
                )
                result.append({"title": title, "curve": curve, "headings": HEADINGS, "rows": table(report, label, ids)})
    return result


def compared_frontiers(reports: Mapping[str, Report]) -> tuple[list[tuple[str, Curve]], dict[str, str]]:
    """A chart for every attack and class, with the base and the hardened model of every run, and what its series are called.

    Args:
        reports: name of the run -> its report, of what all of them have in common.

    Raises:
        UserError: no displacement was measured.
    """
    first = next(iter(reports.values()))
    keys = {f"run{number}": name for number, name in enumerate(reports, 1)}
    names, charts, groups = {"base": "base"} | keys, [], groups_of(first)
    for label in first.recipe.verify.attacks:
        for noun, ids in groups.items():
            series = {"base": points(first, label, "base", ids)}
            series |= {key: points(reports[name], label, "hardened", ids) for key, name in keys.items()}
            curve = frontier_curve(series, first.calibration[noun], names)
            if curve is not None:
                charts.append((label if len(groups) == 1 else f"{label}, class {noun}", curve))
    if not charts:
        raise UserError("these runs do not say how far attacks moved the weights; verify again")
    return charts, names
