"""Similarity against displacement: what an attack reaches, for how far it moves the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import NamedTuple

from guardsmith.config.displacement import names_of_attacks
from guardsmith.gate.checks import attack_at
from guardsmith.gate.evidence import SIDES, Side
from guardsmith.gate.statistics import Interval, interval
from guardsmith.reports.displacement import BreakPoint, Displacement
from guardsmith.reports.report import Report, Score


class Point(NamedTuple):
    """One attack at one evaluation point, over several subjects.

    Attributes:
        attack: what checks call it.
        displacement: mean relative change of the weights' norm.
        similarity: that it reached.
        rate: learning rate.
        steps: optimizer steps.
    """

    attack: str
    displacement: float
    similarity: Interval
    rate: float | None
    steps: int


def _measured(score: Score) -> Displacement | None:
    """How far the attack moved the weights; `None` where it was not measured, or did not move them."""
    return score.displacement if score.displacement is not None and score.displacement.overall else None


def points(report: Report, label: str, side: Side, ids: Iterable[str]) -> list[Point]:
    """Everything that an attack reached on one model, by displacement.

    Args:
        report: of the verification.
        label: of the attack; its runs at other rates and its just-enough run are in it.
        side: the model attacked.
        ids: subjects that are pooled.
    """
    who = set(ids)
    names = names_of_attacks(report.recipe.verify.attacks, report.recipe.verify.displacement).get(label, [])
    groups: dict[tuple[str, float], list[Score]] = {}
    for score in report.scores:
        if score.side == side and score.subject in who and score.attack in names and _measured(score) is not None:
            groups.setdefault((score.attack, score.evaluation_point), []).append(score)
    result = []
    for (name, point), scores in groups.items():
        similarity = interval([unit for score in scores for unit in score.units])
        moved = [each for each in map(_measured, scores) if each is not None]
        if similarity is not None:
            overall = mean(each.overall or 0.0 for each in moved)
            steps = max(each.steps for each in moved)
            result.append(Point(attack_at(name, point), overall, similarity, moved[0].rate, steps))
    return _without_repeats(result)


def _without_repeats(found: Sequence[Point]) -> list[Point]:
    """By displacement; an attack that succeeded early is the same at all evaluation points after its end."""
    first: dict[tuple[float, Interval], Point] = {}
    for point in found:
        first.setdefault((point.displacement, point.similarity), point)
    return sorted(first.values(), key=lambda each: each.displacement)


def frontier(ordered: Sequence[Point]) -> list[Point]:
    """The points that reach more than every smaller displacement does: what an attacker gets for it at best."""
    best: list[Point] = []
    for point in ordered:
        if not best or point.similarity.mean > best[-1].similarity.mean:
            best.append(point)
    return best


def groups_of(report: Report) -> dict[str, list[str]]:
    """Class noun -> ids of its protected subjects, whose similarities can be pooled."""
    groups: dict[str, list[str]] = {}
    for subject in report.subjects:
        if subject.role == "protected":
            groups.setdefault(subject.class_noun, []).append(subject.id)
    return groups


def percent(value: float | None) -> str:
    """A displacement for people."""
    return "-" if value is None else f"{100 * value:.2g} %"


HEADINGS = ("attack", "rate", "steps", "largest possible", "base: displacement", "down / mid / up / text encoder",
            "base: similarity", "hardened: displacement", "hardened: similarity")  # fmt: skip
BLOCKS = ("down", "mid", "up", "text_encoder")


def table(report: Report, label: str, ids: Iterable[str]) -> list[list[str]]:
    """A row, as `HEADINGS` has it, for everything that an attack reached on protected subjects, by displacement.

    Args:
        report: of the verification.
        label: of the attack.
        ids: subjects that are pooled.
    """
    who = list(ids)
    by_side = {side: {point.attack: point for point in points(report, label, side, who)} for side in SIDES}
    ordered = [*by_side["base"].values(), *(p for p in by_side["hardened"].values() if p.attack not in by_side["base"])]
    names = [point.attack for point in sorted(ordered, key=lambda point: point.displacement)]
    records: dict[str, list[Displacement]] = {}
    for score in report.scores:
        if score.subject in who and (moved := _measured(score)) is not None:
            at = attack_at(score.attack, score.evaluation_point)
            if score.side == "base" or at not in by_side["base"]:
                records.setdefault(at, []).append(moved)
    rows = []
    for name in names:
        moved = records[name][0]
        parts = [mean(each.blocks.get(block, 0.0) for each in records[name]) for block in BLOCKS]
        cells = [name, "-" if moved.rate is None else f"{moved.rate:.3g}", str(moved.steps)]
        cells.append("-" if moved.largest_possible is None else f"{moved.largest_possible:.2g}")
        for side in SIDES:
            point = by_side[side].get(name)
            cells.append(percent(None if point is None else point.displacement))
            if side == "base":
                cells.append(" / ".join(f"{100 * part:.2g}" for part in parts) + " %")
            cells.append("-" if point is None else in_words(point.similarity))
        rows.append(cells)
    return rows


def in_words(similarity: Interval) -> str:
    """A mean with its interval."""
    mean_, low, high = (f"{value:z.2f}" for value in similarity.ends)
    return f"{mean_} [{low}, {high}]"


BREAK_HEADINGS = ("subject", "attack", "base", "hardened", "tried on the hardened model")


def break_table(report: Report) -> list[list[str]]:
    """A row, as `BREAK_HEADINGS` has it, for every protected subject and attack that went on, or ran at several rates."""
    return [
        [each.subject, each.attack, *(_place(point) for point in (each.base, each.hardened, each.tried))]
        for each in report.displacement_to_break
    ]


def _place(point: BreakPoint | None) -> str:
    if point is None:
        return "not reached"
    rate = "" if point.rate is None else f" at {point.rate:.3g}"
    return f"{percent(point.displacement)} ({point.steps} steps{rate})"
