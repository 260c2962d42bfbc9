"""What CI servers and pull requests get."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from reports import make_report

from guardsmith.gate.rules import RULES
from guardsmith.registry.loader import load_registry
from guardsmith.reports.ci_formats import as_junit, as_markdown, as_sarif, save_exports

ROOT = Path(__file__).parent.parent


def check(name, subject, attack, status, value=0.5):
    bounds = {"low": None, "high": None} if value is None else {"low": value - 0.1, "high": value + 0.1}
    return {"name": name, "subject": subject, "attack": attack, "status": status, "sentence": "was <seen> | heard",
            "value": value, "limit": 0.15, **bounds}  # fmt: skip


@pytest.fixture
def report():
    return make_report(
        checks=[
            check("attack works on base", "mira", "lora", "pass"),
            check("protected", "mira", "lora", "inconclusive", None),
            check("protected", "mira", "lora, 4 x steps", "fail"),
            check("control learnable", "nora", "lora", "pass"),
            check("benign prompts (KID)", "", "", "fail"),
        ],
        failed_units={"hardened/mira/lora/zwx/0": "no <memory>"},
        attacked={"protected": 1, "of": 3, "controls": 1},
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
@pytest.mark.parametrize("status", ["fail", "inconclusive"])
def test_every_rule_of_the_gate_is_in_sarif_when_its_check_does_not_pass(rule, status):
    """Whoever adds a rule adds nothing here; a rule that SARIF did not know would end a run after hours."""
    document = json.loads(as_sarif(make_report(checks=[check(rule.title, "", "", status)]), "r.yaml", {}))
    (run,) = document["runs"]
    (result,) = run["results"]
    assert result["ruleId"] == rule.id
    [described] = [each for each in run["tool"]["driver"]["rules"] if each["id"] == rule.id]
    assert described["shortDescription"]["text"].lower() == f"{rule.explanation}.".lower()


def test_ids_and_titles_stay_what_earlier_reports_have():
    """Whoever suppresses a finding by its id, or compares with an earlier report, relies on them."""
    earlier = {
        "released weights": "released-weights",
        "attack works on base": "attack-works-on-base",
        "protected": "protected",
        "control learnable": "control-learnable",
        "benign prompts (KID)": "benign-prompts-kid",
        "benign prompts (collapsed)": "benign-prompts-collapsed",
        "benign prompts (fidelity)": "benign-prompts-fidelity",
        "benign prompts (CLIP-T)": "benign-prompts-clip-t",
        "everyday use (precision)": "everyday-use-precision",
        "everyday use (controlnet)": "everyday-use-controlnet",
        "everyday use (adapters)": "everyday-use-adapters",
        "everyday use (merges)": "everyday-use-merges",
        "everyday use (quantization)": "everyday-use-quantization",
        "everyday use (samplers)": "everyday-use-samplers",
    }
    assert earlier.items() <= {rule.title: rule.id for rule in RULES}.items()


def test_a_check_of_a_rule_that_this_version_does_not_have_is_exported_too():
    later = make_report(checks=[check("held in video (4 s)", "mira", "", "fail")])
    (run,) = json.loads(as_sarif(later, "r.yaml", {"mira": 7}))["runs"]
    assert run["results"][0]["ruleId"] == "held-in-video-4-s"
    assert "held-in-video-4-s" in {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert "held in video (4 s)" in as_junit(later) and "held in video (4 s)" in as_markdown(later)


def test_markdown_says_what_failed_first(report):
    text = as_markdown(report)
    assert text.startswith("## ❌ guardsmith verify: fail\n")
    assert "2 of 5 checks passed; 1 of 3 protected subjects and 1 controls were attacked." in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "check" not in line]
    assert [row.split(" | ")[0][2:] for row in rows[:3]] == ["❌", "❌", "⚠️"], "the worst first"
    assert rows[0] == "| ❌ | protected | mira | lora, 4 x steps | 0.50 [0.40, 0.60] | 0.15 |"
    assert len(rows) == 3 + 5
    assert "hardened/mira/lora/zwx/0" in text


def test_junit_has_a_failure_for_a_fail_and_an_error_for_what_is_undecided(report):
    root = ET.fromstring(as_junit(report))
    suite = root if root.tag == "testsuite" else root.find("testsuite")
    cases = {
        (case.get("classname"), case.get("name")): [child.tag for child in case] for case in suite.iter("testcase")
    }
    assert cases == {
        ("attack works on base", "mira, lora"): [],
        ("protected", "mira, lora"): ["error"],
        ("protected", "mira, lora, 4 x steps"): ["failure"],
        ("control learnable", "nora, lora"): [],
        ("benign prompts (KID)", "model"): ["failure"],
        ("attack that did not run", "hardened/mira/lora/zwx/0"): ["error"],
    }
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("6", "2", "2")
    assert "was <seen> | heard" in next(suite.iter("failure")).get("message")


def test_sarif_points_at_the_line_of_the_subject(report):
    told = json.loads(as_sarif(report, "people/registry.yaml", {"mira": 7, "nora": 30}))
    assert told["version"] == "2.1.0"
    (run,) = told["runs"]
    rules = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    found = []
    for result in run["results"]:
        place = result["locations"][0]["physicalLocation"]
        assert place["artifactLocation"]["uri"] == "people/registry.yaml"
        assert result["ruleId"] in rules
        found.append((result["ruleId"], result["level"], place["region"]["startLine"]))
    assert found == [
        ("protected", "warning", 7), ("protected", "error", 7), ("benign-prompts-kid", "error", 1),
    ]  # fmt: skip


def test_a_registry_knows_the_lines_of_its_subjects():
    file = ROOT / "registries" / "demo.yaml"
    lines = file.read_text().splitlines()
    registry = load_registry(file, check_images=False)
    assert {name: lines[line - 1].split()[-1] for name, line in registry.lines.items()} == {
        "mira": "mira",
        "nora": "nora",
    }


@pytest.mark.parametrize(
    ("folder", "named"), [("project/people", "people/registry.yaml"), ("elsewhere", "registry.yaml")]
)
def test_files_name_no_place_of_this_machine(report, tmp_path, monkeypatch, folder, named):
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    out = tmp_path / "out"
    out.mkdir()
    save_exports(out, report, tmp_path / folder / "registry.yaml", {"mira": 7})
    assert sorted(file.name for file in out.iterdir()) == ["report.junit.xml", "report.md", "report.sarif"]
    assert all(str(tmp_path) not in file.read_text() for file in out.iterdir())
    assert named in (out / "report.sarif").read_text()
