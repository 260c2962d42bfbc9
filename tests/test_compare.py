"""The comparison table: every number is worked out by hand from a small report."""

import json
from pathlib import Path

import pytest
from reports import check, report_data, score

from guardsmith.cli import app as cli
from guardsmith.core.errors import UserError
from guardsmith.gate.rules import RULES, Rule
from guardsmith.reports import compare as compare_module
from guardsmith.reports.changes import changes, circumstances
from guardsmith.reports.compare import Demands, as_markdown, compare, compare_runs, retention, rows
from guardsmith.reports.report import Report


def data(**changed):
    """Two protected persons, a person and a robot as controls, one attack that goes on to twice its steps; as a file has it."""
    told = {
        "verdict": "fail",
        "subjects": [
            {"id": "ann", "class_noun": "person", "role": "protected"},
            {"id": "bob", "class_noun": "person", "role": "protected"},
            {"id": "cid", "class_noun": "person", "role": "control"},
            {"id": "r2", "class_noun": "robot", "role": "control"},
        ],
        "scores": [
            score("base", "ann", "lora", 1, 0.6), score("base", "bob", "lora", 1, 0.4),
            score("hardened", "ann", "lora", 1, 0.1), score("hardened", "bob", "lora", 1, 0.2),
            score("hardened", "ann", "lora", 2, 0.1), score("hardened", "bob", "lora", 2, 0.5),
            score("base", "cid", "lora", 1, 0.5), score("hardened", "cid", "lora", 1, 0.45),
            score("base", "r2", "lora", 1, 0.5), score("hardened", "r2", "lora", 1, 0.48),
        ],
        "checks": [
            check("attack works on base", "ann", "lora", "pass"), check("attack works on base", "bob", "lora", "pass"),
            check("attack works on base", "cid", "lora", "inconclusive"),
            check("protected", "ann", "lora", "pass"), check("protected", "bob", "lora", "pass"),
            check("protected", "ann", "lora, 2 x steps", "pass"), check("protected", "bob", "lora, 2 x steps", "fail"),
        ],
        "steps_to_break": [
            {"subject": "ann", "attack": "lora", "tried": 200, "base": 10, "hardened": None},
            {"subject": "bob", "attack": "lora", "tried": 200, "base": 50, "hardened": 200},
        ],
        "utility": {"kid_ratio": 1.5, "kid_ratio_low": 1.0, "kid_ratio_high": 2.1, "fidelity_hardened": 0.975,
                    "fidelity_base": 1.0},
        "hardening": {"method": "tripwire", "unet_forward_equivalents": 12345, "base_digest": "sha256:0"},
        "calibration": {
            "person": {"chance": 0.0, "chance_high": 0.1, "genuine": 0.6},
            "robot": {"chance": 0.3, "chance_high": 0.4, "genuine": 0.6},
        },
        "recipe": {
            "verify": {"attacks": {"lora": {"name": "lora"}}, "evaluation_points": [1, 2], "identifiers": ["sks"], "seeds": [0],
                       "full_factorial": True, "sample": None, "images_per_unit": 8, "class_images": 4},
            "gate": {"kid_ratio": 2.0},
        },
    }  # fmt: skip
    return report_data(**told) | changed


def made(**changed):
    return Report.parse(data(**changed))


DEMO = Path(__file__).parent.parent / "docs" / "results" / "demo-report.json"


def test_every_answer_by_hand():
    found = rows(made())
    assert {question: tuple(cell) for question, cell in found.items()} == {
        "method": ("tripwire", None),
        "cost, U-Net forward equivalents": ("12,345", None),
        "lora: base": ("0.50 [0.40, 0.60]; 2 of 2 pass", True),
        "lora: protected": ("0.15 [0.10, 0.20]; 2 of 2 pass", True),
        "lora: protected, 2 x steps": ("0.30 [0.10, 0.50]; 1 of 2 pass", False),
        # 200 / 10 at least, and 200 / 50
        "lora: steps to break over the base's": ("at least 12.0 x; 1 of 2 broken", False),
        "lora: control keeps, same class": ("90 % [90, 90]", False),
        "lora: control keeps, other class": ("90 % [90, 90]", False),  # counted from chance, .3
        "benign prompts: KID over that of two seeds": ("1.50 [1.00, 2.10]", False),
        "benign prompts: fidelity (base)": ("97.5 % (100.0 %)", False),
        "verdict of the gate": ("fail", False),
    }


