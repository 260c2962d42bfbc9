"""Publishing: what is refused, what goes up, and what the model card says. The Hub itself: test_publish_hub.py."""

import copy
import datetime
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from reports import make_report
from tiny import assert_one_sentence

from guardsmith.cli import app as cli
from guardsmith.core.atomic_io import write_json
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.models.checkpoint import file_digests, weights_digest
from guardsmith.registry.loader import load_registry
from guardsmith.release import publish
from guardsmith.release.card import licence_of
from guardsmith.release.hub import Published, files_of_release, with_retries
from guardsmith.release.publish import Refused, gather, objections
from guardsmith.reports.redaction import public_names, redacted_record
from guardsmith.reports.report import Report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
TODAY = datetime.date(2026, 11, 25)
TO = ["--repo-id", "acme/avatar", "--contact", "takedown@example.org", "--subjects", str(ROOT / "registries/demo.yaml")]


def make_output(folder, model, registry, **changes):
    """What a hardening and its verification leave, with the report of the demo and a small model in the place of its own."""
    shutil.copytree(model, folder / "model")
    report = json.loads((RESULTS / "demo-report.json").read_text()) | changes
    report["hardening"] |= {"model_digest": weights_digest(folder / "model"), "registry_digest": registry.digest}
    report["hardening"]["files"] = file_digests(folder / "model")
    names = public_names(registry.subjects, registry.controls, "salt")
    public = folder / "verify" / "public"
    public.mkdir(parents=True)
    write_json(folder / "verify" / "report.json", report)
    Report.parse(report).redacted(names).save(public / "report.json")
    record = json.loads((RESULTS / "demo-harden.json").read_text())
    write_json(public / "harden.json", redacted_record(record, names))
    (public / "report.html").write_text("<!doctype html><title>report</title>")
    shutil.copy(RESULTS / "demo-grid.png", folder / "verify" / "grid.png")
    return folder


@pytest.fixture(scope="module")
def registry():
    return load_registry(ROOT / "registries" / "demo.yaml")


@pytest.fixture
def output(tmp_path, v_folder, registry):
    return make_output(tmp_path / "out", v_folder, registry)


def edit(file, change):
    told = json.loads(file.read_text())
    change(told)
    write_json(file, told)


def test_a_verified_model_meets_no_objection(output, registry):
    assert objections(output, registry, TODAY) == []


def spoil_verdict(output):
    for file in (output / "verify" / "report.json", output / "verify" / "public" / "report.json"):
        edit(file, lambda told: told.update(verdict="inconclusive"))


def spoil_weights(output):
    file = output / "model" / "scheduler" / "scheduler_config.json"
    edit(file, lambda told: told.update(prediction_type="epsilon"))


def spoil_registry(output):
    for file in (output / "verify" / "report.json", output / "verify" / "public" / "report.json"):
        edit(file, lambda told: told["hardening"].update(registry_digest="0"))


def spoil_public(output):
    edit(output / "verify" / "public" / "report.json", lambda told: told["run"].update(finished="another day"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_verdict, "is inconclusive, not pass"),
        (spoil_weights, "is not what was verified"),
        (spoil_registry, "is not the registry that was verified"),
        (spoil_public, "is not of the same verification"),
    ],
)
def test_each_rule_refuses_by_itself(output, registry, spoil, said, capsys):
    spoil(output)
    [objection] = objections(output, registry, TODAY)
    assert said in objection
    assert cli.main(["publish", str(output), *TO, "--dry-run"]) == 1
    assert said in capsys.readouterr().err
    assert not (output / "release").exists()


