"""The published schema of report.json: current, true of the reports that are committed, and strict."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from guardsmith.cli import app as cli
from guardsmith.gate.rules import Check, Interval, Levels
from guardsmith.reports.schema import CheckTold, IntervalTold, LevelsTold, Report, json_schema

DOCS = Path(__file__).parent.parent / "docs"
DEMO = json.loads((DOCS / "results/demo-report.json").read_text())


def test_the_published_schema_is_current(capsys):
    assert cli.main(["report", "schema"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json_schema()
    assert (DOCS / "reference/report.schema.json").read_text() == printed, (
        "run: guardsmith report schema --output docs/reference/report.schema.json"
    )


@pytest.mark.parametrize(
    "name",
    [
        "demo-report",
        "demo-longer-report",
        "bfloat16-report",
        "adaptive-report",
        "axes-report",
        "matrix-tripwire-report",
        "several-tuning-report",
    ],
)
def test_committed_reports_are_as_the_schema_says(name):
    report = Report.model_validate_json((DOCS / f"results/{name}.json").read_text())
    assert report.verdict in ("pass", "fail", "inconclusive")


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "passed"}, {"schema": 2}, {"more": 1}, {"exit_code": 2}, {"checks": [{"name": "protected"}]},
        {"utility": {}}, {"scores": [DEMO["scores"][0] | {"look": -1}]},
    ],
)  # fmt: skip
def test_what_is_not_a_report_is_refused(change):
    with pytest.raises(ValidationError):
        Report.model_validate(DEMO | change)
    with pytest.raises(ValidationError):
        Report.model_validate({key: value for key, value in DEMO.items() if key != "verdict"})


@pytest.mark.parametrize(("kind", "told"), [(Check, CheckTold), (Interval, IntervalTold), (Levels, LevelsTold)])
def test_the_parts_are_those_that_verification_writes(kind, told):
    assert tuple(told.model_fields) == kind._fields
