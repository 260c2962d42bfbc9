"""For people: the grid of pictures and the table in the terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from guardsmith.config.displacement import attack_of
from guardsmith.core.images import open_image, square
from guardsmith.gate.checks import word
from guardsmith.registry.loader import Subject
from guardsmith.reports.evidence import AttackRun
from guardsmith.reports.frontier import percent
from guardsmith.reports.report import Report

COLUMNS = 8
TILE = 96
LABEL = 300
HEADER = 34
MOST = 20
"""Protected subjects, and controls, in the grid: a thousand would be a picture that no program opens."""
COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def _strip(sheet: Image.Image, draw: ImageDraw.ImageDraw, y: int, label: str, files: list[Path], size: int) -> None:
    font = ImageFont.load_default(15)
    draw.text((10, y + TILE / 2), label, fill="#222222", font=font, anchor="lm")
    if not files:
        draw.text(
            (LABEL + 10, y + TILE / 2), "no pictures: the attack did not run", fill="#b00020", font=font, anchor="lm"
        )
    for column, file in enumerate(files[:COLUMNS]):
        tile = square(open_image(file), size).resize((TILE, TILE), Image.Resampling.LANCZOS)
        sheet.paste(tile, (LABEL + column * (TILE + 2), y))


def save_grid(
    path: Path, protected: Sequence[Subject], controls: Sequence[Subject], units: Sequence[AttackRun], size: int
) -> None:
    """One picture: per subject its real pictures, then what each attack draws on base and on hardened.

    The first subjects of the registry are in it (`MOST`). The pictures of a row are the first ones of every unit in turn, not the
    best ones. Where attackers of protected subjects went on for longer than usual, there is one more row. Attacks at other rates
    are left out.
    """
    rows: dict[tuple[str, str, str, float], list[AttackRun]] = {}
    protected, controls = protected[:MOST], controls[:MOST]
    names = {subject.id for subject in (*protected, *controls)}
    units = [unit for unit in units if unit.label == attack_of(unit.label) and unit.subject in names]
    for unit in units:
        for point in sorted({1.0, max(unit.evaluation_points)}):
            rows.setdefault((unit.subject, unit.label, unit.side, point), []).append(unit)
    labels = list(dict.fromkeys(unit.label for unit in units))
    everyone = [(s, "PROTECTED") for s in protected] + [(s, "control") for s in controls]
    height = len(everyone) * (HEADER + TILE + 10) + len(rows) * (TILE + 2)
    sheet = Image.new("RGB", (LABEL + COLUMNS * (TILE + 2) + 8, height), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for subject, role in everyone:
        colour = "#8a1538" if role == "PROTECTED" else "#14532d"
        draw.rectangle((0, y, sheet.width, y + HEADER - 4), fill=colour)
        draw.text(
            (10, y + 15),
            f"{subject.id} ({subject.class_noun}), {role}",
            fill="white",
            font=ImageFont.load_default(18),
            anchor="lm",
        )
        y += HEADER
        _strip(
            sheet, draw, y, "real pictures (judge's references)", [i.path for i in subject.images_of("reference")], size
        )
        y += TILE + 2
        mine = [key for key in rows if key[0] == subject.id]
        for key in sorted(mine, key=lambda key: labels.index(key[1])):
            _, label, side, point = key
            per_unit = -(-COLUMNS // len(rows[key]))
            files = [file for unit in rows[key] for file in unit.pictures(point)[:per_unit]]
            after = "" if point == 1 else f", {point:g} x steps"
            _strip(sheet, draw, y, f"{label} on {side}{after}", files, size)
            y += TILE + 2
        y += 8
    sheet.save(path)


def print_table(table: Table, width: int) -> None:
    """On stdout; a file or a CI log gets whole lines."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    console.print(table)


def save_table(table: Table, width: int, path: Path) -> None:
    """As a picture (SVG) with its colours."""
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(table)
    path.write_text(console.export_svg(title="guardsmith"), encoding="utf-8")


def print_report(report: Report, root: Path) -> None:
    """The table of checks and the verdict, on stdout."""
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file or a CI log wants whole lines
    table = Table(title="guardsmith verify", title_justify="left")
    for heading in ("check", "subject", "attack", "measured [95 % interval]", "limit", "result"):
        table.add_column(heading)
    for check in report.checks:
        bounds = "" if check.low is None or check.high is None else f" [{check.low:.3f}, {check.high:.3f}]"
        value = "-" if check.value is None else f"{check.value:.3f}{bounds}"
        limit = "-" if check.limit is None else f"{check.limit:.3f}"
        status = f"[{COLOURS[check.status]}]{word(check)}[/]"
        table.add_row(check.name, check.subject, check.attack, value, limit, status)
    console.print(table)
    for check in report.checks:
        if check.status != "pass":
            status = f"[{COLOURS[check.status]}]{check.status}[/]"
            console.print(f"  {status} {escape(check.label())}: {escape(check.sentence)}", highlight=False)
    for name, reason in report.failed_units.items():
        console.print(f"  [red]failed to run[/] {escape(name)}: {escape(reason)}", highlight=False)
    words = {"pass": "the gate is passed", "fail": "the gate is not passed", "inconclusive": "no verdict can be given"}
    for each in report.just_enough:
        found = each.result
        sentence = (
            "none found" if found is None else f"{percent(found.displacement)}, {found.steps} steps at {found.rate:.3g}"
        )
        console.print(f"  just-enough {escape(each.attack)}: {sentence}", highlight=False)
    verdict = f"[{COLOURS[report.verdict]}]{report.verdict}[/]"
    console.print(f"verdict: {verdict} ({words[report.verdict]})", highlight=False)
    files = f"page: {root / 'report.html'}   pictures: {root / 'grid.png'}   data: {root / 'report.json'}"
    console.print(files, highlight=False, soft_wrap=True)