def test_what_is_asked_for_can_be_changed():
    found = rows(made(), Demands(control=0.9, fidelity=0.03, steps=4.0))
    assert found["lora: control keeps, same class"].reached
    assert found["benign prompts: fidelity (base)"].reached
    assert found["lora: steps to break over the base's"].reached  # 200 / 50 is enough


def test_nobody_broken_within_too_few_steps_shows_nothing():
    told = data()
    told["steps_to_break"][1]["hardened"] = None
    assert tuple(rows(Report.parse(told))["lora: steps to break over the base's"]) == (
        "at least 12.0 x; 0 of 2 broken",
        None,
    )


def test_what_was_not_measured_is_neither_reached_nor_missed():
    unmeasured = dict.fromkeys(data()["utility"]) | {"n": 24}
    found = rows(made(scores=[], steps_to_break=[], utility=unmeasured))
    for question, cell in found.items():
        if question not in ("method", "cost, U-Net forward equivalents", "verdict of the gate"):
            assert tuple(cell) == ("-", None), question


def test_an_attack_that_only_asks_has_no_share_of_the_base():
    """It need not work there, and a ratio to next to nothing is no number for anybody."""
    told = made(checks=[check for check in data()["checks"] if check["name"] != "attack works on base"])
    found = rows(told)
    assert "lora: protected" in found
    assert not any("control keeps" in question or question == "lora: base" for question in found)
    assert retention(told, "lora", {"cid"}) is None and retention(made(), "lora", {"cid"}) is not None


def test_pictures_that_could_not_be_scored_are_left_out_of_means_but_the_gate_decides():
    told = data()
    told["scores"][2]["units"] = [[0.1, None]]
    told["checks"][3]["status"] = "inconclusive"
    cell = rows(Report.parse(told))["lora: protected"]
    assert (cell.text.split(";")[1], cell.reached) == (" 1 of 2 pass", False)


def verified_with(**changes):
    """The recipe of such a report with other attacks or conditions."""
    recipe = data()["recipe"]
    return made(recipe=recipe | {"verify": recipe["verify"] | changes})


LORA = {"name": "lora"}


def test_only_what_all_reports_have_is_compared():
    """Other evaluation points and further attacks of one report do not keep the rest from being compared."""
    more = verified_with(attacks={"lora": LORA, "cdl": {"name": "cdl"}}, evaluation_points=[1, 4])
    table, told = compare({"first": made(), "second": more})
    assert "lora: protected" in told and not any("cdl" in question or "x steps" in question for question in told)
    checks = [*data()["checks"], check("protected", "mira", "cdl", "fail", 0.6, 0.5, 0.7, 0.3)]
    failed = more.model_copy(update={"checks": made(checks=checks).checks})
    assert "protected" not in compare({"first": made(), "second": failed})[1], "a check of an attack that is left out"
    left_out, meaning = table.caption.split("\n")
    assert left_out == "not in all of them, and left out: cdl, 2 x steps, 4 x steps"
    assert meaning == "n of m pass: n of the gate's m checks, one for each subject"
    assert told["lora: protected"]["first"] == told["lora: protected"]["second"]
    table, told = compare({"first": made(), "second": made()})
    assert "lora: protected, 2 x steps" in told and table.caption == meaning
    with pytest.raises(UserError, match="second was verified with other identifiers than first"):
        compare({"first": made(), "second": verified_with(identifiers=["zwx"])})


@pytest.mark.parametrize("what", ["attacks", "subjects", "base"])
def test_runs_that_were_judged_differently_are_not_compared(what):
    other = {
        "attacks": verified_with(attacks={"lora": LORA | {"params": {"rank": 8}}}),
        "subjects": made(subjects=data()["subjects"][:3]),
        "base": made(hardening=data()["hardening"] | {"base_digest": "sha256:1"}),
    }[what]
    with pytest.raises(UserError, match=f"second was verified with other {what} than first"):
        compare({"first": made(), "second": other})


