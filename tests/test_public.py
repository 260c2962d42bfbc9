"""What leaves the house: no id, no picture and no path of those who are protected, unless they are invented."""

import json
import re
import stat
from typing import Annotated, Any

import pytest
from pydantic import BaseModel
from test_page import case, made, make_subject  # noqa: F401 (a fixture)
from tiny import assert_one_sentence

from guardsmith.core.errors import RunFailed
from guardsmith.core.redaction import Place, Private, Reason, SubjectId, UnitName, redacted
from guardsmith.gate import checks as checks_module
from guardsmith.gate.checks import Check
from guardsmith.reports import displacement as displacement_module
from guardsmith.reports import report as report_module
from guardsmith.reports.html import Evidence
from guardsmith.reports.redaction import check_redacted, public_names, salt_of, save_public
from guardsmith.reports.report import Report

RECORD = {"base": "b", "subjects": ["mira"], "method": "tripwire", "history": [{"loss": 1.0}]}


@pytest.fixture
def told(case):  # noqa: F811
    """The case of the page's tests with what a whole report has besides."""
    report, units, protected, controls = case
    for number, score in enumerate(report["scores"], 1):
        blocks = dict.fromkeys(("down", "mid", "up", "rest", "text_encoder", "words"), 0.01)
        moved = {"rate": 0.001, "steps": 10, "largest_possible": 0.01, "largest": 0.01, "overall": 0.01 * number}
        score |= {"displacement": moved | {"blocks": blocks}, "units": [[0.1, 0.2]]}
    probe = {"rate": 0.001, "steps": 10, "similarity": 0.5, "displacement": 0.01, "reached": True}
    report |= {
        "released": {"mira": [0.1, 0.2]},
        "just_enough": [{"attack": "lora-4", "subjects": ["mira"], "share": 0.9, "genuine": probe, "probes": [probe],
                         "result": probe}],
        "steps_to_break": [{"subject": "mira", "attack": "lora-4", "base": 1, "hardened": None, "tried": 2}],
    }  # fmt: skip
    return report, units, protected, controls


def saved(told, folder, salt="salt", record=RECORD):
    report, units, protected, controls = told
    save_public(folder / "public", Evidence(Report.parse(report), units, True), record, protected, controls, [], salt)
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
    assert public["just_enough"][0]["subjects"] == [name]
    assert "How far an attacker has to move the weights" in files["report.html"]
    assert list(public["released"]) == [name] and public["displacement_to_break"][0]["subject"] == name
    assert list(public["failed_units"]) == [f"base/{name}/lora-4/zwx/0"]
    assert json.loads(files["harden.json"])["subjects"] == [name]
    assert name in files["report.html"] and "is a person" not in files["report.html"]
    whole = Report.parse(told[0]).as_json()
    for kept in ("verdict", "calibration", "run", "utility"):
        assert public[kept] == whole[kept]
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


class Note(BaseModel):
    author: SubjectId | None
    places: tuple[Place, int]
    by: dict[SubjectId, list[dict[UnitName, Reason]]]
    text: str
    params: Annotated[dict[str, Any], Private.PLACE] = {}
    inner: "Note | None" = None
    check: Check | None = None


def test_annotations_are_found_wherever_they_stand():
    """In unions, tuples, keys and values, in further models and dataclasses; and a mark on a mapping counts for all in it."""
    rules = {mark: lambda text, mark=mark: f"{mark.name}({text})" for mark in Private}
    note = Note(
        author="ann", places=("/p", 3), by={"bob": [{"u": "why"}]}, text="free", params={"a": ["/q", 1, {"b": "/r"}]},
        inner=Note(author=None, places=("/s", 0), by={}, text="ann"), check=Check("n", "cid", "a", "pass", "s", value=1.0),
    )  # fmt: skip
    public = redacted(note, rules)
    assert (public.author, public.places, public.text) == ("SUBJECT(ann)", ("PLACE(/p)", 3), "free")
    assert public.by == {"SUBJECT(bob)": [{"UNIT(u)": "REASON(why)"}]}
    assert public.params == {"PLACE(a)": ["PLACE(/q)", 1, {"PLACE(b)": "PLACE(/r)"}]}
    assert (public.inner.author, public.inner.places[0], public.inner.text) == (None, "PLACE(/s)", "ann")
    assert (public.check.subject, public.check.name, public.check.value) == ("SUBJECT(cid)", "n", 1.0)
    assert note.author == "ann" and note.inner.places == ("/s", 0), "the note itself stays as it is"


def strings_named_like_a_subject(model, seen=None):
    """Fields of a model, and of those in it, whose name says that they hold a subject, with whether they are marked."""
    seen = set() if seen is None else seen
    if model in seen:
        return
    seen.add(model)
    for name, info in (getattr(model, "model_fields", None) or model.__pydantic_fields__).items():
        text = f"{info.annotation!r} {info.metadata!r}"
        if name in ("subject", "subjects", "id", "released", "failed_units"):
            yield f"{model.__name__}.{name}", "Private." in text or "AttackedSubject" in text
        for part in re.findall(r"guardsmith\.[a-z_.]+\.([A-Za-z]+)", repr(info.annotation)):
            found = next((each for each in PARTS if each.__name__ == part), None)
            if found is not None:
                yield from strings_named_like_a_subject(found, seen)


MODULES = (report_module, displacement_module, checks_module)
PARTS = [kind for module in MODULES for kind in vars(module).values() if isinstance(kind, type)]


def test_no_field_of_a_report_that_holds_a_subject_is_without_a_mark():
    fields = dict(strings_named_like_a_subject(Report))
    known = {
        "Check.subject",
        "Score.subject",
        "DisplacementToBreak.subject",
        "JustEnough.subjects",
        "AttackedSubject.id",
    }
    assert known | {"Report.released"} <= set(fields)
    assert all(fields.values()), fields


def test_a_subject_without_a_public_name_is_an_error(told):
    with pytest.raises(RunFailed, match="'mira', who has no public name"):
        Report.parse(told[0]).redacted({"nora": "control-1"})


def test_paths_in_parameters_of_attacks_go_too(told, tmp_path):
    (tmp_path / "secret").mkdir()
    told[0]["recipe"]["verify"]["attacks"]["lora-4"]["params"] = {"adapter": str(tmp_path / "secret"), "rank": 4}
    public = Report.parse(told[0]).redacted({"mira": "a", "nora": "b"})
    assert public.recipe.verify.attacks["lora-4"].params == {"adapter": "secret", "rank": 4}


def test_what_a_checkpoint_carries_besides_is_nobodys_business(told):
    told[0]["hardening"] |= {"carries": ["mira.txt"], "files": {"unet/x.safetensors": "sha256:1"}}
    public = Report.parse(told[0]).redacted({"mira": "a", "nora": "b"})
    assert public.hardening.carries is None and public.hardening.files == {"unet/x.safetensors": "sha256:1"}


def test_a_field_of_a_later_version_is_not_handed_on(told, tmp_path):
    """What this version does not know it cannot redact."""
    told[0]["visits"] = {"mira": 3}
    told[0]["scores"][0]["who"] = "mira"
    files = saved(told, tmp_path)
    assert "visits" not in files["report.json"] and "who" not in files["report.json"]
