"""How far attacks moved the weights, as the report has it, and how far they have to for a subject to come back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from guardsmith.attacks.displacement import Movement, displacement, relative
from guardsmith.config.displacement import names_of_attacks
from guardsmith.config.recipe import GateSpec, VerifySpec
from guardsmith.evaluation.planning import learning_rate
from guardsmith.evaluation.units import Unit, movements_of
from guardsmith.gate.calibration import Levels, half_way, personalized_level
from guardsmith.gate.evidence import Side
from guardsmith.reports.displacement import BreakPoint, Displacement, DisplacementToBreak
from guardsmith.reports.report import Score

Key = tuple[Side, str, str, float]
"""Side, subject, name of the attack, evaluation point."""


def measured(
    movements: Sequence[tuple[int, Movement]], rate: float | None, steps: int, base: Mapping[str, float]
) -> Displacement:
    """What the report says of an attack: the mean over its units.

    Args:
        movements: of its units, with the steps that each had taken; empty where nothing is on record.
        rate: learning rate.
        steps: of the evaluation point.
        base: block -> norm of the base's weights, which everything is relative to: a hardened model may have rescaled weights.
    """
    if not movements:
        return Displacement(rate=rate, steps=steps)
    overall, blocks = [], []
    for _, each in movements:
        norms = {**each.norm, **base}
        overall.append(displacement(each.change, norms))
        blocks.append({block: relative(each.change, norms, [block]) for block in each.change})
    allowed = [each.allowed for _, each in movements if each.allowed is not None]
    return Displacement(
        rate=rate, steps=max(steps for steps, _ in movements), overall=mean(overall),
        largest_possible=max(allowed) if len(allowed) == len(movements) else None,
        largest=max(each.largest for _, each in movements),
        blocks={block: mean(each[block] for each in blocks) for block in blocks[0]},
    )  # fmt: skip


def displacements(units: Iterable[Unit], base: Mapping[str, float]) -> dict[Key, Displacement]:
    """How far every attack moved the weights, by side, subject, attack and evaluation point.

    Args:
        units: of both sides.
        base: see `measured`.
    """
    movements: dict[Key, list[tuple[int, Movement]]] = {}
    settings: dict[Key, tuple[float | None, int]] = {}
    for unit in units:
        moved, rate = movements_of(unit), learning_rate(unit.attack, unit.params)
        for point, steps in unit.evaluation_points.items():
            key = unit.side, unit.subject, unit.label, point
            settings[key] = rate, steps
            movements.setdefault(key, []).extend([moved[point]] if point in moved else [])
    return {key: measured(movements[key], *settings[key], base) for key in settings}


def _point(displacement: Displacement) -> BreakPoint:
    return BreakPoint(displacement=displacement.overall, rate=displacement.rate, steps=displacement.steps)


def _first(scores: Iterable[Score], level: float) -> BreakPoint | None:
    """The smallest displacement at which a level is reached; steps decide where it was not measured."""
    reached = [
        _point(score.displacement)
        for score in scores
        if score.interval is not None and score.interval.mean >= level and score.displacement is not None
    ]
    reached.sort(key=lambda point: (point.displacement is None, point.displacement or 0.0, point.steps))
    return reached[0] if reached else None


def displacement_to_break(
    scores: Sequence[Score],
    classes: Mapping[str, str],
    levels: Mapping[str, Levels],
    verify: VerifySpec,
    spec: GateSpec,
) -> list[DisplacementToBreak]:
    """How far attacks have to move the weights for half of the likeness that they usually reach on the base.

    That is the smallest displacement at which the mean similarity is half-way from chance to the level that the attack reaches on
    the base with its usual settings, over evaluation points and rates; `None` where it is so at none ("tried" says how far they
    went). Attacks that ran at one rate for no longer than usual are left out.

    Args:
        scores: of both sides, with displacements.
        classes: id -> class noun of the protected subjects.
        levels: of every class noun.
        verify: which attacks ran at other rates.
        spec: an attack that does not personalize the base by these rules breaks nothing.
    """
    result = []
    for label, names in names_of_attacks(verify.attacks, verify.displacement).items():
        for subject, noun in classes.items():
            mine = [score for score in scores if score.subject == subject and score.attack in names]
            hardened = [score for score in mine if score.side == "hardened" and score.displacement is not None]
            if not hardened or (len(names) == 1 and max(score.evaluation_point for score in hardened) <= 1):
                continue
            usual = next(
                (s.interval for s in mine if (s.side, s.attack, s.evaluation_point) == ("base", label, 1)), None
            )
            base = first = None
            if usual is not None and usual.mean >= personalized_level(levels[noun], spec):
                level = half_way(levels[noun], usual.mean)
                base, first = _first((s for s in mine if s.side == "base"), level), _first(hardened, level)
            points = [_point(score.displacement) for score in hardened if score.displacement is not None]
            tried = max(points, key=lambda point: (point.displacement or 0.0, point.steps))
            result.append(DisplacementToBreak(subject=subject, attack=label, base=base, hardened=first, tried=tried))
    return result
