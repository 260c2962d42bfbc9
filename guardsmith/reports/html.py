"""`report.html`: the verification as one page that needs nothing else, for people who decide and people who audit.

Everything is in the file (styles, pictures, curves), it runs no script and asks no server. Pictures of real persons are left out
unless asked for: a report travels further than the machine it was made on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from guardsmith.config.displacement import attack_of, rate_names
from guardsmith.config.recipe import AttackSpec
from guardsmith.config.threat_model import CLAIMS
from guardsmith.core.atomic_io import write_text
from guardsmith.core.images import open_image
from guardsmith.gate.calibration import Levels
from guardsmith.gate.checks import Check, Status, attack_at, word
from guardsmith.gate.rules import RULES, rule_of
from guardsmith.gate.rules.base_attack import RULE as BASE_ATTACK
from guardsmith.gate.rules.protected import RULE as PROTECTED
from guardsmith.gate.statistics import Interval
from guardsmith.registry.loader import Subject
from guardsmith.reports import everyday
from guardsmith.reports.curves import CURVE, SIDES, curve, templates
from guardsmith.reports.evidence import AttackRun
from guardsmith.reports.frontier import BREAK_HEADINGS, break_table, percent
from guardsmith.reports.frontier_charts import frontiers, subject_curve
from guardsmith.reports.limits import not_shown
from guardsmith.reports.report import Report
from guardsmith.reports.strips import ROW, Picture, Strip, caption_of, drawn_strip, embedded, real_strip, strip_address

FAILED_ROW = 8  # where a check did not pass
MOST = 1_000_000
"""Characters of the pictures under failures, under protected subjects, and under controls: a page of hundreds of subjects has to
open in a browser and go through the mail. The first ones have theirs; numbers are there for everybody."""
WORDS: dict[Status, str] = {
    "pass": "Pass: the attacks below failed on this model, and no other check found it worse than its base allows.",
    "fail": "Fail: this model must not be released as protected.",
    "inconclusive": "Inconclusive: what was measured does not allow a verdict, so the model must not be released as protected.",
}


def may_be_shown(subject: Subject, include_images: bool) -> bool:
    """Whether pictures of a subject may be on the page: not those of a person, unless asked for or the person is invented."""
    return include_images or subject.kind != "person" or subject.is_invented


def released_strip(evidence: Evidence, subject: Subject, count: int) -> Strip | None:
    """What the released weights draw of a protected subject before anyone attacks: the first pictures, not the best ones."""
    files = evidence.released.get(subject.id, ())[:count]
    if not files:
        return None
    captions = [caption_of(score) for score in evidence.report.released[subject.id][:count]]
    pictures = [
        Picture(embedded(open_image(file)), f"{subject.id} as the released weights draw it, similarity {text}", text)
        for file, text in zip(files, captions, strict=True)
    ]
    return Strip("released weights, without an attack", pictures)


def heat(value: float, levels: Levels) -> int:
    """Where a similarity lies from chance (0) to genuine (100)."""
    share = (value - levels.chance) / (levels.genuine - levels.chance)
    return round(100 * min(1.0, max(0.0, share)))


@dataclass(frozen=True)
class Evidence:
    """A report and the pictures that belong to it.

    Attributes:
        report: of the verification.
        units: of the attack matrix, both sides.
        include_images: show persons too.
        released: protected subject -> what the released weights draw of it.
        only_invented: show nobody else, whatever they are: the page is for the public.
        root: folder of the verification, where the pictures of everyday use are; `None` leaves them out.
    """

    report: Report
    units: Sequence[AttackRun]
    include_images: bool
    released: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    only_invented: bool = False
    root: Path | None = None

    @property
    def attacks(self) -> dict[str, AttackSpec]:
        """Label -> name and settings."""
        return self.report.recipe.verify.attacks

    @property
    def columns(self) -> dict[str, tuple[str, float]]:
        """What checks call an attack at an evaluation point -> its name and the point.

        From the usual steps on, and everything else that is judged: earlier points and other rates.
        """
        verify, columns = self.report.recipe.verify, {}
        judged = {check.attack for check in self.report.checks if check.name == PROTECTED.title}
        for label in self.attacks:
            for name in (label, *rate_names(label, verify.displacement)):
                for point in sorted(verify.evaluation_points):
                    if attack_at(name, point) in judged or (name == label and point >= 1):
                        columns[attack_at(name, point)] = name, point
        return columns

    def shows(self, subject: Subject) -> bool:
        """See `may_be_shown`."""
        return subject.is_invented if self.only_invented else may_be_shown(subject, self.include_images)

    @cached_property
    def _units(self) -> dict[tuple[str, str, str], list[AttackRun]]:
        found: dict[tuple[str, str, str], list[AttackRun]] = {}
        for unit in self.units:
            found.setdefault((unit.subject, unit.label, unit.side), []).append(unit)
        return found

    @cached_property
    def _intervals(self) -> dict[tuple[str, str, str, float], Interval | None]:
        scores = self.report.scores
        return {(each.side, each.subject, each.attack, each.evaluation_point): each.interval for each in scores}

    @cached_property
    def _checks(self) -> dict[str, list[Check]]:
        found: dict[str, list[Check]] = {}
        for check in self.report.checks:
            found.setdefault(check.subject, []).append(check)
        return found

    def units_of(self, subject: Subject, label: str, side: str) -> list[AttackRun]:
        """One for every identifier and seed."""
        return self._units.get((subject.id, label, side), [])

    def measured(self, side: str, subject: Subject, label: str, point: float) -> Interval | None:
        """The similarity that an attack reached."""
        return self._intervals.get((side, subject.id, label, point))

    def checks_of(self, subject: Subject) -> list[Check]:
        """Those of one subject, in the report's order."""
        return self._checks.get(subject.id, [])

    def levels_of(self, subject: Subject) -> Levels:
        """Levels of its class."""
        return self.report.calibration[subject.class_noun]

    def strips(self, subject: Subject, label: str, point: float, count: int) -> list[Strip]:
        """What an attack draws on either side, or, beyond the usual steps, on the hardened model."""
        after = "" if point == 1 else f", {point:g} × the usual steps"
        return [
            drawn_strip(self.units_of(subject, label, side), f"{label} {words}{after}", point, count)
            for side, words in SIDES
            if point <= 1 or side == "hardened"
        ]


