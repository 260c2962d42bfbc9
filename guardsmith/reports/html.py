"""`report.html`: the verification as one page that needs nothing else, for people who decide and people who audit.

Everything is in the file (styles, pictures, curves), it runs no script and asks no server. Pictures of real persons are left out
unless asked for: a report travels further than the machine it was made on.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from guardsmith.core.atomic_io import write_text
from guardsmith.core.images import open_image, square
from guardsmith.gate.rules import attack_at
from guardsmith.registry.loader import Subject
from guardsmith.reports.evidence import AttackRun

SHOWN = 4  # pictures of a row
FAILED_SHOWN = 8  # where a check did not pass
PIXELS = 128
CURVE = (260, 110)  # of the drawing area, in units of the SVG
SIDES = (("base", "on the base model"), ("hardened", "on the hardened model"))
WORDS = {
    "pass": "Pass: this model withstood the attacks below, and is otherwise as good as its base.",
    "fail": "Fail: this model must not be released as protected.",
    "inconclusive": "Inconclusive: what was measured does not allow a verdict, so the model must not be released as protected.",
}
PLAIN = {
    "attack works on base": "attacks learn their subject on the base model",
    "protected": "attacks on protected subjects fail on the hardened model",
    "released weights": "the released weights do not draw protected subjects by themselves",
    "control learnable": "unprotected subjects can still be learnt",
    "ordinary prompts (KID)": "pictures of ordinary prompts look as before",
    "ordinary prompts (destroyed)": "hardly any picture of an ordinary prompt is destroyed",
    "ordinary prompts (fidelity)": "pictures of ordinary prompts show what was asked for",
    "ordinary prompts (CLIP-T)": "pictures of ordinary prompts fit their prompts",
}


class Picture(NamedTuple):
    """One picture on the page.

    Attributes:
        data: the picture itself, a `data:` address.
        alt: what it is, in words.
        caption: beneath it.
    """

    data: str
    alt: str
    caption: str = ""


class Strip(NamedTuple):
    """A row of pictures.

    Attributes:
        title: what they have in common.
        pictures: empty where there are none, or where they are left out.
        missing: why it is empty.
    """

    title: str
    pictures: list[Picture]
    missing: str = ""


def is_invented(subject: Subject) -> bool:
    """Whether the subject is nobody, so that everything of it may be shown."""
    return subject.consent is not None and subject.consent.basis == "invented"


def may_be_shown(subject: Subject, include_images: bool) -> bool:
    """Whether pictures of a subject may be on the page: not those of a person, unless asked for or the person is invented."""
    return include_images or subject.kind != "person" or is_invented(subject)


def _embedded(image: Image.Image) -> str:
    file = io.BytesIO()
    square(image, min(PIXELS, *image.size)).save(file, "WEBP", quality=85, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _told(score: float | None) -> str:
    return "not scored" if score is None else f"{score:z.2f}"


def real_strip(subject: Subject) -> Strip:
    """What the judge compares with."""
    pictures = [
        Picture(_embedded(open_image(image.path)), f"{subject.id}, real picture {number}")
        for number, image in enumerate(subject.images_of("reference")[:SHOWN], 1)
    ]
    return Strip("real pictures", pictures)


def drawn_strip(units: Sequence[AttackRun], title: str, look: float, count: int) -> Strip:
    """What personalized models drew: the first pictures of every unit in turn, not the best ones."""
    if not units:
        return Strip(title, [], "not run")
    shown, share = [], -(-count // len(units))
    for unit in units:
        scores = unit.scores()
        if scores is None:
            continue
        for number, file in enumerate(unit.pictures(look)[:share]):
            told = _told(scores[look][number])
            alt = f"{unit.subject} as drawn after {unit.label} {dict(SIDES)[unit.side]}, similarity {told}"
            shown.append(Picture(_embedded(open_image(file)), alt, told))
    return Strip(title, shown[:count], "" if shown else "no pictures: the attack did not run")


def released_strip(evidence: Evidence, subject: Subject, count: int) -> Strip | None:
    """What the released weights draw of a protected subject before anyone attacks: the first pictures, not the best ones."""
    files = evidence.released.get(subject.id, ())[:count]
    if not files:
        return None
    told = [_told(score) for score in evidence.report["released"][subject.id][:count]]
    shown = [
        Picture(_embedded(open_image(file)), f"{subject.id} as the released weights draw it, similarity {score}", score)
        for file, score in zip(files, told, strict=True)
    ]
    return Strip("released weights, without an attack", shown)


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


def curve(levels: dict[str, dict[int, dict[str, Any]]], calibrated: dict[str, float], attack: str) -> Curve | None:
    """The curves of one subject under one attack; `None` unless there are two looks.

    Args:
        levels: side -> steps -> interval, from the report.
        calibrated: `chance_high` and `genuine` of the class.
        attack: its label.
    """
    steps = sorted({step for side in levels.values() for step in side})
    if len(steps) < 2:
        return None
    width, height = CURVE
    highest = max(calibrated["genuine"], *(v["high"] for side in levels.values() for v in side.values())) + 0.05
    lowest = min(-0.1, *(v["low"] for side in levels.values() for v in side.values()))

    def x(step: int) -> float:
        return round(width * math.log(step / steps[0]) / math.log(steps[-1] / steps[0]), 1)

    def y(value: float) -> float:
        return round(height * float(highest - value) / float(highest - lowest), 1)

    lines, bands, words = {}, {}, []
    for side, looks in levels.items():
        seen = sorted(looks)
        lines[side] = " ".join(f"{x(step)},{y(looks[step]['mean'])}" for step in seen)
        around = [(step, "high") for step in seen] + [(step, "low") for step in reversed(seen)]
        bands[side] = " ".join(f"{x(step)},{y(looks[step][end])}" for step, end in around)
        said = ", ".join(f"{looks[step]['mean']:z.2f} after {step} steps" for step in seen)
        words.append(f"{attack} {dict(SIDES)[side]}: {said}")
    ticks = [(x(step), step) for step in steps]
    return Curve(lines, bands, ticks, y(calibrated["chance_high"]), y(calibrated["genuine"]), "; ".join(words) + ".")


def heat(value: float, calibrated: dict[str, float]) -> int:
    """Where a similarity lies from chance (0) to genuine (100)."""
    share = (value - calibrated["chance"]) / (calibrated["genuine"] - calibrated["chance"])
    return round(100 * min(1.0, max(0.0, share)))


@dataclass(frozen=True)
class Evidence:
    """What a verification left, and how to find things in it.

    Attributes:
        report: what `report.json` holds.
        units: of the attack matrix, both sides.
        include_images: show persons too.
        released: protected subject -> what the released weights draw of it.
        only_invented: show nobody else, whatever they are: the page is for the public.
    """

    report: dict[str, Any]
    units: Sequence[AttackRun]
    include_images: bool
    released: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    only_invented: bool = False

    @property
    def attacks(self) -> dict[str, dict[str, Any]]:
        """Label -> name and settings."""
        return dict(self.report["recipe"]["verify"]["attacks"])

    @property
    def columns(self) -> dict[str, tuple[str, float]]:
        """What checks call an attack at a look -> its label and the look, from the usual steps on."""
        further = [look for look in sorted(self.report["recipe"]["verify"]["looks"]) if look > 1]
        return {attack_at(label, look): (label, look) for label in self.attacks for look in (1.0, *further)}

    def shows(self, subject: Subject) -> bool:
        """See `may_be_shown`."""
        return is_invented(subject) if self.only_invented else may_be_shown(subject, self.include_images)

    def units_of(self, subject: Subject, label: str, side: str) -> list[AttackRun]:
        """One for every identifier and seed."""
        return [unit for unit in self.units if (unit.subject, unit.label, unit.side) == (subject.id, label, side)]

    def level(self, side: str, subject: Subject, label: str, look: float) -> dict[str, Any] | None:
        """The interval that was measured."""
        asked = side, subject.id, label, look
        for told in self.report["scores"]:
            if (told["side"], told["subject"], told["attack"], told["look"]) == asked:
                return dict(told["interval"]) if told["interval"] is not None else None
        return None

    def calibrated(self, subject: Subject) -> dict[str, float]:
        """Levels of its class."""
        return dict(self.report["calibration"][subject.class_noun])

    def strips(self, subject: Subject, label: str, look: float, count: int) -> list[Strip]:
        """What an attack draws on either side, or, beyond the usual steps, on the hardened model."""
        after = "" if look == 1 else f", {look:g} × the usual steps"
        return [
            drawn_strip(self.units_of(subject, label, side), f"{label} {words}{after}", look, count)
            for side, words in SIDES
            if look == 1 or side == "hardened"
        ]


def failures(evidence: Evidence, everyone: dict[str, Subject]) -> list[dict[str, Any]]:
    """Checks that did not pass, with the pictures they are about; the failed before the undecided."""
    found = []
    for status in ("fail", "inconclusive"):
        for check in (check for check in evidence.report["checks"] if check["status"] == status):
            subject, rows = everyone.get(check["subject"]), []
            if subject is not None and check["attack"] and evidence.shows(subject):
                label, look = evidence.columns[check["attack"]]
                rows = [real_strip(subject), *evidence.strips(subject, label, look, FAILED_SHOWN)]
            elif subject is not None and evidence.shows(subject):
                drawn = released_strip(evidence, subject, FAILED_SHOWN)
                rows = [real_strip(subject), *([drawn] if drawn else [])]
            found.append(check | {"strips": rows})
    return found


def room(evidence: Evidence, subject: Subject, role: str) -> dict[str, Any]:
    """All that was found about one subject, attack by attack."""
    attacks = []
    for label, attack in evidence.attacks.items():
        levels: dict[str, dict[int, dict[str, Any]]] = {}
        for side, _ in SIDES:
            for unit in evidence.units_of(subject, label, side)[:1]:
                for look, steps in unit.looks.items():
                    if (level := evidence.level(side, subject, label, look)) is not None:
                        levels.setdefault(side, {})[steps] = level
        attacks.append({
            "label": label, "name": attack["name"], "curve": curve(levels, evidence.calibrated(subject), label),
            "strips": evidence.strips(subject, label, 1.0, SHOWN) if evidence.shows(subject) else [],
            "checks": [c for c in evidence.report["checks"]
                       if c["subject"] == subject.id and c["attack"] and evidence.columns[c["attack"]][0] == label],
        })  # fmt: skip
    return {
        "id": subject.id, "class_noun": subject.class_noun, "role": role, "attacks": attacks, "shown": evidence.shows(subject),
        "real": real_strip(subject) if evidence.shows(subject) else None,
        "released": released_strip(evidence, subject, SHOWN) if evidence.shows(subject) else None,
        "checks": [c for c in evidence.report["checks"] if c["subject"] == subject.id and not c["attack"]],
    }  # fmt: skip


def matrix_row(evidence: Evidence, subject: Subject) -> list[dict[str, Any] | None]:
    """One protected subject's row: after each attack its similarity, how hot that is, and what the gate says."""
    said = {c["attack"]: c["status"] for c in evidence.report["checks"]
            if (c["name"], c["subject"]) == ("protected", subject.id)}  # fmt: skip
    cells: list[dict[str, Any] | None] = []
    for name, (label, look) in evidence.columns.items():
        level = evidence.level("hardened", subject, label, look)
        if level is not None:
            level |= {"heat": heat(level["mean"], evidence.calibrated(subject)), "status": said[name]}
        cells.append(level)
    return cells


