"""What leaves the house: no id, no picture and no path of those who are protected, unless they are invented."""

import json
import re
import stat

import pytest
from test_page import case, made, make_subject  # noqa: F401 (a fixture)
from tiny import assert_one_sentence

from guardsmith.core.errors import RunFailed
from guardsmith.reports.html import Evidence
from guardsmith.reports.redaction import check_redacted, public_names, salt_of, save_public

RECORD = {"base": "b", "subjects": ["mira"], "method": "tripwire", "history": [{"loss": 1.0}]}


@pytest.fixture
def told(case):  # noqa: F811
    """The case of the page's tests with what a whole report has besides."""
    report, units, protected, controls = case
    report |= {
        "released": {"mira": [0.1, 0.2]}, "steps_to_break": [{"subject": "mira", "attack": "lora-4"}],
        "subjects": [{"id": "mira", "role": "protected"}, {"id": "nora", "role": "control"}],
        "policy": {"name": "p", "dated": "2026-01-01", "measured_on": "", "judge": {"name": "avatar"}, "digest": "0"},
    }  # fmt: skip
    report["recipe"]["base"] = "b"
    return report, units, protected, controls


def saved(told, folder, salt="salt", record=RECORD):
    report, units, protected, controls = told
    save_public(folder / "public", Evidence(report, units, True), record, protected, controls, [], salt)
    return {file.name: file.read_text() for file in (folder / "public").iterdir()}


def test_nobody_is_named_and_nobody_is_shown(told, tmp_path):
    """Though the report for the house may show everybody."""
    files = saved(told, tmp_path)
    assert set(files) == {"report.json", "report.html", "harden.json"}
    for text in files.values():
        assert "mira" not in text and "nora" not in text
        assert "data:image" not in text
        assert str(tmp_path) not in text
    public = json.loads(files["report.json"])
    name = public["subjects"][0]["id"]
    assert re.fullmatch("subject-[0-9a-f]{12}", name)
    assert {score["subject"] for score in public["scores"]} == {name, public["subjects"][1]["id"]}
    assert list(public["released"]) == [name] and public["steps_to_break"][0]["subject"] == name
    assert list(public["failed_units"]) == [f"base/{name}/lora-4/zwx/0"]
    assert json.loads(files["harden.json"])["subjects"] == [name]
    assert name in files["report.html"] and "is a person" not in files["report.html"]
    for kept in ("verdict", "calibration", "run"):
        assert public[kept] == told[0][kept]
    assert told[0]["subjects"][0]["id"] == "mira", "the report itself stays as it is"


def test_invented_ones_keep_name_and_pictures(told, tmp_path):
    report, units, _, controls = told
    mira = make_subject(tmp_path, basis="invented")
    files = saved((report, units, [mira], controls), tmp_path)
    assert "mira, real picture 1" in files["report.html"]
    assert "nora" not in files["report.html"]
    assert json.loads(files["report.json"])["subjects"][0]["id"] == "mira"


def test_names_depend_on_the_salt_and_the_id(tmp_path):
    mira, nora = make_subject(tmp_path), make_subject(tmp_path, "nora")
    first, second = public_names([mira], [nora], "one"), public_names([mira], [nora], "two")
    assert len({*first.values(), *second.values()}) == 4
    assert first == public_names([mira], [nora], "one")
    salt = salt_of(tmp_path)
    assert len(salt) == 32 and salt == salt_of(tmp_path)
    assert stat.S_IMODE((tmp_path / ".salt").stat().st_mode) == 0o600


def test_paths_of_this_machine_go(told, tmp_path):
    report, *rest = told
    base = tmp_path / "secret" / "sd15"
    base.mkdir(parents=True)
    report["hardening"]["base"] = report["recipe"]["base"] = str(base)
    report["policy"]["judge"] = {"name": "dino", "model": str(base)}
    files = saved((report, *rest), tmp_path, record=RECORD | {"base": str(base)})
    assert not any("secret" in text for text in files.values())
    public = json.loads(files["report.json"])
    assert public["hardening"]["base"] == public["recipe"]["base"] == public["policy"]["judge"]["model"] == "sd15"


def test_what_is_left_of_an_id_is_an_error_and_nothing_is_written(told, tmp_path):
    told[0]["checks"][0]["sentence"] = "what was drawn of Mira"
    with pytest.raises(RunFailed, match="still names the subject 'mira'") as caught:
        saved(told, tmp_path)
    assert_one_sentence(caught.value)
    assert not (tmp_path / "public").exists()
    check_redacted("the admiral of mira-2", {"mira": "subject-1"}, "x")  # another word
    check_redacted("mira", {"mira": "mira"}, "x")  # nobody hidden


def test_an_older_folder_is_replaced_whole(told, tmp_path):
    saved(told, tmp_path)
    files = saved(told, tmp_path, record=None)
    assert set(files) == {"report.json", "report.html"}, "what guardsmith did not make has no record"


def test_units_find_their_curves_under_the_new_name(told, tmp_path):
    assert saved(told, tmp_path)["report.html"].count("<svg") == made(told, tmp_path).count("<svg") > 0
