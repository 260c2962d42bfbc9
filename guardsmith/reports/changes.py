"""What changed from one verification to another: checks of two reports side by side, and what else differs between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from guardsmith.gate.checks import Check
from guardsmith.reports.report import Report


class Change(NamedTuple):
    """One check of two reports.

    Attributes:
        check: its name, subject and attack.
        before: status and value in the first report; empty where it was not made.
        after: the same in the second.
        kind: "better" or "worse" by status, "new" or "gone", "moved" where the intervals do not overlap.
    """

    check: str
    before: str
    after: str
    kind: str


RANKS = {"pass": 0, "inconclusive": 1, "fail": 2}
KINDS = {"worse": "red", "gone": "red", "moved": "yellow", "new": "yellow", "better": "green"}


def _apart(one: Check, other: Check) -> bool:
    """Whether the intervals of two checks do not overlap."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.high < other.low or other.high < one.low


def _text(check: Check | None) -> str:
    if check is None:
        return ""
    return check.status if check.value is None else f"{check.status}, {check.value:.3f}"


def changes(before: Report, after: Report) -> list[Change]:
    """What is different in the second of two reports, the worst first; checks are matched by name, subject and attack."""
    old, new = ({check.label(): check for check in report.checks} for report in (before, after))
    result = []
    for key in dict.fromkeys((*old, *new)):
        one, other = old.get(key), new.get(key)
        if one is None or other is None:
            kind = "new" if one is None else "gone"
        elif one.status != other.status:
            kind = "worse" if RANKS[other.status] > RANKS[one.status] else "better"
        elif _apart(one, other):
            kind = "moved"
        else:
            continue
        result.append(Change(key, _text(one), _text(other), kind))
    order = list(KINDS)
    return sorted(result, key=lambda change: order.index(change.kind))


def circumstances(before: Report, after: Report) -> list[str]:
    """What else differs between two reports."""
    pairs = {
        "model": (before.hardening.model_digest, after.hardening.model_digest),
        "base": (before.hardening.base_digest, after.hardening.base_digest),
        "registry": (before.hardening.registry_digest, after.hardening.registry_digest),
        "method": (before.hardening.method, after.hardening.method),
        "attacks and budget": (before.recipe.verify, after.recipe.verify),
        "sampling": (before.recipe.sampling, after.recipe.sampling),
        "rules of the gate": (before.recipe.gate, after.recipe.gate),
        "guardsmith": (before.run.guardsmith, after.run.guardsmith),
        "packages": (before.run.packages, after.run.packages),
        "levels of similarity": (before.calibration, after.calibration),
    }
    return [name for name, (one, other) in pairs.items() if one != other]


def compare_two(before: Path, after: Path) -> tuple[Table, dict[str, Any]]:
    """What changed from one verified run (folder or report) to another, as a table and as data.

    Raises:
        UserError: see `Report.load`.
    """
    first, second = (Report.load(run) for run in (before, after))
    table = Table(title=f"verdict: {first.verdict} -> {second.verdict}", title_justify="left")
    for heading in ("check", "before", "after", "change"):
        table.add_column(heading)
    differences = changes(first, second)
    for change in differences:
        table.add_row(change.check, change.before, change.after, f"[{KINDS[change.kind]}]{change.kind}[/]")
    data = {
        "verdict": [first.verdict, second.verdict], "different": circumstances(first, second),
        "changes": [change._asdict() for change in differences],
    }  # fmt: skip
    return table, data