def test_an_expired_consent_is_refused(output, tmp_path, capsys):
    told = yaml.safe_load((ROOT / "registries" / "demo.yaml").read_text())
    told["subjects"][0]["consent"]["expires_on"] = "2026-11-24"
    (tmp_path / "registries").mkdir()
    shutil.copytree(ROOT / "registries" / "avatars", tmp_path / "registries" / "avatars")
    file = tmp_path / "registries" / "demo.yaml"
    file.write_text(yaml.safe_dump(told))
    given = [*TO[:-1], str(file), "--today", "2026-11-25"]
    assert cli.main(["publish", str(output), *given, "--dry-run"]) == 1
    assert "consent expired" in capsys.readouterr().err
    then = load_registry(file, today=datetime.date(2026, 11, 24))
    assert any("consent for mira" in each for each in objections(output, then, TODAY))
    assert not any("consent for mira" in each for each in objections(output, then, datetime.date(2026, 11, 24)))


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("model", "no model"),
        ("verify/report.json", "guardsmith verify"),
        ("verify/public/report.json", "guardsmith verify"),
    ],
)
def test_without_a_verification_there_is_nothing_to_publish(output, missing, said, capsys):
    place = output / missing
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert cli.main(["publish", str(output), *TO, "--dry-run"]) == 2
    assert said in capsys.readouterr().err


def test_what_goes_up(output, capsys):
    (output / "model" / "LICENSE.md").write_text("only for good")
    edit_digest(output)
    assert cli.main(["publish", str(output), *TO, "--dry-run"]) == 0
    release = output / "release"
    files = files_of_release(release)
    model = {file.relative_to(output / "model").as_posix() for file in (output / "model").rglob("*") if file.is_file()}
    own = {
        "README.md",
        "guardsmith/report.json",
        "guardsmith/report.html",
        "guardsmith/harden.json",
        "guardsmith/recipe.yaml",
        "guardsmith/grid.png",
        "guardsmith/bom.cdx.json",
    }
    assert set(files) == model | own
    assert weights_digest(release) == weights_digest(output / "model")
    assert (release / "LICENSE.md").read_text() == "only for good"
    told = capsys.readouterr().err
    assert all(name in told for name in files)


def edit_digest(output):
    """The report is of the model as it is now."""
    for file in (output / "verify" / "report.json", output / "verify" / "public" / "report.json"):
        digests = {"model_digest": weights_digest(output / "model"), "files": file_digests(output / "model")}
        edit(file, lambda told: told["hardening"].update(digests))  # noqa: B023


def card_of(output, registry, **given):
    text = (gather(output, registry, "acme/avatar", contact="takedown@example.org", **given) / "README.md").read_text()
    head, body = text.split("---\n", 2)[1:]
    return yaml.safe_load(head), body


def test_the_card_has_the_numbers_of_the_report(output, registry):
    head, body = card_of(output, registry)
    assert (head["license"], head["library_name"], head["pipeline_tag"]) == ("apache-2.0", "diffusers", "text-to-image")
    assert "base_model" not in head, "builtin:avatar is nothing that the Hub knows"
    [index] = head["model-index"]
    measured = {each["name"]: each for result in index["results"] for each in result["metrics"]}
    report = json.loads((output / "verify" / "report.json").read_text())
    check = next(c for c in report["checks"] if (c["name"], c["attack"]) == ("protected", "dreambooth"))
    found = measured["similarity of protected subjects after dreambooth (lower is better)"]
    assert found["value"] == pytest.approx(check["value"], abs=1e-4)
    assert found["args"]["interval_95"] == pytest.approx([check["low"], check["high"]], abs=1e-2)
    assert measured["KID of benign pictures to the base's, over that of two sets of seeds"]["value"] == pytest.approx(
        report["utility"]["kid_ratio"], abs=1e-4
    )
    assert "Verdict: **pass**" in body and "takedown@example.org" in body and "in seconds and without training" in body
    assert report["hardening"]["model_digest"] in body
    told = "| dreambooth: protected | {value:.2f} [{low:.2f}, {high:.2f}]; 1 of 1 pass |\n|".format(**check)
    assert told in body, "rows follow each other"
    assert "(guardsmith/grid.png)" in body and "not-verified" not in head["tags"]