def faceless(report: dict[str, Any], protected: Sequence[Subject]) -> dict[str, float]:
    """Share of pictures without a face (FDFR), by whom they should show and which model drew them; empty for other judges."""
    names = {subject.id for subject in protected}
    shares: dict[str, list[float]] = {}
    for told in report["scores"]:
        if told.get("faceless") is not None:
            where = dict(SIDES)[told["side"]]
            who = "protected subjects" if told["subject"] in names else "controls"
            shares.setdefault(f"{who} {where}", []).append(told["faceless"])
    return {who: sum(found) / len(found) for who, found in shares.items()}


def page_data(
    evidence: Evidence,
    protected: Sequence[Subject],
    controls: Sequence[Subject],
    ordinary: Sequence[tuple[str, Image.Image, Image.Image]],
) -> dict[str, Any]:
    """Everything the template asks for.

    Args:
        evidence: what was found.
        protected: the subjects that were attacked.
        controls: the controls.
        ordinary: prompt, the base's picture and the hardened model's, from the same noise.
    """
    report = evidence.report
    rooms = [room(evidence, subject, "protected") for subject in protected]
    rooms += [room(evidence, subject, "control") for subject in controls]
    counts = {
        name: [sum(c["name"] == name and c["status"] == status for c in report["checks"]) for status in WORDS]
        for name in dict.fromkeys(check["name"] for check in report["checks"])
    }
    pairs = [
        (prompt, Picture(_embedded(before), f"the base's picture of: {prompt}"),
         Picture(_embedded(after), f"the hardened model's picture of: {prompt}"))
        for prompt, before, after in ordinary
    ]  # fmt: skip
    return {
        "report": report, "words": WORDS[report["verdict"]], "plain": PLAIN, "counts": counts, "rooms": rooms,
        "failures": failures(evidence, {subject.id: subject for subject in (*protected, *controls)}),
        "columns": list(evidence.columns.values()),
        "cells": [(subject.id, matrix_row(evidence, subject)) for subject in protected],
        "hidden": [told["id"] for told in rooms if not told["shown"]], "public": evidence.only_invented,
        "curve_size": CURVE, "ordinary": pairs,
        "faceless": faceless(report, protected),
    }  # fmt: skip


def save_page(path: Path, data: dict[str, Any]) -> None:
    """Fill the template in; the file appears whole."""
    environment = Environment(
        loader=PackageLoader("guardsmith"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    write_text(path, environment.get_template("report.html").render(**data))
