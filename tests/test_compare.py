"""The comparison table: every number is worked out by hand from a small report."""

import json
from pathlib import Path

import pytest

from guardsmith.cli import app as cli
from guardsmith.core.errors import UserError
from guardsmith.reports.compare import (
    as_markdown,
    changes,
    circumstances,
    compare,
    compare_runs,
    kept,
    read_report,
    rows,
)


def score(side, subject, attack, look, value, n=8):
    return {"side": side, "subject": subject, "attack": attack, "look": look, "units": [[value] * n], "interval": None}


def check(name, subject, attack, status):
    return {"name": name, "subject": subject, "attack": attack, "status": status}


def make_report(**changed):
    """Two protected persons, a person and a robot as controls, one attack that goes on to twice its steps."""
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
            "verify": {"attacks": {"lora": {"name": "lora"}}, "looks": [1, 2], "identifiers": ["sks"], "seeds": [0],
                       "crossed": True, "sample": None, "images_per_unit": 8, "class_images": 4},
            "gate": {"kid_ratio": 2.0},
        },
    }  # fmt: skip
    return told | changed


DEMO = Path(__file__).parent.parent / "docs" / "results" / "demo-report.json"


def whole(told):
    """The same as a file has it: with everything else that a report must have, from the demo's."""
    demo = json.loads(DEMO.read_text())
    unmeasured = {"value": None, "low": None, "high": None}
    return demo | told | {
        "checks": [demo["checks"][0] | unmeasured | each for each in told["checks"]],
        "scores": [demo["scores"][0] | each for each in told["scores"]],
        "utility": demo["utility"] | told["utility"],
        "hardening": demo["hardening"] | told["hardening"],
        "recipe": demo["recipe"] | {key: demo["recipe"][key] | part for key, part in told["recipe"].items()},
    }  # fmt: skip


def test_every_answer_by_hand():
    found = rows(make_report())
    assert {question: tuple(cell) for question, cell in found.items()} == {
        "method": ("tripwire", None),
        "cost, U-Net forward equivalents": ("12,345", None),
        "lora: base": ("0.50 [0.40, 0.60]; 2 of 2", True),
        "lora: protected": ("0.15 [0.10, 0.20]; 2 of 2", True),
        "lora: protected, 2 x steps": ("0.30 [0.10, 0.50]; 1 of 2", False),
        # 200 / 10 at least, and 200 / 50
        "lora: steps to break over the base's": ("at least 12.0 x; 1 of 2 broken", False),
        "lora: control keeps, same class": ("90 % [90, 90]", False),
        "lora: control keeps, other class": ("90 % [90, 90]", False),  # counted from chance, .3
        "ordinary prompts: KID over that of two seeds": ("1.50 [1.00, 2.10]", False),
        "ordinary prompts: fidelity (base)": ("97.5 % (100.0 %)", False),
        "verdict of the gate": ("fail", False),
    }


def test_what_is_asked_for_can_be_changed():
    found = rows(make_report(), control=0.9, fidelity=0.03, steps=4.0)
    assert found["lora: control keeps, same class"].reached
    assert found["ordinary prompts: fidelity (base)"].reached
    assert found["lora: steps to break over the base's"].reached  # 200 / 50 is enough


def test_nobody_broken_within_too_few_steps_shows_nothing():
    told = make_report()
    told["steps_to_break"][1]["hardened"] = None
    assert tuple(rows(told)["lora: steps to break over the base's"]) == ("at least 12.0 x; 0 of 2 broken", None)


def test_what_was_not_measured_is_neither_reached_nor_missed():
    told = make_report(scores=[], steps_to_break=[], utility=dict.fromkeys(make_report()["utility"]))
    found = rows(told)
    for question, cell in found.items():
        if question not in ("method", "cost, U-Net forward equivalents", "verdict of the gate"):
            assert tuple(cell) == ("-", None), question


def test_an_attack_that_only_asks_has_no_share_of_the_base():
    """It need not work there, and a ratio to next to nothing is no number for anybody."""
    told = make_report()
    told["checks"] = [check for check in told["checks"] if check["name"] != "attack works on base"]
    found = rows(told)
    assert "lora: protected" in found
    assert not any("control keeps" in question or question == "lora: base" for question in found)
    assert kept(told, "lora", {"cid"}) is None and kept(make_report(), "lora", {"cid"}) is not None


def test_pictures_that_could_not_be_scored_are_left_out_of_means_but_the_gate_decides():
    told = make_report()
    told["scores"][2]["units"] = [[0.1, None]]
    told["checks"][3]["status"] = "inconclusive"
    cell = rows(told)["lora: protected"]
    assert (cell.text.split(";")[1], cell.reached) == (" 1 of 2", False)


def test_only_what_all_reports_have_is_compared():
    """Other looks and further attacks of one report do not keep the rest from being compared."""
    more = make_report()
    more["recipe"] = more["recipe"] | {
        "verify": more["recipe"]["verify"]
        | {"attacks": {"lora": {"name": "lora"}, "cdl": {"name": "cdl"}}, "looks": [1, 4]}
    }
    table, told = compare({"first": make_report(), "second": more})
    assert "lora: protected" in told and not any("cdl" in question or "x steps" in question for question in told)
    assert table.caption == "not in all of them, and left out: cdl, 2 x steps, 4 x steps"
    assert told["lora: protected"]["first"] == told["lora: protected"]["second"]
    table, told = compare({"first": make_report(), "second": make_report()})
    assert "lora: protected, 2 x steps" in told and table.caption is None
    other = make_report()
    other["recipe"] = other["recipe"] | {"verify": other["recipe"]["verify"] | {"identifiers": ["zwx"]}}
    with pytest.raises(UserError, match="second was verified with other identifiers than first"):
        compare({"first": make_report(), "second": other})