def test_what_people_are_asked_who_want_a_gated_model(output, capsys):
    asked = ["--gated", "manual", "--gated-prompt", "Personalize nobody who did not agree.", "--gated-field", "Company=text",
             "--gated-field", "I agree = and mean it=checkbox"]  # fmt: skip
    assert cli.main(["publish", str(output), *TO, "--dry-run", *asked]) == 0
    head = yaml.safe_load((output / "release" / "README.md").read_text().split("---\n", 2)[1])
    assert head["extra_gated_prompt"] == "Personalize nobody who did not agree."
    assert head["extra_gated_fields"] == {"Company": "text", "I agree = and mean it": "checkbox"}
    assert cli.main(["publish", str(output), *TO, "--dry-run", "--gated", "auto"]) == 0
    assert "extra_gated" not in (output / "release" / "README.md").read_text()
    capsys.readouterr()
    for wrong, said in (
        (asked[2:], "belong to --gated"), (["--gated", "auto", "--gated-field", "Company"], "NAME=KIND"),
        (["--gated", "auto", "--gated-field", "Company=essay"], "date_picker"),
    ):  # fmt: skip
        assert cli.main(["publish", str(output), *TO, "--dry-run", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_the_card_tells_of_half_precision_files(output, registry):
    assert "fp16" not in card_of(output, registry)[1].partition("## Use it")[2]
    (output / "model" / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    edit_digest(output)
    assert "The files of variant `fp16` are the same weights rounded" in card_of(output, registry)[1]


def test_the_bill_of_materials(output, registry):
    """By its schema where the validator is installed (cyclonedx-python-lib[json-validation])."""
    release = gather(output, registry, "acme/avatar", contact="x")
    text = (release / "guardsmith" / "bom.cdx.json").read_text()
    told = json.loads(text)
    report = json.loads((output / "verify" / "report.json").read_text())
    model = told["metadata"]["component"]
    assert model["hashes"] == [
        {"alg": "SHA-256", "content": report["hardening"]["model_digest"].removeprefix("sha256:")}
    ]
    assert model["pedigree"]["ancestors"][0]["name"] == "builtin:avatar"
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    similarity = next(c["value"] for c in report["checks"] if c["name"] == "protected")
    assert len(metrics) == 5 and float(metrics[0]["value"]) == pytest.approx(similarity, abs=1e-4)
    assert {"name": "guardsmith:verdict", "value": "pass"} in model["properties"]
    assert [c["name"] for c in told["components"]] == sorted(report["run"]["packages"])
    gather(output, registry, "acme/avatar", contact="x")
    assert (release / "guardsmith" / "bom.cdx.json").read_text() == text, "the same report gives the same document"
    pytest.importorskip("jsonschema")
    validation, schema = pytest.importorskip("cyclonedx.validation.json"), pytest.importorskip("cyclonedx.schema")
    assert validation.JsonStrictValidator(schema.SchemaVersion.V1_6).validate_str(text) is None


def test_a_base_of_the_hub_is_linked(output, registry):
    for file in (output / "verify" / "report.json", output / "verify" / "public" / "report.json"):
        edit(file, lambda told: told["hardening"].update(base="acme/sd15"))
    (output / "model" / "LICENSE.md").unlink(missing_ok=True)
    head, _ = card_of(output, registry, licence="creativeml-openrail-m")
    assert (head["base_model"], head["base_model_relation"]) == ("acme/sd15", "finetune")
    text = (output / "release" / "LICENSE.md").read_text()
    assert "acme/sd15" in text and "https://huggingface.co/spaces/CompVis/stable-diffusion-license" in text


def test_no_path_of_this_machine_goes_up(output, registry, tmp_path):
    base = str(tmp_path / "sd15")
    edit(output / "verify" / "report.json", lambda told: told["hardening"].update(base=base))
    edit(output / "verify" / "public" / "report.json", lambda told: told["hardening"].update(base="sd15"))
    for file in (output / "model").glob("LICENSE*"):
        file.unlink()
    release = gather(output, registry, "acme/avatar", contact="x", licence="openrail++")
    assert "made from sd15" in (release / "LICENSE.md").read_text()
    for file in files_of_release(release).values():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_what_is_published_against_the_gate_says_so(output, registry, capsys):
    spoil_verdict(output)
    given = ["--force-unverified", "--reason", "the clock is broken", "--dry-run"]
    assert cli.main(["publish", str(output), *TO, *given]) == 0
    text = (output / "release" / "README.md").read_text()
    assert "not-verified" in text
    assert "The gate did not say yes" in text and "the clock is broken" in text and "*inconclusive*" in text
    for wrong in (["--force-unverified"], ["--reason", "because"], ["--force-unverified", "--reason", " "]):
        assert cli.main(["publish", str(output), *TO, *wrong]) == 2
        assert "belong together" in capsys.readouterr().err
    spoil_nothing = card_of(output, registry)[1]
    assert "did not say yes" not in spoil_nothing


def test_pictures_of_everybody_go_up_only_if_all_are_invented(output, registry):
    real = registry.controls[0].model_copy(update={"consent": None})
    other = registry.model_copy(update={"controls": (real,)})
    release = gather(output, other, "acme/avatar", contact="x")
    assert not (release / "guardsmith" / "grid.png").exists()
    assert "grid.png" not in (release / "README.md").read_text()


def test_the_licence_has_to_be_known(tmp_path):
    with pytest.raises(UserError, match="--license") as caught:
        licence_of(tmp_path, "acme/sd15", None, None)
    assert_one_sentence(caught.value)
    with pytest.raises(UserError, match="--license-file") as caught:
        licence_of(tmp_path, "acme/sd15", "strange-licence", None)
    assert_one_sentence(caught.value)
    (tmp_path / "mine.txt").write_text("my words")
    assert licence_of(tmp_path, "acme/sd15", "other", tmp_path / "mine.txt") == ("other", "my words")
    assert licence_of(tmp_path, "builtin:avatar", None, tmp_path / "mine.txt").id == "apache-2.0"


def test_every_licence_file_of_the_base_is_copied_whole(tmp_path):
    (tmp_path / "LICENSE").write_text("the licence\n")
    (tmp_path / "NOTICE.txt").write_text("the notice\n")
    found = licence_of(tmp_path, "somebody/model", "openrail++", None)
    assert found.text == "the licence\n\nthe notice\n" and found.restricts_use
    assert not licence_of(tmp_path, "somebody/model", "apache-2.0", None).restricts_use
    for text, said in ((b"", "is empty"), (b"\xff\xfe", "not UTF-8")):
        (tmp_path / "own.txt").write_bytes(text)
        with pytest.raises(UserError, match=said) as caught:
            licence_of(tmp_path, "somebody/model", "openrail++", tmp_path / "own.txt")
        assert_one_sentence(caught.value)
    with pytest.raises(UserError, match="as the Hub calls it"):
        licence_of(tmp_path, "somebody/model", "Open RAIL", None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gated", "often"], "auto or manual"),
        (["--create-pr", "--tag", "v1"], "--create-pr"),
        (["--create-pr", "--branch", "next"], "--create-pr"),
        (["--repo-id", "avatar"], "organisation/name"),
    ],
)
def test_wrong_usage(output, flags, said, capsys):
    assert cli.main(["publish", str(output), *TO, *flags, "--dry-run"]) == 2
    assert said in capsys.readouterr().err


def ran(monkeypatch, verdict):
    """`run` without its work: what would be published."""
    import guardsmith.evaluation.pipeline
    import guardsmith.hardening.pipeline

    asked = []
    codes = {"pass": 0, "fail": 1, "inconclusive": 3}
    monkeypatch.setattr(guardsmith.hardening.pipeline, "harden", lambda *_, **__: {})
    monkeypatch.setattr("guardsmith.release.hub.check_rights", lambda repo_id: None)
    monkeypatch.setattr(
        guardsmith.evaluation.pipeline,
        "verify",
        lambda *_, **__: make_report(exit_code=codes[verdict], verdict=verdict),
    )
    monkeypatch.setattr(
        publish, "publish", lambda *what, **how: asked.append((what, how)) or Published("abc", "https://hub/x", True)
    )
    return asked


@pytest.mark.parametrize("verdict", ["pass", "fail", "inconclusive"])
def test_a_run_publishes_what_passes_and_nothing_else(tmp_path, monkeypatch, verdict, capsys):
    asked = ran(monkeypatch, verdict)
    command = [
        "run",
        "demo",
        "--output",
        str(tmp_path / "out"),
        "--publish",
        "acme/avatar",
        "--contact",
        "x@example.org",
    ]
    code = cli.main(command)
    told = capsys.readouterr().err
    if verdict == "pass":
        [(what, how)] = asked
        assert what[0] == tmp_path / "out" and what[2] == "acme/avatar" and how["contact"] == "x@example.org"
        assert code == 0 and "published: https://hub/x at abc" in told
    else:
        assert asked == [] and code in (1, 3) and f"not published: the verdict is {verdict}" in told


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--publish", "acme/avatar"], "belong together"), (["--contact", "x"], "belong together"),
     (["--publish", "avatar", "--contact", "x"], "organisation/name")],
)  # fmt: skip
def test_a_run_that_could_not_publish_does_not_begin(tmp_path, monkeypatch, flags, said, capsys):
    ran(monkeypatch, "pass")
    assert cli.main(["run", "demo", "--output", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_changes_while_it_is_gathered_is_not_uploaded(output, registry, monkeypatch):
    real = publish.gather

    def late(*args, **options):
        spoil_weights(output)
        return real(*args, **options)

    monkeypatch.setattr(publish, "gather", late)
    with pytest.raises(RunFailed, match="was changed while"):
        publish.publish(output, registry, "acme/avatar", today=TODAY, contact="x")


class Response:
    def __init__(self, status, headers):
        self.status_code, self.headers, self.request, self.text = status, headers, None, ""


def hub_error(status, **headers):
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError(f"{status} said the Hub", response=Response(status, headers))


def failing(*errors):
    left = list(errors)

    def call():
        if left:
            raise left.pop(0)
        return "done"

    return call


def test_a_busy_hub_is_asked_again_when_it_says(capsys):
    waits = []
    errors = [hub_error(429, **{"Retry-After": "7"}), hub_error(503), ConnectionError("reset")]
    assert with_retries("acme/avatar", failing(*errors), waits.append) == "done"
    assert waits == [7.0, 4.0, 8.0]
    assert "the Hub is busy (429); again in 7 s" in capsys.readouterr().err
    assert with_retries("x", failing(hub_error(429, **{"Retry-After": "99999"})), waits.append) == "done"
    assert waits[-1] == 300


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (hub_error(401), UserError, "no right"), (hub_error(403), UserError, "no right"),
        (hub_error(404), UserError, "does not know it"), (hub_error(412), RunFailed, "somebody else"),
        (hub_error(422), RunFailed, "refuses it (422"),
    ],
)  # fmt: skip
def test_what_will_not_change_is_not_tried_again(error, kind, said):
    waits = []
    with pytest.raises(kind, match=re.escape(said)) as caught:
        with_retries("acme/avatar", failing(error), waits.append)
    assert_one_sentence(caught.value)
    assert waits == []


def test_patience_ends():
    waits = []
    with pytest.raises(RunFailed, match="busy \\(503\\) after 5 attempts") as caught:
        with_retries("acme/avatar", failing(*[hub_error(503)] * 9), waits.append)
    assert_one_sentence(caught.value)
    assert len(waits) == 4


def test_the_refusal_is_exit_code_one():
    assert Refused("x").exit_code == 1
    assert copy.copy(Refused("x")).args == ("x",)
