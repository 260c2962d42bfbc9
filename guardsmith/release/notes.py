"""Release notes of a hardened model: Markdown for a release, a pull request or an announcement, from the public evidence."""

from __future__ import annotations

from guardsmith.release.card import limits
from guardsmith.reports.changes import changes, circumstances
from guardsmith.reports.compare import Cell, rows
from guardsmith.reports.report import Report

MARKS = {True: "", False: " (falls short)", None: ""}


def release_notes(report: Report, earlier: Report | None = None, name: str | None = None) -> str:
    """What was made, what was measured, what changed, and what it does not stop.

    Args:
        report: `verify/public/report.json`.
        earlier: the same of the release before, for a column of its own and a list of changes.
        name: of the repository.
    """
    hardening, attacked = report.hardening, report.attacked
    mine, theirs = rows(report), {} if earlier is None else rows(earlier)
    origin = f"{hardening.base}" + (f", hardened with {hardening.method}" if hardening.method else "")
    lines = [f"## {name or 'Hardened model'}: {report.verdict}", ""]
    lines += [
        f"{origin}. Protected subjects: {attacked.of}, of whom {attacked.protected} were attacked; unprotected controls: "
        f"{attacked.controls}. The attacks were run on the base as well. 95 % intervals in brackets.",
        "",
    ]
    heads = ["question", *([] if earlier is None else ["before"]), "now"]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for question in dict.fromkeys((*mine, *theirs)):
        cells = [mine.get(question, Cell("-"))]
        if earlier is not None:
            cells.insert(0, theirs.get(question, Cell("-")))
        lines.append(f"| {question} | " + " | ".join(cell.text + MARKS[cell.reached] for cell in cells) + " |")
    if earlier is not None:
        also, differences = circumstances(earlier, report), changes(earlier, report)
        lines += ["", "### What changed", "", f"Different besides the figures: {', '.join(also) or 'nothing'}."]
        lines += [""] if differences else []
        lines += [f"- {c.kind}: {c.check} ({c.before or 'not made'} -> {c.after or 'not made'})" for c in differences]
    lines += ["", "### What it does not stop", ""]
    lines += [f"- {sentence}" for sentence in limits(report)]
    before = "" if earlier is None else f" (before: `{earlier.hardening.model_digest}`)"
    policy = "" if report.policy is None else f', policy "{report.policy.name}" of {report.policy.dated}'
    lines += [
        "",
        f"Weights `{hardening.model_digest}`{before}, registry `{hardening.registry_digest}`{policy}, guardsmith "
        f"{report.run.guardsmith}.",
    ]
    return "\n".join(lines) + "\n"