class Failure(NamedTuple):
    """A check that did not pass, with the pictures it is about."""

    check: Check
    strips: list[Strip]


def _length(strips: Sequence[Strip | None]) -> int:
    return sum(len(picture.data) for strip in strips if strip is not None for picture in strip.pictures)


def failures(evidence: Evidence, subjects: Mapping[str, Subject]) -> list[Failure]:
    """Checks that did not pass; the failed before the undecided."""
    result, length = [], 0
    for status in ("fail", "inconclusive"):
        for check in (check for check in evidence.report.checks if check.status == status):
            subject, strips = subjects.get(check.subject), []
            if subject is not None and evidence.shows(subject) and length < MOST:
                strips = [real_strip(subject)]
                if check.attack in evidence.columns:
                    strips += evidence.strips(subject, *evidence.columns[check.attack], FAILED_ROW)
                elif (strip := released_strip(evidence, subject, FAILED_ROW)) is not None:
                    strips.append(strip)
            length += _length(strips)
            result.append(Failure(check, strips))
    return result


def subject_section(evidence: Evidence, subject: Subject, role: str, has_pictures: bool) -> dict[str, Any]:
    """Everything about one subject, attack by attack."""
    shown, attacks = has_pictures and evidence.shows(subject), []
    for label, attack in evidence.attacks.items():
        points: dict[str, dict[int, Interval]] = {}
        for side, _ in SIDES:
            for unit in evidence.units_of(subject, label, side)[:1]:
                for point, steps in unit.evaluation_points.items():
                    if (similarity := evidence.measured(side, subject, label, point)) is not None:
                        points.setdefault(side, {})[steps] = similarity
        attacks.append({
            "label": label, "name": attack.name,
            "curve": subject_curve(evidence.report, label, subject.id, evidence.levels_of(subject))
            or curve(points, evidence.levels_of(subject), label),
            "strips": evidence.strips(subject, label, 1.0, ROW) if shown else [],
            "checks": [c for c in evidence.checks_of(subject) if attack_of(c.attack) == label],
        })  # fmt: skip
    return {
        "id": subject.id, "class_noun": subject.class_noun, "role": role, "attacks": attacks, "shown": evidence.shows(subject),
        "has_pictures": has_pictures, "real": real_strip(subject) if shown else None,
        "released": released_strip(evidence, subject, ROW) if shown else None,
        "checks": [c for c in evidence.checks_of(subject) if c.attack not in evidence.columns],
    }  # fmt: skip


def subject_sections(evidence: Evidence, subjects: Sequence[Subject], role: str) -> list[dict[str, Any]]:
    """Those of all protected subjects, or of all controls; pictures are with the first ones, as many as fit (`MOST`)."""
    sections, length = [], 0
    for subject in subjects:
        section = subject_section(evidence, subject, role, length < MOST)
        strips = [section["real"], section["released"], *(s for attack in section["attacks"] for s in attack["strips"])]
        length += _length(strips)
        sections.append(section)
    return sections


class Cell(NamedTuple):
    """One attack on one protected subject in the matrix.

    Attributes:
        mean: similarity that it reached.
        low: lower end of its interval.
        high: upper end.
        heat: see `heat`.
        status: of the check.
        word: for it.
    """

    mean: float
    low: float
    high: float
    heat: int
    status: Status
    word: str


