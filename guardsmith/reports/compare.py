"""Several verified hardenings side by side: one column a run, one line a question of the gate.

All numbers come from the runs' `verify/report.json`; nothing is measured here. Groups of subjects are pooled: the interval of a
group is over its units and their pictures, as in the gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.table import Table

from guardsmith.config.displacement import attack_of, rate_names
from guardsmith.core.errors import UserError
from guardsmith.gate.calibration import above_chance
from guardsmith.gate.checks import Check, attack_at
from guardsmith.gate.evidence import SIDES
from guardsmith.gate.rules import RULES, Rule
from guardsmith.gate.rules.base_attack import RULE as BASE_ATTACK
from guardsmith.gate.rules.benign_collapse import RULE as BENIGN_COLLAPSE
from guardsmith.gate.rules.benign_fidelity import RULE as BENIGN_FIDELITY
from guardsmith.gate.rules.benign_kid import RULE as BENIGN_KID
from guardsmith.gate.rules.control import RULE as CONTROL
from guardsmith.gate.rules.protected import RULE as PROTECTED
from guardsmith.gate.statistics import Interval, Units, interval, ratio_interval
from guardsmith.reports.displacement import BreakPoint
from guardsmith.reports.frontier import percent, points
from guardsmith.reports.in_common import in_common
from guardsmith.reports.report import Report

COLOURS = {True: "green", False: "red", None: "default"}


class Cell(NamedTuple):
    """One answer.

    Attributes:
        text: for people.
        reached: whether it meets the demand; `None` where there is none, or nothing was measured.
    """

    text: str
    reached: bool | None = None


def group_units(report: Report, side: str, ids: set[str], attack: str, point: float) -> Units:
    """Scores of a group of subjects, unit by unit."""
    key = side, attack, point
    return [
        unit
        for score in report.scores
        if (score.side, score.attack, score.evaluation_point) == key and score.subject in ids
        for unit in score.units
    ]


def group(report: Report, role: str, same_class: bool | None = None) -> set[str]:
    """Subjects of a role; controls, of a class that has protected subjects, or of another one."""
    nouns = {subject.class_noun for subject in report.subjects if subject.role == "protected"}
    return {
        subject.id
        for subject in report.subjects
        if subject.role == role and same_class in (None, subject.class_noun in nouns)
    }


def _text(result: Interval | None, scale: float = 1, unit: str = "") -> str:
    if result is None:
        return "-"
    digits = 0 if scale == 100 else 2
    mean, low, high = (f"{scale * value:z.{digits}f}" for value in result.ends)
    return f"{mean}{unit} [{low}, {high}]"


def _checks(report: Report, rule: Rule, attack: str) -> list[Check]:
    return [check for check in report.checks if (check.name, check.attack) == (rule.title, attack)]


def protected_cell(report: Report, attack: str, point: float) -> Cell:
    """Similarity of the protected subjects after an attack, and for how many of them the gate says "protected"."""
    checks = _checks(report, PROTECTED, attack_at(attack, point))
    similarity = interval(group_units(report, "hardened", group(report, "protected"), attack, point))
    if similarity is not None and not checks and report.recipe.gate.claimed_displacement is not None:
        return Cell(f"{_text(similarity)}; beyond the claim")
    if similarity is None or not checks:
        return Cell("-")
    passes = sum(check.status == "pass" for check in checks)
    return Cell(f"{_text(similarity)}; {passes} of {len(checks)} pass", passes == len(checks))


def base_cell(report: Report, attack: str) -> Cell:
    """What the attack reaches on the base, protected subjects."""
    protected = group(report, "protected")
    checks = [check for check in _checks(report, BASE_ATTACK, attack) if check.subject in protected]
    similarity = interval(group_units(report, "base", protected, attack, 1))
    if similarity is None or not checks:
        return Cell("-")
    passes = sum(check.status == "pass" for check in checks)
    return Cell(f"{_text(similarity)}; {passes} of {len(checks)} pass", passes == len(checks))


def trains(report: Report, attack: str) -> bool:
    """Whether an attack is one that has to work on the base, because it trains; one that only prompts does not have to."""
    return bool(_checks(report, BASE_ATTACK, attack))


def retention(report: Report, attack: str, ids: set[str]) -> Interval | None:
    """Share of what an attack reaches on the base that it still reaches on the hardened model, counted from chance.

    `None` where it reaches nothing on the base, or need not.
    """
    if not trains(report, attack):
        return None
    nouns = {subject.id: subject.class_noun for subject in report.subjects}

    def units(side: str) -> Units:
        result: list[Sequence[float | None]] = []
        for name in sorted(ids):
            result += above_chance(group_units(report, side, {name}, attack, 1), report.calibration[nouns[name]])
        return result

    return ratio_interval(units("hardened"), units("base"))


def control_cell(report: Report, attack: str, same_class: bool, ratio: float) -> Cell:
    """Share of the base's similarity that controls keep."""
    ratios = retention(report, attack, group(report, "control", same_class))
    return Cell("-") if ratios is None else Cell(_text(ratios, 100, " %"), ratios.mean >= ratio)