@pytest.mark.parametrize("what", ["attacks", "subjects", "base"])
def test_runs_that_were_judged_differently_are_not_compared(what):
    other = make_report()
    if what == "attacks":
        told = other["recipe"]["verify"] | {"attacks": {"lora": {"name": "lora", "params": {"rank": 8}}}}
        other["recipe"] = other["recipe"] | {"verify": told}
    elif what == "subjects":
        other["subjects"] = other["subjects"][:3]
    else:
        other["hardening"] = other["hardening"] | {"base_digest": "sha256:1"}
    with pytest.raises(UserError, match=f"second was verified with other {what} than first"):
        compare({"first": make_report(), "second": other})


@pytest.fixture
def runs(tmp_path):
    for name, method in (("a", "tripwire"), ("b", "imma")):
        folder = tmp_path / name / "verify"
        folder.mkdir(parents=True)
        hardening = make_report()["hardening"] | {"method": method}
        (folder / "report.json").write_text(json.dumps(whole(make_report(hardening=hardening))))
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
    older = json.loads(DEMO.read_text())
    del older["scores"][0]["look"]
    (runs / "older.json").write_text(json.dumps(older))
    for name, word in (
        ("empty", "run `guardsmith verify` first"),
        ("broken.json", "not valid"),
        ("old.json", "lacks schema"),
        ("older.json", "is not a report of this version of guardsmith (scores.0.look)"),
    ):
        assert cli.main(["compare", str(runs / name)]) == 2
        assert word in capsys.readouterr().err
    (runs / "c").mkdir()
    (runs / "c" / "a").mkdir()
    (runs / "c" / "a" / "verify").mkdir()
    (runs / "c" / "a" / "verify" / "report.json").write_text(json.dumps(whole(make_report())))
    with pytest.raises(UserError, match="same name"):
        compare_runs([runs / "a", runs / "c" / "a"])
    assert read_report(runs / "a" / "verify" / "report.json")["verdict"] == "fail"


def measured(name, subject, attack, status, value=None, low=None, high=None):
    return check(name, subject, attack, status) | {"value": value, "low": low, "high": high}


BEFORE = [
    measured("protected", "ann", "lora", "pass", 0.1, 0.05, 0.15),
    measured("protected", "bob", "lora", "fail", 0.5, 0.4, 0.6),
    measured("protected", "cid", "lora", "pass", 0.1, 0.0, 0.2),
    measured("protected", "dan", "lora", "pass", -0.1, -0.12, -0.08),
    measured("protected", "eve", "lora", "inconclusive"),
    measured("ordinary prompts (fidelity)", "", "", "pass", 0.99),
]
AFTER = [
    measured("protected", "ann", "lora", "inconclusive", 0.14, 0.05, 0.2),
    measured("protected", "bob", "lora", "pass", 0.1, 0.05, 0.14),
    measured("protected", "cid", "lora", "pass", 0.12, 0.1, 0.14),
    measured("protected", "dan", "lora", "pass", 0.0, -0.07, 0.07),
    measured("ordinary prompts (fidelity)", "", "", "pass", 0.98),
    measured("ordinary prompts (KID)", "", "", "pass", 1.2, 1.0, 1.4),
]


def test_what_changed_between_two_reports_the_worst_first():
    found = changes(make_report(checks=BEFORE), make_report(checks=AFTER))
    assert [tuple(change) for change in found] == [
        ("protected ann lora", "pass, 0.100", "inconclusive, 0.140", "worse"),
        ("protected eve lora", "inconclusive", "", "gone"),
        ("protected dan lora", "pass, -0.100", "pass, 0.000", "moved"),
        ("ordinary prompts (KID)", "", "pass, 1.200", "new"),
        ("protected bob lora", "fail, 0.500", "pass, 0.100", "better"),
    ]
    assert changes(make_report(checks=BEFORE), make_report(checks=BEFORE)) == []
    undecided = [measured("protected", "ann", "lora", status) for status in ("fail", "inconclusive")]
    [found] = changes(make_report(checks=undecided[:1]), make_report(checks=undecided[1:]))
    assert found.kind == "better"


def test_what_else_differs_is_named():
    other = make_report(calibration={"person": {"chance": 0.0}})
    other["hardening"] = other["hardening"] | {"method": "apdm"}
    other["recipe"] = other["recipe"] | {"gate": {"kid_ratio": 3.0}}
    assert circumstances(make_report(), make_report()) == []
    assert circumstances(make_report(), other) == ["method", "rules of the gate", "levels of similarity"]


def test_changes_on_the_command_line(tmp_path, capsys):
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for file, checks, verdict in zip(files, (BEFORE, AFTER), ("fail", "inconclusive"), strict=True):
        file.write_text(json.dumps(whole(make_report(checks=checks, verdict=verdict))))
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
