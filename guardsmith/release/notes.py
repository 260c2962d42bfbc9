"""Release notes of a hardened model: Markdown for a release, a pull request or an announcement, from the public evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guardsmith.release.card import limits
from guardsmith.reports.compare import Cell, changes, circumstances, rows

MARKS = {True: "", False: " (falls short)", None: ""}


def release_notes(report: Mapping[str, Any], earlier: Mapping[str, Any] | None = None, name: str | None = None) -> str:
    """What was made, what was measured, what changed, and what it does not stop.

    Args:
        report: `verify/public/report.json`.
        earlier: the same of the release before, whose column and changes are told too.
        name: of the repository.
    """
    told = dict(report)
    hardening, attacked = told["hardening"], told["attacked"]
    mine, theirs = rows(told), {} if earlier is None else rows(dict(earlier))
    made = f"{hardening['base']}" + (f", hardened with {hardening['method']}" if hardening["method"] else "")
    lines = [f"## {name or 'Hardened model'}: {told['verdict']}", ""]
    lines += [
        f"{made}. Protected subjects: {attacked['of']}, of whom {attacked['protected']} were attacked; unprotected controls: "
        f"{attacked['controls']}. The attacks were run on the base as well. 95 % intervals in brackets.",
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
        also, found = circumstances(dict(earlier), told), changes(dict(earlier), told)
        lines += ["", "### What changed", "", f"Different besides the figures: {', '.join(also) or 'nothing'}."]
        lines += [""] if found else []
        lines += [f"- {c.kind}: {c.check} ({c.before or 'not made'} -> {c.after or 'not made'})" for c in found]
    lines += ["", "### What it does not stop", ""]
    lines += [f"- {sentence}" for sentence in limits(told)]
    before = "" if earlier is None else f" (before: `{earlier['hardening']['model_digest']}`)"
    lines += [
        "",
        f"Weights `{hardening['model_digest']}`{before}, registry `{hardening['registry_digest']}`, policy "
        f'"{told["policy"]["name"]}" of {told["policy"]["dated"]}, guardsmith {told["run"]["guardsmith"]}.',
    ]
    return "\n".join(lines) + "\n"