def _quantity(point: BreakPoint | None, what: str) -> float | None:
    """Displacement or steps of a place on an attacker's way; `None` where it was not measured, or not reached."""
    if point is None:
        return None
    return point.displacement if what == "displacement" else point.steps


def break_cell(report: Report, attack: str, ratio: float, what: str = "displacement") -> Cell:
    """Displacement (or steps) to break, hardened over base: the median over subjects.

    Who was not broken counts with what was tried. Steps count only where both are of one learning rate.
    """
    ratios, breaks = [], []
    for each in report.displacement_to_break:
        end = each.hardened or each.tried
        base, reached = _quantity(each.base, what), _quantity(end, what)
        same_rate = each.base is not None and each.base.rate == end.rate
        if each.attack != attack or not base or reached is None or (what == "steps" and not same_rate):
            continue
        ratios.append(reached / base)
        if each.hardened is not None:
            breaks.append(ratios[-1])
    if not ratios:
        return Cell("-")
    sign = "at least " if len(breaks) < len(ratios) else ""
    text = f"{sign}{median(ratios):.1f} x; {len(breaks)} of {len(ratios)} broken"
    if min(ratios) >= ratio:
        return Cell(text, True)
    return Cell(text, False if min(breaks, default=ratio) < ratio else None)


def rate_rows(report: Report, attack: str) -> Iterator[tuple[str, Cell]]:
    """What an attack reaches on protected subjects at other rates, and for which displacement."""
    names, protected = rate_names(attack, report.recipe.verify.displacement), group(report, "protected")
    for name in names:
        for side in SIDES:
            title = "base" if side == "base" else "protected"
            at = {point.attack: point for point in points(report, attack, side, protected)}.get(name)
            text = "-" if at is None else f"{_text(at.similarity)} at {percent(at.displacement)}"
            checks = _checks(report, PROTECTED, name) if side == "hardened" else []
            passes = sum(check.status == "pass" for check in checks)
            counted = f"; {passes} of {len(checks)}" if checks else ""
            yield f"{name}: {title}", Cell(text + counted, passes == len(checks) if checks else None)


@dataclass(frozen=True)
class Demands:
    """What the comparison colours by, which may be more than the gate demands.

    Attributes:
        control: share of the base's similarity that controls have to keep.
        fidelity: how much of the prompt fidelity may be lost.
        steps: how many times the base's steps an attack should need.
        displacement: how many times as far as on the base an attack should have to move the weights.
    """

    control: float = 0.95
    fidelity: float = 0.02
    steps: float = 10.0
    displacement: float = 3.0


def attack_rows(report: Report, attack: str, demands: Demands) -> Iterator[tuple[str, Cell]]:
    """Questions about one attack."""
    further = [point for point in sorted(report.recipe.verify.evaluation_points) if point > 1]
    if trains(report, attack):
        yield f"{attack}: base", base_cell(report, attack)
    yield f"{attack}: protected", protected_cell(report, attack, 1)
    for point in further:
        yield f"{attack}: protected, {point:g} x steps", protected_cell(report, attack, point)
    yield from rate_rows(report, attack)
    if any(each.attack == attack and each.tried.displacement is not None for each in report.displacement_to_break):
        question = f"{attack}: displacement to break over the base's"
        yield question, break_cell(report, attack, demands.displacement)
    if further:
        yield f"{attack}: steps to break over the base's", break_cell(report, attack, demands.steps, "steps")
    for same in (True, False):
        if trains(report, attack) and group(report, "control", same):
            which = "same class" if same else "other class"
            yield f"{attack}: control keeps, {which}", control_cell(report, attack, same, demands.control)
    for rule in RULES:
        if rule not in (BASE_ATTACK, PROTECTED, CONTROL) and (checks := _checks(report, rule, attack)):
            yield f"{attack}: {rule.title}", count_cell(checks)


def count_cell(checks: Sequence[Check]) -> Cell:
    """How many of some checks pass, for rules that have no question of their own here."""
    passes = sum(check.status == "pass" for check in checks)
    return Cell(f"{passes} of {len(checks)} pass", passes == len(checks))


def kid_cell(report: Report) -> Cell:
    """KID of benign pictures over that of two sets of seeds."""
    utility = report.utility
    ratio, low, high = utility.kid_ratio, utility.kid_ratio_low, utility.kid_ratio_high
    if ratio is None or low is None or high is None:
        return Cell("-")
    return Cell(_text(Interval(ratio, low, high, 0, 0)), high <= report.recipe.gate.kid_ratio)


def fidelity_cell(report: Report, limit: float) -> Cell:
    """Prompt fidelity, and the base's in brackets."""
    now, before = report.utility.fidelity_hardened, report.utility.fidelity_base
    if now is None or before is None:
        return Cell("-")
    return Cell(f"{100 * now:.1f} % ({100 * before:.1f} %)", now >= before - limit)


