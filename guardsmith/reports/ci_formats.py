"""The report for machines that show it to people: Markdown for a pull request, JUnit for a CI server, SARIF for code scanning.

A check that failed is a failure (JUnit) or an error (SARIF); one that is undecided is an error (JUnit) or a warning (SARIF). Both
keep a pipeline from passing, as the exit code does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from junitparser import Error, Failure, JUnitXml, TestCase, TestSuite

from guardsmith.core.atomic_io import write_text
from guardsmith.gate.checks import Check
from guardsmith.gate.rules import RULES, rule_of
from guardsmith.reports.frontier import BREAK_HEADINGS, break_table
from guardsmith.reports.frontier_charts import frontiers
from guardsmith.reports.report import Report

MARKS = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️"}
SARIF_LEVELS = {"fail": "error", "inconclusive": "warning"}


def _measured(check: Check) -> str:
    if check.value is None:
        return "-"
    bounds = "" if check.low is None or check.high is None else f" [{check.low:z.2f}, {check.high:z.2f}]"
    return f"{check.value:z.2f}{bounds}"


def rule_id(title: str) -> str:
    """What machines call the rule of a check; of a rule that this version does not have, its title in a-z and dashes."""
    rule = rule_of(title)
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") if rule is None else rule.id


def as_markdown(report: Report) -> str:
    """A summary, what did not pass, and every check folded away."""

    def table(checks: Sequence[Check]) -> list[str]:
        lines = ["| | check | subject | attack | measured [95 % interval] | limit |", "|---|---|---|---|---|---|"]
        for check in checks:
            limit = "-" if check.limit is None else f"{check.limit:.2f}"
            cells = (MARKS[check.status], check.name, check.subject, check.attack, _measured(check), limit)
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
        return lines

    checks, hardening, attacked = report.checks, report.hardening, report.attacked
    open_checks = [check for check in checks if check.status != "pass"]
    open_checks.sort(key=lambda check: ("fail", "inconclusive").index(check.status))
    lines = [f"## {MARKS[report.verdict]} guardsmith verify: {report.verdict}", ""]
    scope = f"{attacked.protected} of {attacked.of} protected subjects and {attacked.controls} controls were attacked."
    lines += [f"{len(checks) - len(open_checks)} of {len(checks)} checks passed; {scope}", ""]
    if open_checks:
        lines += ["### What did not pass", "", *table(open_checks), ""]
    lines += [f"- attack that did not run: `{name}`: {reason}" for name, reason in report.failed_units.items()]
    lines += displacement_section(report)
    lines += ["<details><summary>All checks</summary>", "", *table(checks), "", "</details>", ""]
    of = f"base `{hardening.base_digest}`, {hardening.method or 'made elsewhere'}"
    lines += [f"Hardened model `{hardening.model_digest}` ({of}); guardsmith {report.run.guardsmith}.", ""]
    return "\n".join(lines)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def displacement_section(report: Report) -> list[str]:
    """How far attackers have to move the weights, as Markdown; nothing where it was not measured."""
    lines = []
    for each in frontiers(report):
        lines += [f"<details><summary>Displacement: {each['title']}</summary>", ""]
        lines += [*_table(each["headings"], each["rows"]), "", "</details>", ""]
    if report.displacement_to_break:
        lines += ["### Displacement to break", "", *_table(BREAK_HEADINGS, break_table(report)), ""]
    return lines


def as_junit(report: Report) -> str:
    """One test case a check; the class name is the question, the name is the subject and the attack."""
    suite = TestSuite("guardsmith verify")
    suite.timestamp = report.run.finished
    suite.add_property("verdict", report.verdict)
    suite.add_property("model_digest", report.hardening.model_digest)
    for check in report.checks:
        case = TestCase(", ".join(part for part in (check.subject, check.attack) if part) or "model", check.name)
        message = f"{check.sentence}; measured {_measured(check)}"
        if check.status == "fail":
            case.result = [Failure(message, "fail")]
        elif check.status == "inconclusive":
            case.result = [Error(message, "inconclusive")]
        suite.add_testcase(case)
    for name, reason in report.failed_units.items():
        case = TestCase(name, "attack that did not run")
        case.result = [Error(reason, "failed to run")]
        suite.add_testcase(case)
    xml = JUnitXml()
    xml.add_testsuite(suite)
    return str(xml.tostring().decode("utf-8"))  # type: ignore[no-untyped-call]


def as_sarif(report: Report, registry: str, lines: Mapping[str, int]) -> str:
    """SARIF 2.1.0: every check that did not pass, at the registry line of its subject.

    Args:
        report: of a verification.
        registry: path of the registry file, as the reader's repository knows it.
        lines: id of a subject or control -> its line there.
    """
    results = [
        {
            "ruleId": rule_id(check.name),
            "level": SARIF_LEVELS[check.status],
            "message": {"text": f"{check.label(', ')}: {check.sentence} (measured {_measured(check)})."},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": registry},
                        "region": {"startLine": lines.get(check.subject, 1)},
                    }
                }
            ],
        }
        for check in report.checks
        if check.status != "pass"
    ]
    texts = {rule.id: f"{rule.explanation[0].upper()}{rule.explanation[1:]}." for rule in RULES}
    texts |= {rule_id(check.name): check.name for check in report.checks if rule_of(check.name) is None}
    rules = [{"id": name, "shortDescription": {"text": text}} for name, text in texts.items()]
    driver = {"name": "guardsmith", "version": report.run.guardsmith, "rules": rules}
    document = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }
    return json.dumps(document, indent=1) + "\n"


def save_exports(root: Path, report: Report, registry: Path, lines: Mapping[str, int]) -> None:
    """`report.md`, `report.junit.xml` and `report.sarif` beside `report.json`; each appears whole.

    The registry is named relative to the working directory if it is below it, else by its name alone.
    """
    here = Path.cwd()
    name = registry.relative_to(here).as_posix() if registry.is_relative_to(here) else registry.name
    write_text(root / "report.md", as_markdown(report))
    write_text(root / "report.junit.xml", as_junit(report))
    write_text(root / "report.sarif", as_sarif(report, name, lines))