def matrix_row(evidence: Evidence, subject: Subject) -> list[Cell | None]:
    """One protected subject's row: what each attack reached, and what the gate says of it; `None` where nothing was scored."""
    checks = [check for check in evidence.checks_of(subject) if check.name == PROTECTED.title]
    statuses = {check.attack: (check.status, word(check)) for check in checks}
    cells: list[Cell | None] = []
    for name, (label, point) in evidence.columns.items():
        similarity = evidence.measured("hardened", subject, label, point)
        if similarity is None:
            cells.append(None)
            continue
        hot = heat(similarity.mean, evidence.levels_of(subject))
        claim = evidence.report.recipe.gate.claimed_displacement
        # Without a claim everything is judged, so the rule failed to run.
        unknown: tuple[Status, str] = ("inconclusive", "inconclusive" if claim is None else "beyond the claim")
        cells.append(Cell(similarity.mean, similarity.low, similarity.high, hot, *statuses.get(name, unknown)))
    return cells


def face_detection_failures(report: Report, protected: Sequence[Subject]) -> dict[str, float]:
    """Share of pictures without a face (FDFR), by whom they should show and which model drew them; empty for other judges."""
    names = {subject.id for subject in protected}
    shares: dict[str, list[float]] = {}
    for score in report.scores:
        if score.fdfr is not None:
            who = "protected subjects" if score.subject in names else "controls"
            shares.setdefault(f"{who} {dict(SIDES)[score.side]}", []).append(score.fdfr)
    return {who: sum(each) / len(each) for who, each in shares.items()}


def counts_by_rule(report: Report) -> list[tuple[str, list[int]]]:
    """For every rule of which there are checks, its explanation and how many passed, failed and are inconclusive."""
    titles = dict.fromkeys([*(rule.title for rule in RULES), *(check.name for check in report.checks)])
    result = []
    for title in titles:
        statuses = [check.status for check in report.checks if check.name == title]
        rule = rule_of(title)
        if statuses:
            counts = [statuses.count(status) for status in WORDS]
            result.append((title if rule is None else rule.explanation, counts))
    return result


def opening_strips(evidence: Evidence, protected: Sequence[Subject], controls: Sequence[Subject]) -> list[Strip]:
    """What a person understands at once: a subject, what an attack makes of it on either model, and a control.

    Those who come first in the registry and the recipe, not the best ones; empty where nobody may be shown.
    """
    first = next((subject for subject in protected if evidence.shows(subject)), None)
    label = next(iter(evidence.attacks), None)
    if first is None or label is None:
        return []
    strips = [real_strip(first)._replace(title=f"{first.id}, protected: real pictures")]
    strips += evidence.strips(first, label, 1.0, ROW)
    control = next((subject for subject in controls if evidence.shows(subject)), None)
    if control is not None:
        units = evidence.units_of(control, label, "hardened")
        title = f"{control.id}, a control, on which attacks have to succeed: {label} on the hardened model"
        strips.append(drawn_strip(units, title, 1.0, ROW))
    return strips


def page_data(
    evidence: Evidence,
    protected: Sequence[Subject],
    controls: Sequence[Subject],
    benign: Sequence[tuple[str, Image.Image, Image.Image]],
) -> dict[str, Any]:
    """Everything that the template reads.

    Args:
        evidence: report and pictures.
        protected: the subjects that were attacked.
        controls: the controls.
        benign: prompt, the base's picture and the hardened model's, from the same noise.
    """
    report = evidence.report
    sections = subject_sections(evidence, protected, "protected") + subject_sections(evidence, controls, "control")
    pairs = [
        (prompt, Picture(embedded(before), f"the base's picture of: {prompt}"),
         Picture(embedded(after), f"the hardened model's picture of: {prompt}"))
        for prompt, before, after in benign
    ]  # fmt: skip
    return {
        "report": report, "claims": CLAIMS, "words": WORDS[report.verdict],
        "opening": opening_strips(evidence, protected, controls), "not_shown": not_shown(report), "word": word,
        "counts": counts_by_rule(report), "sections": sections,
        "failures": failures(evidence, {subject.id: subject for subject in (*protected, *controls)}),
        "columns": list(evidence.columns.values()), "base_attack": BASE_ATTACK.title,
        "cells": [(subject.id, matrix_row(evidence, subject)) for subject in protected],
        "model_checks": [check for check in report.checks if not check.subject and not check.attack],
        "everyday": everyday.sections(
            report, evidence.root, {subject.id: subject for subject in (*protected, *controls)}, evidence.shows, strip_address
        ),
        "hidden": [section["id"] for section in sections if not section["shown"]], "public": evidence.only_invented,
        "without_room": sum(section["shown"] and not section["has_pictures"] for section in sections),
        "curve_size": CURVE, "benign": pairs, "frontiers": frontiers(report), "breaks": break_table(report),
        "break_headings": BREAK_HEADINGS, "percent": percent,
        "face_detection_failures": face_detection_failures(report, protected),
    }  # fmt: skip


def save_page(path: Path, data: dict[str, Any]) -> None:
    """Fill the template in; the file appears whole."""
    write_text(path, templates().get_template("report.html").render(**data))