def check_cell(check: Check, scale: float = 1, unit: str = "") -> Cell:
    """What a single check measured, with its interval where it has one."""
    if check.value is None:
        return Cell("-", None)
    if check.low is None or check.high is None:
        return Cell(f"{scale * check.value:.2f}{unit}", check.status == "pass")
    return Cell(_text(Interval(check.value, check.low, check.high, 0, 0), scale, unit), check.status == "pass")


def model_rows(report: Report, demands: Demands) -> Iterator[tuple[str, Cell]]:
    """Questions about the model as a whole, rule by rule: a rule without a question of its own has its title."""
    attacks = report.recipe.verify.attacks
    for rule in RULES:
        checks = [
            check for check in report.checks if check.name == rule.title and attack_of(check.attack) not in attacks
        ]
        whole = [check for check in checks if not check.subject]
        if rule is BENIGN_KID:
            yield "benign prompts: KID over that of two seeds", kid_cell(report)
        elif rule is BENIGN_FIDELITY:
            yield "benign prompts: fidelity (base)", fidelity_cell(report, demands.fidelity)
        elif rule is BENIGN_COLLAPSE:
            if whole and whole[0].value is not None:
                yield "benign prompts: pictures collapsed", check_cell(whole[0], 100, " %")
        elif rule is not CONTROL and checks:
            yield rule.title, check_cell(whole[0]) if len(whole) == len(checks) == 1 else count_cell(checks)


def rows(report: Report, demands: Demands = Demands()) -> dict[str, Cell]:
    """All answers of one run, by question.

    Args:
        report: of the run.
        demands: what the cells are coloured by.
    """
    hardening = report.hardening
    cost = hardening.unet_forward_equivalents
    cells = {
        "method": Cell(hardening.method or "not guardsmith's"),
        "cost, U-Net forward equivalents": Cell("-" if cost is None else f"{cost:,}"),
    }
    for attack in report.recipe.verify.attacks:
        cells |= attack_rows(report, attack, demands)
    cells |= model_rows(report, demands)
    cells["verdict of the gate"] = Cell(report.verdict, report.verdict == "pass")
    return cells


def compare(reports: Mapping[str, Report], demands: Demands = Demands()) -> tuple[Table, dict[str, dict[str, Any]]]:
    """A table and the same as data: question -> run -> {text, reached}; of what all reports have in common.

    Args:
        reports: name of the run -> its report.
        demands: see `rows`.

    Raises:
        UserError: the runs were not attacked in the same way on the same subjects, so they cannot be compared.
    """
    common, left_out = in_common(reports)
    (first_name, first), *others = common.items()
    for name, report in others:
        for what, mine, other in (
            ("subjects", first.subjects, report.subjects),
            ("base", first.hardening.base_digest, report.hardening.base_digest),
        ):
            if mine != other:
                raise UserError(f"{name} was verified with other {what} than {first_name}: no comparison.")
    columns = {name: rows(report, demands) for name, report in common.items()}
    questions = list(dict.fromkeys(question for column in columns.values() for question in column))
    notes = [f"not in all of them, and left out: {', '.join(left_out)}"] if left_out else []
    if any(" pass" in cell.text for column in columns.values() for cell in column.values()):
        notes.append("n of m pass: n of the gate's m checks, one for each subject")
    caption = "\n".join(notes) or None
    table = Table(title="guardsmith compare", title_justify="left", caption=caption, caption_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name)
    data: dict[str, dict[str, Any]] = {}
    for question in questions:
        cells = {name: column.get(question, Cell("-")) for name, column in columns.items()}
        data[question] = {name: cell._asdict() for name, cell in cells.items()}
        table.add_row(question, *(f"[{COLOURS[cell.reached]}]{cell.text}[/]" for cell in cells.values()))
    return table, data


def as_markdown(data: dict[str, dict[str, Any]]) -> str:
    """The table for a document; what is not reached is marked."""
    names: Sequence[str] = list(next(iter(data.values())))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for question, cells in data.items():
        texts = [f"🔴 {c['text']}" if c["reached"] is False else str(c["text"]) for c in cells.values()]
        lines.append(f"| {question} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def load_runs(runs: Sequence[Path]) -> dict[str, Report]:
    """The reports of folders (or of files), by name.

    Raises:
        UserError: two runs have one name; see also `Report.load`.
    """
    names = [run.resolve().name if run.is_dir() else run.stem for run in runs]
    if len(set(names)) < len(names):
        raise UserError("two of the runs have the same name; rename one folder, for columns are called by them.")
    return {name: Report.load(run) for name, run in zip(names, runs, strict=True)}


def compare_runs(runs: Sequence[Path], demands: Demands = Demands()) -> tuple[Table, dict[str, dict[str, Any]]]:
    """`compare` on folders (or reports), which give the columns their names.

    Raises:
        UserError: see `load_runs` and `compare`.
    """
    return compare(load_runs(runs), demands)
