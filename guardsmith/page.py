"""`report.html`: the verification as one page that needs nothing else, for people who decide and people who audit.

Everything is in the file (styles, pictures, curves), it runs no script and asks no server. Pictures of real persons are left out
unless asked for: a report travels further than the machine it was made on.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from guardsmith.images import open_image, square
from guardsmith.matrix import Unit, scores_of
from guardsmith.registry import Subject

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
    "control learnable": "unprotected subjects can still be learnt",
    "ordinary prompts (KID)": "pictures of ordinary prompts look as before",
    "ordinary prompts (fidelity)": "pictures of ordinary prompts show what was asked for",
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


def may_be_shown(subject: Subject, include_images: bool) -> bool:
    """Whether pictures of a subject may be on the page: not those of a person, unless asked for or the person is invented."""
    invented = subject.consent is not None and subject.consent.basis == "invented"
    return include_images or subject.kind != "person" or invented


def _embedded(image: Image.Image) -> str:
    file = io.BytesIO()
    square(image, min(PIXELS, *image.size)).save(file, "WEBP", quality=85, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def real_strip(subject: Subject) -> Strip:
    """What the judge compares with."""
    pictures = [
        Picture(_embedded(open_image(image.path)), f"{subject.id}, real picture {number}")
        for number, image in enumerate(subject.images_of("reference")[:SHOWN], 1)
    ]
    return Strip("real pictures", pictures)


def drawn_strip(units: Sequence[Unit], title: str, look: float, count: int) -> Strip:
    """What personalized models drew: the first pictures of every unit in turn, not the best ones."""
    if not units:
        return Strip(title, [], "not run")
    shown, share = [], -(-count // len(units))
    for unit in units:
        scores = scores_of(unit)
        if scores is None:
            continue
        for number, file in enumerate(unit.pictures(look)[:share]):
            score = scores[look][number]
            told = "not scored" if score is None else f"{score:.2f}"
            alt = f"{unit.subject} as drawn after {unit.label} {dict(SIDES)[unit.side]}, similarity {told}"
            shown.append(Picture(_embedded(open_image(file)), alt, told))
    return Strip(title, shown[:count], "" if shown else "no pictures: the attack did not run")


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
        said = ", ".join(f"{looks[step]['mean']:.2f} after {step} steps" for step in seen)
        words.append(f"{attack} {dict(SIDES)[side]}: {said}")
    ticks = [(x(step), step) for step in steps]
    return Curve(lines, bands, ticks, y(calibrated["chance_high"]), y(calibrated["genuine"]), "; ".join(words) + ".")


def heat(value: float, calibrated: dict[str, float]) -> int:
    """Where a similarity lies from chance (0) to genuine (100)."""
    share = (value - calibrated["chance"]) / (calibrated["genuine"] - calibrated["chance"])
    return round(100 * min(1.0, max(0.0, share)))


def page_data(
    report: dict[str, Any],
    units: Sequence[Unit],
    protected: Sequence[Subject],
    controls: Sequence[Subject],
    ordinary: Sequence[tuple[str, Image.Image, Image.Image]],
    *,
    include_images: bool,
) -> dict[str, Any]:
    """Everything the template asks for.

    Args:
        report: what `report.json` holds.
        units: of the attack matrix, both sides.
        protected: the subjects that were attacked.
        controls: the controls.
        ordinary: prompt, the base's picture and the hardened model's, from the same noise.
        include_images: show persons too.
    """
    everyone = {subject.id: subject for subject in (*protected, *controls)}
    spec = report["recipe"]["verify"]
    looks = [1.0, *(look for look in sorted(spec["looks"]) if look > 1)]
    found: dict[tuple[str, str, str, float], dict[str, Any]] = {
        (told["side"], told["subject"], told["attack"], told["look"]): told["interval"]
        for told in report["scores"]
        if told["interval"] is not None
    }

    def mine(subject: str, label: str, side: str) -> list[Unit]:
        return [unit for unit in units if (unit.subject, unit.label, unit.side) == (subject, label, side)]

    def strips(subject: Subject, label: str, look: float, count: int) -> list[Strip]:
        rows = []
        for side, words in SIDES:
            if look > 1 and side == "base":
                continue
            after = "" if look == 1 else f", {look:g} × the usual steps"
            rows.append(drawn_strip(mine(subject.id, label, side), f"{label} {words}{after}", look, count))
        return rows

    def named(check: dict[str, Any]) -> tuple[str, float]:
        """Attack label and look of a check."""
        label, _, rest = check["attack"].partition(", ")
        return label, float(rest.split(" x ")[0]) if rest else 1.0

    failures = []
    for check in sorted(report["checks"], key=lambda check: ("fail", "inconclusive", "pass").index(check["status"])):
        if check["status"] == "pass":
            break
        subject, rows = everyone.get(check["subject"]), []
        if subject is not None and check["attack"] and may_be_shown(subject, include_images):
            label, look = named(check)
            rows = [real_strip(subject), *strips(subject, label, look, FAILED_SHOWN)]
        failures.append(check | {"strips": rows})

    rooms = []
    for subject in everyone.values():
        shown, calibrated = may_be_shown(subject, include_images), report["calibration"][subject.class_noun]
        attacks = []
        for label, attack in spec["attacks"].items():
            levels: dict[str, dict[int, dict[str, Any]]] = {}
            for side, _ in SIDES:
                for unit in mine(subject.id, label, side)[:1]:
                    known = {
                        steps: found[side, subject.id, label, look]
                        for look, steps in unit.looks.items()
                        if (side, subject.id, label, look) in found
                    }
                    if known:
                        levels[side] = known
            attacks.append({
                "label": label, "name": attack["name"], "curve": curve(levels, calibrated, label),
                "strips": strips(subject, label, 1.0, SHOWN) if shown else [],
                "checks": [c for c in report["checks"] if c["subject"] == subject.id and named(c)[0] == label],
            })  # fmt: skip
        rooms.append({
            "id": subject.id, "class_noun": subject.class_noun, "kind": subject.kind, "shown": shown,
            "role": "protected" if subject in protected else "control", "attacks": attacks,
            "real": real_strip(subject) if shown else None,
        })  # fmt: skip

    columns = [(label, look) for label in spec["attacks"] for look in looks]
    cells = []
    for subject in protected:
        calibrated, line = report["calibration"][subject.class_noun], []
        for label, look in columns:
            level = found.get(("hardened", subject.id, label, look))
            after = label if look == 1 else f"{label}, {look:g} x steps"
            status = [
                c["status"]
                for c in report["checks"]
                if (c["name"], c["subject"], c["attack"]) == ("protected", subject.id, after)
            ]
            line.append(
                None if level is None else level | {"heat": heat(level["mean"], calibrated), "status": status[0]}
            )
        cells.append((subject.id, line))

    counts = {
        name: [sum(c["name"] == name and c["status"] == status for c in report["checks"]) for status in WORDS]
        for name in dict.fromkeys(check["name"] for check in report["checks"])
    }
    return {
        "report": report, "words": WORDS[report["verdict"]], "plain": PLAIN, "counts": counts, "failures": failures,
        "rooms": rooms,
        "columns": columns, "cells": cells, "hidden": [room["id"] for room in rooms if not room["shown"]],
        "curve_size": CURVE,
        "ordinary": [
            (prompt, Picture(_embedded(before), f"the base's picture of: {prompt}"),
             Picture(_embedded(after), f"the hardened model's picture of: {prompt}"))
            for prompt, before, after in ordinary
        ],
    }  # fmt: skip


def save_page(path: Path, data: dict[str, Any]) -> None:
    """Fill the template in; the file appears whole."""
    environment = Environment(
        loader=PackageLoader("guardsmith"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(environment.get_template("report.html").render(**data), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