@pytest.fixture
def runs(tmp_path):
    for name, method in (("a", "tripwire"), ("b", "imma")):
        folder = tmp_path / name / "verify"
        folder.mkdir(parents=True)
        hardening = data()["hardening"] | {"method": method}
        (folder / "report.json").write_text(json.dumps(data(hardening=hardening)))
    return tmp_path


def test_the_command_prints_a_column_a_run(runs, capsys):
    assert cli.main(["compare", str(runs / "a"), str(runs / "b"), "--svg", str(runs / "table.svg")]) == 0
    told = capsys.readouterr().out
    assert "tripwire" in told and "imma" in told and "at least 12.0 x" in told
    assert (runs / "table.svg").read_text().startswith("<svg")


def test_as_data_and_as_markdown(runs, capsys):
    assert cli.main(["compare", str(runs / "a"), str(runs / "b"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == {"a": {"text": "tripwire", "reached": None}, "b": {"text": "imma", "reached": None}}
    lines = as_markdown(told).splitlines()
    assert lines[:3] == ["| | a | b |", "|---|---|---|", "| method | tripwire | imma |"]
    assert "| verdict of the gate | 🔴 fail | 🔴 fail |" in lines
    assert cli.main(["compare", str(runs / "a"), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| | a |\n")


def test_bad_runs_are_one_sentence(runs, capsys):
    (runs / "empty").mkdir()
    (runs / "broken.json").write_text("{")
    (runs / "old.json").write_text('{"checks": []}')
    (runs / "list.json").write_text("[1]")
    (runs / "harden.json").write_bytes(DEMO.with_name("demo-harden.json").read_bytes())
    older = json.loads(DEMO.read_text())
    del older["scores"][0]["look"]
    (runs / "older.json").write_text(json.dumps(older))
    (runs / "later.json").write_text(json.dumps(data(schema=4)))
    for name, word in (
        ("empty", "run `guardsmith verify` first"),
        ("broken.json", "not valid"),
        ("old.json", "is no report of a verification; name the folder that `guardsmith verify` wrote to"),
        ("list.json", "is no report of a verification; name the folder"),
        ("harden.json", "is no report of a verification; name the folder"),
        ("none.json", "does not exist; run `guardsmith verify` first"),
        ("older.json", "is not a report of this version of guardsmith (scores.0.evaluation_point is missing)"),
        ("later.json", "its schema is 4, the latest known 3); update guardsmith"),
    ):
        assert cli.main(["compare", str(runs / name)]) == 2
        assert word in capsys.readouterr().err
    (runs / "c").mkdir()
    (runs / "c" / "a").mkdir()
    (runs / "c" / "a" / "verify").mkdir()
    (runs / "c" / "a" / "verify" / "report.json").write_text(json.dumps(data()))
    with pytest.raises(UserError, match="same name"):
        compare_runs([runs / "a", runs / "c" / "a"])
    assert Report.load(runs / "a" / "verify" / "report.json") == Report.load(runs / "a")


BEFORE = [
    check("protected", "ann", "lora", "pass", 0.1, 0.05, 0.15),
    check("protected", "bob", "lora", "fail", 0.5, 0.4, 0.6),
    check("protected", "cid", "lora", "pass", 0.1, 0.0, 0.2),
    check("protected", "dan", "lora", "pass", -0.1, -0.12, -0.08),
    check("protected", "eve", "lora", "inconclusive"),
    check("benign prompts (fidelity)", "", "", "pass", 0.99),
]
AFTER = [
    check("protected", "ann", "lora", "inconclusive", 0.14, 0.05, 0.2),
    check("protected", "bob", "lora", "pass", 0.1, 0.05, 0.14),
    check("protected", "cid", "lora", "pass", 0.12, 0.1, 0.14),
    check("protected", "dan", "lora", "pass", 0.0, -0.07, 0.07),
    check("benign prompts (fidelity)", "", "", "pass", 0.98),
    check("benign prompts (KID)", "", "", "pass", 1.2, 1.0, 1.4),
]


def test_what_changed_between_two_reports_the_worst_first():
    found = changes(made(checks=BEFORE), made(checks=AFTER))
    assert [tuple(change) for change in found] == [
        ("protected ann lora", "pass, 0.100", "inconclusive, 0.140", "worse"),
        ("protected eve lora", "inconclusive", "", "gone"),
        ("protected dan lora", "pass, -0.100", "pass, 0.000", "moved"),
        ("benign prompts (KID)", "", "pass, 1.200", "new"),
        ("protected bob lora", "fail, 0.500", "pass, 0.100", "better"),
    ]
    assert changes(made(checks=BEFORE), made(checks=BEFORE)) == []
    undecided = [check("protected", "ann", "lora", status) for status in ("fail", "inconclusive")]
    [found] = changes(made(checks=undecided[:1]), made(checks=undecided[1:]))
    assert found.kind == "better"


def test_what_else_differs_is_named():
    told = data(calibration=data()["calibration"] | {"robot": {"chance": 0.1, "chance_high": 0.2, "genuine": 0.3}})
    told["hardening"] |= {"method": "apdm"}
    told["recipe"] |= {"gate": {"kid_ratio": 3.0}}
    assert circumstances(made(), made()) == []
    assert circumstances(made(), Report.parse(told)) == ["method", "rules of the gate", "levels of similarity"]


def test_a_rule_that_was_added_has_a_row_without_another_line_here(monkeypatch):
    """Of the whole model, of subjects, and of attacks."""
    rule = Rule("held-in-video", "held in video", "subjects are protected in videos", lambda _: [])
    monkeypatch.setattr(compare_module, "RULES", (*RULES, rule))
    whole = made(checks=[*data()["checks"], check(rule.title, "", "", "pass", 0.25, 0.2, 0.3)])
    assert tuple(rows(whole)["held in video"]) == ("0.25 [0.20, 0.30]", True)
    each = [check(rule.title, "ann", "", "pass"), check(rule.title, "bob", "", "fail")]
    assert tuple(rows(made(checks=[*data()["checks"], *each]))["held in video"]) == ("1 of 2 pass", False)
    attacked = [check(rule.title, "ann", "lora", "pass")]
    assert tuple(rows(made(checks=[*data()["checks"], *attacked]))["lora: held in video"]) == ("1 of 1 pass", True)


def test_every_rule_without_a_question_of_its_own_is_compared():
    checks = [
        check("released weights", "ann", "", "pass", 0.1),
        check("benign prompts (CLIP-T)", "", "", "fail", 0.02),
    ]
    found = rows(made(checks=[*data()["checks"], *checks]))
    assert tuple(found["released weights"]) == ("1 of 1 pass", True)
    assert tuple(found["benign prompts (CLIP-T)"]) == ("0.02", False)


@pytest.mark.parametrize("name", ["demo", "demo-longer", "matrix-tripwire", "several-tuning", "adaptive"])
def test_reports_of_the_first_schema_are_compared_by_their_old_keys(name, capsys):
    """Committed results, written before keys got other names; the warning says the new ones."""
    assert cli.main(["compare", str(DEMO.with_name(f"{name}-report.json")), "--json"]) == 0
    output = capsys.readouterr()
    answers = json.loads(output.out)
    assert any(
        "protected" in question and cells[f"{name}-report"]["text"] != "-" for question, cells in answers.items()
    )
    warnings = [line for line in output.err.splitlines() if line.startswith("warning: ")]
    assert (
        len(warnings) == 1 and "look (evaluation_point)" in warnings[0] and "looks (evaluation_points)" in warnings[0]
    )


def test_changes_on_the_command_line(tmp_path, capsys):
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for file, checks, verdict in zip(files, (BEFORE, AFTER), ("fail", "inconclusive"), strict=True):
        file.write_text(json.dumps(data(checks=checks, verdict=verdict)))
    names = [str(file) for file in files]
    assert cli.main(["compare", *names, "--changes"]) == 0
    told = capsys.readouterr()
    assert "fail -> inconclusive" in told.out and "protected bob lora" in told.out
    assert "different besides: nothing" in told.err
    assert cli.main(["compare", *names, "--changes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == ["fail", "inconclusive"] and len(told["changes"]) == 5
    for wrong in ([names[0]], [*names, names[0]], [*names, "--markdown"]):
        assert cli.main(["compare", *wrong, "--changes"]) == 2
        assert "--changes takes two runs" in capsys.readouterr().err
