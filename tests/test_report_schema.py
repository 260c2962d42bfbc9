"""report.json and its published schema: current, true of what is written, read in old and new versions, else refused."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from reports import DEMO, check, make_report, report_data, score
from tiny import assert_one_sentence

from guardsmith.cli import app as cli
from guardsmith.core.errors import UserError
from guardsmith.gate.rules import RULES
from guardsmith.reports.compare import rows
from guardsmith.reports.report import Report, json_schema

DOCS = Path(__file__).parent.parent / "docs"
FIRST = json.loads(DEMO.read_text())


def test_the_published_schema_is_current(capsys):
    assert cli.main(["report", "schema"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json_schema()
    [file] = DOCS.rglob("report.schema.json")
    assert file.read_text() == printed, f"run: guardsmith report schema --output {file.relative_to(DOCS.parent)}"


RESULTS = sorted(
    file.name
    for file in (DOCS / "results").glob("*.json")
    if {"verdict", "checks"} <= dict.keys(data if isinstance(data := json.loads(file.read_text()), dict) else {})
)


@pytest.mark.parametrize("name", RESULTS)
def test_every_committed_report_is_read_whatever_its_schema(name):
    """Nothing is lost on the way: it says what the file says, can be compared, and is the same when it was written again."""
    file = DOCS / "results" / name
    data, report = json.loads(file.read_text()), Report.load(file)
    assert report.verdict == data["verdict"]
    assert [(each.status, each.subject, each.value) for each in report.checks] == [
        (each["status"], each["subject"], each.get("value")) for each in data["checks"]
    ]
    assert [(each.side, each.subject, each.interval and each.interval.mean) for each in report.scores] == [
        (each["side"], each["subject"], each["interval"] and each["interval"]["mean"]) for each in data["scores"]
    ]
    assert rows(report)["verdict of the gate"].text == data["verdict"]
    assert Report.parse(report.as_json()) == report


def test_the_results_page_lists_every_committed_report():
    assert len(RESULTS) >= 13
    text = (DOCS / "results/README.md").read_text()
    assert not [name for name in RESULTS if f"]({name})" not in text and not name.startswith("matrix-")]


@pytest.mark.parametrize(
    "name",
    ["demo", "demo-longer", "bfloat16", "adaptive", "axes", "matrix-tripwire", "matrix-apdm", "matrix-imma", "matrix-persguard",
     "several-tuning", "imma-avatar", "persguard-avatar"],
)  # fmt: skip
def test_committed_reports_of_the_first_schema_are_read(name, capsys):
    file = DOCS / f"results/{name}-report.json"
    report, data = Report.load(file), json.loads(file.read_text())
    assert (report.version, report.verdict) == (3, data["verdict"])
    assert [each.evaluation_point for each in report.scores] == [each["look"] for each in data["scores"]]
    assert report.utility.collapsed == data["utility"].get("destroyed")
    verify = data["recipe"]["verify"]
    assert report.recipe.verify.evaluation_points == tuple(verify["looks"])
    assert report.recipe.verify.full_factorial == verify["crossed"]
    assert report.recipe.gate.personalized_share == data["recipe"]["gate"]["learnt_share"]
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {file} is of schema 1") and "look (evaluation_point)" in warning


def test_faces_of_the_first_schema_are_read():
    data = FIRST | {"scores": [FIRST["scores"][0] | {"faceless": 0.25}]}
    assert Report.parse(data).scores[0].fdfr == 0.25


def test_checks_of_the_second_schema_have_their_present_names(capsys):
    names = ["KID", "destroyed", "fidelity", "CLIP-T"]
    old = [check(f"ordinary prompts ({name})", "", "", "pass", 0.1) for name in names]
    other = check("protected", "mira", "lora", "pass", 0.1)
    report = Report.parse(report_data(checks=[*old, other]) | {"schema": 2})
    titles = [each.name for each in report.checks]
    assert titles == [f"benign prompts ({name})" for name in ["KID", "collapsed", "fidelity", "CLIP-T"]] + ["protected"]
    assert {rule.title for rule in RULES} >= set(titles)


def test_what_is_written_is_read_as_it_was(tmp_path, capsys):
    report = make_report(
        checks=[check(rule.title, "mira", "lora", "pass", 0.1, 0.0, 0.2, 0.3) for rule in RULES],
        scores=[
            score(
                "base", "mira", "lora", 4, interval={"mean": 0.1, "low": 0, "high": 1, "n": 3, "unscored": 1}, fdfr=0.5
            )
        ],
    )
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["schema"] == 3 and "version" not in data
    keys = {"side", "subject", "attack", "evaluation_point", "units", "interval", "fdfr", "displacement"}
    assert set(data["scores"][0]) == keys
    (tmp_path / "verify").mkdir()
    report.save(tmp_path / "verify" / "report.json")
    assert Report.load(tmp_path) == report
    assert capsys.readouterr().err == "", "nothing to warn of"


def test_what_a_later_version_adds_is_left_out():
    """Whoever reads with an older guardsmith still can, wherever the new field is."""
    data = report_data(checks=[check("protected", "mira", "lora", "pass")], scores=[score("base", "mira", "lora", 1)])
    later = json.loads(json.dumps(data))
    later["more"] = 1
    for part in (later["checks"][0], later["scores"][0], later["utility"], later["hardening"], later["run"], later["recipe"],
                 later["calibration"]["person"], later["policy"]["judge"]):  # fmt: skip
        part["more"] = {"x": 1}
    later["recipe"] |= {"verify": {"attacks": {"lora": {"name": "lora", "more": 1}}, "more": 1}, "gate": {"more": 1}}
    data["recipe"] |= {"verify": {"attacks": {"lora": {"name": "lora"}}}}
    assert Report.parse(later) == Report.parse(data)


@pytest.mark.parametrize("base", [FIRST, report_data()], ids=["first", "present"])
@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "passed"}, {"schema": 4}, {"schema": "2"}, {"schema": 0}, {"exit_code": 2},
        {"checks": [{"name": "protected"}]}, {"checks": [check("protected", "mira", "", "good")]}, {"checks": 1},
        {"scores": [score("base", "mira", "lora", -1)]}, {"scores": [1]}, {"utility": {}}, {"utility": None}, {"recipe": 3},
        {"recipe": {"verify": 3}}, {"calibration": {"person": {"chance": 1}}},
    ],
)  # fmt: skip
def test_what_is_no_report_is_refused_in_a_sentence(base, change):
    with pytest.raises(UserError) as caught:
        Report.parse(base | change, "x.json")
    assert_one_sentence(caught.value)
    assert "x.json is not a report of this version" in str(caught.value)
    with pytest.raises(UserError):
        Report.parse({key: value for key, value in base.items() if key != "verdict"})


def test_keys_under_both_names_are_refused():
    recipe = FIRST["recipe"] | {"verify": FIRST["recipe"]["verify"] | {"evaluation_points": [1]}}
    with pytest.raises(
        UserError, match=r"'verify\.looks' is the old name of 'verify\.evaluation_points', and both are there"
    ):
        Report.parse(FIRST | {"recipe": recipe})


def closed(schema):
    """Parts of a schema that allow no further field."""
    if isinstance(schema, dict):
        if schema.get("additionalProperties") is False:
            yield schema
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from closed(part)


def test_the_schema_allows_further_fields_and_explains_each_of_its_own():
    schema = json_schema()
    assert not list(closed(schema))
    assert schema["properties"]["schema"]["const"] == 3
    parts = {name: part for name, part in schema["$defs"].items() if "properties" in part} | {"Report": schema}
    assert {"Check", "Score", "Interval", "Levels", "Utility", "Recipe"} <= set(parts)
    for name, part in parts.items():
        for field, told in part["properties"].items():
            assert "description" in told, f"{name}.{field}"


def test_the_recipe_of_a_report_stays_strict_elsewhere():
    """Leniency is for reading reports; a recipe with a misspelt key is still refused."""
    from guardsmith.config.recipe import Recipe

    with pytest.raises(ValueError, match="more"):
        TypeAdapter(Recipe).validate_python({"more": 1})
