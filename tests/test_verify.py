"""Verification end to end on the embedded base, with attacks too short to learn anything: what is tested is the judging."""

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import inprocess
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from guardsmith.cli import app as cli
from guardsmith.config.loading import load_recipe
from guardsmith.config.recipe import GateSpec
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.evaluation.pipeline import verify
from guardsmith.gate.calibration import calibration
from guardsmith.gate.policy import Policy, as_yaml, default_policy, load_policy
from guardsmith.hardening.pipeline import harden
from guardsmith.models.checkpoint import load_model, weights_digest
from guardsmith.registry.loader import load_registry
from guardsmith.reports.report import PolicyRecord, Report

ROOT = Path(__file__).parent.parent
TINY = {
    "sampling": {"steps": 2, "guidance": 3.0, "batch": 32}, "probe": {"times": 0},
    "method": {"name": "apdm", "params": {"outer_steps": 2, "inner_steps": 2, "class_images": 4, "learning_rate": 1e-4}},
    "verify": {
        "attacks": {"lora": {"name": "lora", "params": {"steps": 2, "batch_size": 2, "learning_rate": 1e-3}}},
        "identifiers": ["sks"],
        "images_per_unit": 8,
        "class_images": 4,
        "benign_images": 12,
        "deployability": {"checks": []},  # which have tests of their own
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY | {"subjects": str(ROOT / "registries" / "demo.yaml")}))
    return file


@pytest.fixture(scope="module")
def registry():
    return load_registry(ROOT / "registries" / "demo.yaml")


@pytest.fixture(scope="module")
def verified(recipe_file, registry, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "run"
    recipe = load_recipe(str(recipe_file))
    harden(registry, recipe, output)
    return output, verify(registry, recipe, output, workers=1, quiet=True)


@pytest.fixture
def copied(verified, tmp_path):
    shutil.copytree(verified[0], tmp_path / "run")
    return tmp_path / "run"


def test_an_attack_that_does_not_learn_on_the_base_is_inconclusive_not_a_pass(verified):
    report = verified[1]
    assert report.verdict == "inconclusive"
    assert report.exit_code == 3
    learnt = [c for c in report.checks if c.name == "attack works on base"]
    assert {c.subject for c in learnt} == {"mira", "nora"}
    assert {c.status for c in learnt} == {"inconclusive"}


def test_protected_subjects_are_asked_for_before_anyone_attacks(verified):
    output, report = verified
    [check] = [c for c in report.checks if c.name == "released weights"]
    assert (check.subject, check.status) == ("mira", "pass")
    assert list(report.released) == ["mira"]
    assert sum(report.released["mira"]) / 8 == pytest.approx(check.value)
    assert len(list((output / "verify/hardened/released/mira").glob("*/*.png"))) == 8
    page = (output / "verify" / "report.html").read_text()
    assert page.count("mira as the released weights draw it") == 4


def test_the_evidence_for_the_public_is_of_the_same_verification(verified):
    """Its subjects are invented, so they keep their names."""
    output, report = verified
    public = json.loads((output / "verify/public/report.json").read_text())
    whole = report.as_json()
    whole["hardening"]["carries"] = None  # which is nobody's business
    assert public == whole, "nothing else was hidden"
    told = json.loads((output / "verify/public/harden.json").read_text())
    assert told["model_digest"] == report.hardening.model_digest
    assert "mira, real picture 1" in (output / "verify/public/report.html").read_text()


def test_everyday_use_is_part_of_the_report_and_of_the_verdict(copied, registry, recipe_file, tmp_path):
    """An adapter without its files is a case that failed to run, and is said so."""
    (tmp_path / "nowhere/adapter").mkdir(parents=True)
    changes = ["verify.deployability.checks=[precision, controlnet]", "verify.deployability.images=8"]
    recipe = load_recipe(str(recipe_file), [*changes, f"verify.deployability.t2i_adapter={tmp_path}/nowhere/adapter"])
    report = verify(registry, recipe, copied, workers=1, quiet=True)
    checks = {check.attack: check for check in report.checks if check.name.startswith("everyday use")}
    assert {"float16", "bfloat16", "stored values beyond float16"} <= set(checks)
    assert checks["stored values beyond float16"].status == "pass"
    assert checks["ControlNet"].sentence.startswith("follows the control")
    assert checks["T2I-Adapter"].status == "inconclusive"
    assert checks["T2I-Adapter"].sentence == "failed to run (OSError)"
    assert Report.load(copied).deployability == report.deployability
    page = (copied / "verify" / "report.html").read_text()
    assert "/nowhere/adapter" in page.partition('id="everyday"')[2].partition('id="how"')[0]
    assert page.count("pictures of the base above, of the hardened model below") == 4
    assert page.count("not checked") == 4  # adapters, merges, quantization, samplers
    public = (copied / "verify" / "public" / "report.html").read_text()
    assert "failed to run (OSError)" in public and "nowhere" not in public

    folder, failed = copied / "verify" / "deployability", set()
    for file in folder.glob("*.json"):
        if any(one["error"] for one in json.loads(file.read_text())):
            failed.add(file)
    assert len(failed) == 1 and len(list(folder.glob("*.json"))) == 2, "one for each check"
    kept = load_recipe(str(recipe_file), [changes[1], "verify.deployability.checks=[controlnet]"])
    verify(registry, kept, copied, workers=1, quiet=True)
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    verify(registry, kept, copied, workers=1, quiet=True)
    assert len(before) == 3 and all(file.stat().st_mtime_ns == time for file, time in before.items()), "measured again"


def test_a_verdict_stands_though_nothing_can_be_published(copied, registry, recipe_file, monkeypatch, capsys):
    from guardsmith.evaluation import writing as module

    def refuses(*_):
        raise RunFailed("report.json still names the subject 'mira'")

    monkeypatch.setattr(module, "save_public", refuses)
    report = verify(registry, load_recipe(str(recipe_file)), copied, workers=1, quiet=True)
    assert report.verdict == "inconclusive" and (copied / "verify" / "report.json").exists()
    assert "warning: report.json still names" in capsys.readouterr().err
    assert not (copied / "verify" / "public").exists(), "older evidence is of another verification"


def test_every_unit_leaves_pictures_scores_and_settings(verified):
    output, report = verified
    units = sorted((output / "verify").glob("*/*/lora/sks/0/*"))
    assert [u.relative_to(output / "verify").parts[:2] for u in units] == [
        ("base", "mira"), ("base", "nora"), ("hardened", "mira"), ("hardened", "nora"),
    ]  # fmt: skip
    for unit in units:
        assert len(list((unit / "images" / "2").glob("*.png"))) == 8
        assert len(json.loads((unit / "scores.json").read_text())["identity"]["2"]) == 8
        told = json.loads((unit / "attack.json").read_text())
        assert told["params"]["steps"] == 2
        assert str(ROOT) not in json.dumps(told)  # nothing of this machine
    assert str(ROOT) not in json.dumps(report.as_json())
    assert (output / "verify" / "grid.png").stat().st_size > 10_000


def test_the_page_shows_both_subjects_and_ordinary_prompts(verified):
    text = (verified[0] / "verify" / "report.html").read_text()
    assert text.count("mira as drawn after lora on the hardened model") == 4 + 4 + 2 * 8, (
        "at a glance, in its room, and where it learnt nothing: of the base, and of what then is no evidence"
    )
    assert text.count("nora as drawn after lora on the base model") >= 4
    assert text.count("the hardened model&#39;s picture of: ") == 12
    assert str(ROOT) not in text


def test_the_report_is_as_its_schema_says_and_names_the_weights_it_judged(verified):
    output, report = verified
    told = Report.load(output)
    assert told == report
    assert told.policy is not None and told.policy.digest == default_policy().digest
    assert report.hardening.model_digest == weights_digest(output / "model")


def test_utility_is_measured_against_the_base_with_other_seeds(verified):
    utility = verified[1].utility
    assert 0 < utility.kid_base < 1
    assert utility.kid_ratio == pytest.approx(utility.kid_hardened / utility.kid_base)
    assert utility.kid_ratio_low <= utility.kid_ratio <= utility.kid_ratio_high
    assert 0 <= utility.fidelity_hardened <= 1


def test_a_second_run_repeats_nothing_and_says_the_same(verified, registry, recipe_file):
    output, report = verified
    files = {f: f.stat().st_mtime_ns for f in (output / "verify").glob("*/*/lora/**/*.json")}
    again = verify(registry, load_recipe(str(recipe_file)), output, workers=1, quiet=True)
    assert {f: f.stat().st_mtime_ns for f in files} == files
    assert again.checks == report.checks


def unit_of(output, side, subject):
    """The folder of the only unit of a subject."""
    [unit] = (output / "verify" / side / subject / "lora" / "sks" / "0").iterdir()
    return unit


def scores_in(unit):
    return json.loads((unit / "scores.json").read_text())["identity"]


def test_a_missing_unit_is_run_again_with_the_same_result(copied, registry, recipe_file, real_processes):
    """In a process of its own, as all of them run outside of these tests."""
    unit = unit_of(copied, "hardened", "mira")
    before = scores_in(unit)["2"]
    (unit / "scores.json").unlink()  # what a kill leaves behind
    verify(registry, load_recipe(str(recipe_file)), copied, workers=1, quiet=True)
    assert scores_in(unit)["2"] == pytest.approx(before, abs=1e-5)


def test_other_settings_are_another_unit_beside_it(copied, registry, recipe_file):
    unit = unit_of(copied, "base", "mira")
    before = (unit / "scores.json").read_text()
    once = load_recipe(str(recipe_file), ["verify.attacks.lora.params.steps=1"])
    report = verify(registry, once, copied, workers=1, quiet=True)
    assert (unit / "scores.json").read_text() == before
    [other] = {*unit.parent.iterdir()} - {unit}
    [shown] = [s for s in report.scores if (s.side, s.subject) == ("base", "mira")]
    assert shown.units == [scores_in(other)["1"]]


def test_scores_of_other_settings_or_too_few_are_not_taken(copied, registry, recipe_file):
    from guardsmith.evaluation.planning import TargetModel, plan_units
    from guardsmith.evaluation.units import scores_of

    unit, recipe = unit_of(copied, "hardened", "mira"), load_recipe(str(recipe_file))
    target = TargetModel(
        load_model(str(copied / "model")), weights_digest(copied / "model"), copied / "verify" / "hardened"
    )
    planned = next(iter(plan_units(registry, recipe, {"hardened": target})))
    whole = json.loads((unit / "scores.json").read_text())
    assert planned.folder == unit
    assert scores_of(planned) == {1.0: whole["identity"]["2"]}
    for broken in (
        whole | {"digest": "0" * 16},
        whole | {"identity": {"2": whole["identity"]["2"][:7]}},
        whole | {"identity": {"1": whole["identity"]["2"]}},
    ):
        (unit / "scores.json").write_text(json.dumps(broken))
        assert scores_of(planned) is None
    verify(registry, recipe, copied, workers=1, quiet=True)
    assert json.loads((unit / "scores.json").read_text())["digest"] == whole["digest"]
    assert scores_in(unit)["2"] == pytest.approx(whole["identity"]["2"], abs=1e-5)


def test_runs_on_the_base_can_be_shared(copied, tmp_path, registry, recipe_file, verified):
    """The second verification finds everything of the base; nothing of it is written into its own output."""
    shutil.move(copied / "verify" / "base", tmp_path / "shared")
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "shared").glob("**/*.*")}
    report = verify(
        registry, load_recipe(str(recipe_file)), copied, base_runs=tmp_path / "shared", workers=1, quiet=True
    )
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "shared").glob("**/*.*")} == files
    assert not (copied / "verify" / "base").exists()
    assert report.checks == verified[1].checks


LOOKS = "verify.evaluation_points=[0.5, 1, 3]"


@pytest.fixture(scope="module")
def went_on(verified, registry, recipe_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("further") / "run"
    shutil.copytree(verified[0], output)
    return output, verify(registry, load_recipe(str(recipe_file), [LOOKS]), output, workers=1, quiet=True)


def test_attackers_of_the_protected_go_on_and_others_do_not(went_on):
    report = went_on[1]
    seen = {(s.side, s.subject): set() for s in report.scores}
    for score in report.scores:
        seen[score.side, score.subject].add(score.evaluation_point)
    assert seen == {
        ("base", "mira"): {0.5, 1}, ("base", "nora"): {0.5, 1}, ("hardened", "nora"): {0.5, 1},
        ("hardened", "mira"): {0.5, 1, 3},
    }  # fmt: skip
    checked = [c.attack for c in report.checks if c.name == "protected"]
    assert checked == ["lora", "lora, 3 x steps"]
    assert all(c.attack == "lora" for c in report.checks if c.name in ("attack works on base", "control learnable"))


def test_a_look_on_the_way_shows_what_an_attack_that_ends_there_draws(went_on, verified):
    """Two steps of six give the pictures of an attack of two steps."""
    usual = next((verified[0] / "verify" / "hardened" / "mira").glob("*/*/*/*/images/2"))
    [longer] = (went_on[0] / "verify" / "hardened" / "mira").glob("*/*/*/*/images/6")
    for file in sorted(usual.iterdir()):
        assert file.read_bytes() == (longer.parent / "2" / file.name).read_bytes()
    assert any(f.read_bytes() != (longer / f.name).read_bytes() for f in usual.iterdir())


def test_an_attack_that_has_learnt_the_subject_goes_on_no_longer(tmp_path, registry, recipe_file, monkeypatch):
    """It is looked at up to its usual end in any case, and later looks show what it has by then."""
    from guardsmith.evaluation import planning
    from guardsmith.evaluation import runs as matrix
    from guardsmith.evaluation.units import scores_of

    base = load_model("builtin:avatar")
    recipe = load_recipe(str(recipe_file), ["verify.evaluation_points=[0.5, 1, 2, 3]", "verify.class_images=0"])
    target = planning.TargetModel(base, "sha256:0", tmp_path)
    unit = next(iter(planning.plan_units(registry, recipe, {"hardened": target})))
    assert list(unit.evaluation_points.values()) == [1, 2, 4, 6]
    monkeypatch.setattr(matrix, "half_way", lambda levels: -1.0)  # anything counts as learnt
    matrix.run_unit(unit)
    assert json.loads((unit.folder / "attack.json").read_text())["steps_taken"] == 2
    assert sorted(folder.name for folder in (unit.folder / "images").iterdir()) == ["1", "2"]
    found = scores_of(unit)
    assert found[0.5] != found[1] == found[2] == found[3]
    assert [file.parent.name for look in (0.5, 1, 2, 3) for file in unit.pictures(look)[:1]] == ["1", "2", "2", "2"]
    told = json.loads((unit.folder / "scores.json").read_text())
    told["identity"].pop("2")  # and a look before the usual end is not an end
    (unit.folder / "scores.json").write_text(json.dumps(told))
    assert scores_of(unit) is None


FURTHER = ["verify.displacement={attacks: [lora], rates: [0.5], just_enough: true}", LOOKS]


def test_attacks_at_other_rates_are_measured_on_the_protected_and_not_held_against_them(
    went_on, registry, recipe_file, tmp_path, capsys
):
    """Two steps learn nothing anywhere: at another rate that is no finding, and there is no just-enough attack."""
    copied = shutil.copytree(went_on[0], tmp_path / "run")
    recipe = load_recipe(str(recipe_file), FURTHER)
    report = verify(registry, recipe, copied, workers=1, quiet=True)
    assert "lora does not learn its subjects on the base; it has no just-enough attack" in capsys.readouterr().err
    slow = {(s.side, s.subject, s.evaluation_point): s for s in report.scores if s.attack == "lora, 0.5 x rate"}
    looks = {("base", 0.5), ("base", 1.0), ("hardened", 0.5), ("hardened", 1.0), ("hardened", 3.0)}
    assert set(slow) == {(side, "mira", point) for side, point in looks}
    usual = {(s.side, s.subject, s.evaluation_point): s for s in report.scores if s.attack == "lora"}
    assert len(usual) == 9
    for key, score in slow.items():
        assert score.displacement.rate == 5e-4 and usual[key].displacement.rate == 1e-3
        assert score.displacement.steps == usual[key].displacement.steps == 2 * key[2]
        assert score.displacement.largest_possible == pytest.approx(5e-4 * score.displacement.steps)
        assert 0 < score.displacement.overall < usual[key].displacement.overall < 0.1
        assert {"down", "mid", "up", "text_encoder"} <= set(score.displacement.blocks)
    assert {c.attack for c in report.checks if c.attack} == {"lora", "lora, 3 x steps"}
    [search] = report.just_enough
    assert (search.attack, search.subjects, search.probes, search.result) == ("lora", ["mira"], [], None)
    assert search.genuine.displacement == pytest.approx(usual["base", "mira", 1.0].displacement.overall)
    [broken] = report.displacement_to_break
    assert broken.base is None and broken.tried.steps == 6
    assert len(list((copied / "verify" / "base" / "mira").glob("lora_0.5-x-rate/sks/0/*/scores.json"))) == 1
    page = (copied / "verify" / "report.html").read_text()
    assert "How far an attacker has to move the weights" in page and "lora, 0.5 x rate, 0.5 x steps" in page
    assert "| lora, 0.5 x rate | 0.0005 | 2 |" in (copied / "verify" / "report.md").read_text()
    assert Report.load(copied) == report

    files = {f: f.stat().st_mtime_ns for f in (copied / "verify").glob("*/*/lora*/**/*.json")}
    claimed = load_recipe(str(recipe_file), [*FURTHER, "gate.claimed_displacement=0.5"])
    report = verify(registry, claimed, copied, workers=1, quiet=True)
    assert {f: f.stat().st_mtime_ns for f in files} == files, "a claim is about what was measured"
    [check] = [c for c in report.checks if c.name == "claimed displacement"]
    assert (check.subject, check.status, check.value, check.limit) == ("mira", "inconclusive", 0.0, 50.0)


def test_results_of_versions_that_did_not_measure_displacement_are_kept(copied, registry, recipe_file):
    for file in (copied / "verify" / "base").glob("*/lora/*/*/*/attack.json"):
        record = json.loads(file.read_text())
        del record["movement"]
        file.write_text(json.dumps(record))
    report = verify(registry, load_recipe(str(recipe_file)), copied, workers=1, quiet=True)
    moved = {(s.side, s.subject): s.displacement for s in report.scores}
    assert (moved["base", "mira"].overall, moved["base", "mira"].steps) == (None, 2)
    assert moved["hardened", "mira"].overall > 0
    page = (copied / "verify" / "report.html").read_text()
    assert "How far an attacker has to move" in page, "of what there is"


def test_a_sample_of_the_protected_is_attacked_and_the_report_says_so(verified, tmp_path):
    from guardsmith.evaluation.planning import attacked_subjects

    registry = load_registry(ROOT / "registries" / "avatars.yaml")
    spec = load_recipe("demo", ["verify.sample=2"]).verify
    drawn = [[s.id for s in attacked_subjects(registry, spec, seed)] for seed in range(20)]
    assert all(len(ids) == 2 for ids in drawn)
    assert drawn == [[s.id for s in attacked_subjects(registry, spec, seed)] for seed in range(20)]
    assert {name for ids in drawn for name in ids} == {s.id for s in registry.subjects}
    everyone = spec.model_copy(update={"sample": None})
    assert attacked_subjects(registry, everyone, 0) == list(registry.subjects)
    assert verified[1].attacked.model_dump() == {"protected": 1, "of": 1, "controls": 1}


def test_the_report_says_how_long_the_verification_took(verified, monkeypatch):
    from guardsmith.evaluation import pipeline

    assert verified[1].run.seconds > 0
    times, plan = iter([100.0, 142.04]), SimpleNamespace(root=Path("nowhere"))
    for step in ("preflight", "measure", "write", "missing_controls"):
        monkeypatch.setattr(pipeline, step, lambda *_, step=step, **__: plan if step == "preflight" else None)
    monkeypatch.setattr(pipeline, "with_just_enough", lambda plan, **_: (plan, []))
    monkeypatch.setattr(pipeline, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    seconds = []
    report = verified[1].model_copy()
    monkeypatch.setattr(pipeline, "judged_report", lambda *_, **told: seconds.append(told["seconds"]) or report)
    pipeline.verify(None, None, plan.root, quiet=True)
    assert seconds == [pytest.approx(42.04)]


def test_each_subject_meets_each_attack_with_one_identifier_in_turn(tmp_path):
    from guardsmith.evaluation.planning import TargetModel, plan_units

    registry = load_registry(ROOT / "registries" / "avatars.yaml")
    recipe = load_recipe("avatar-attacks", ["verify.full_factorial=false", "verify.identifiers=[zwx, bdr, qpl]"])
    target = TargetModel(load_model("builtin:avatar"), "sha256:0", tmp_path)
    units = list(plan_units(registry, recipe, {"base": target, "hardened": target}))
    assert len(units) == 2 * 12 * 3
    for side in ("base", "hardened"):
        for label in recipe.verify.attacks:
            names = [u.identifier for u in units if (u.side, u.label) == (side, label)]
            assert sorted(names) == ["bdr"] * 4 + ["qpl"] * 4 + ["zwx"] * 4
        for subject in registry.subjects:  # and each subject with each identifier
            assert len({u.identifier for u in units if (u.side, u.subject) == (side, subject.id)}) == 3


def test_an_attack_that_crashes_makes_the_verdict_inconclusive(copied, registry, recipe_file):
    # A rank that no device could hold: the attack itself fails, on both models.
    crash = ["verify.attacks.lora.params.rank=1000000000"]
    report = verify(registry, load_recipe(str(recipe_file), crash), copied, workers=1, quiet=True)
    assert report.exit_code == 3
    assert len(report.failed_units) == 4
    assert all(c.value is None for c in report.checks if c.attack == "lora")
    assert "no pictures: the attack did not run" in (copied / "verify" / "report.html").read_text()


ASKING = {"name": "adversarial_prompt", "params": {"steps": 2, "words": 2}}


def test_an_attack_that_only_asks_has_to_fail_and_need_not_work_anywhere(copied, registry, recipe_file, tmp_path):
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe["verify"]["attacks"]["words"] = ASKING
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(recipe))
    report = verify(registry, load_recipe(str(tmp_path / "both.yaml")), copied, workers=1, quiet=True)
    found = {(c.name, c.subject) for c in report.checks if c.attack == "words"}
    assert found == {("protected", "mira")}
    assert {(s.side, s.subject) for s in report.scores if s.attack == "words"} == {
        (side, subject) for side in ("base", "hardened") for subject in ("mira", "nora")
    }


def test_asking_alone_is_no_verification(copied, recipe_file, tmp_path, capsys):
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe["verify"]["attacks"] = {"words": ASKING}
    (tmp_path / "asking.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["verify", str(copied), "--recipe", str(tmp_path / "asking.yaml")]) == 2
    assert "No attack of the recipe trains the model" in capsys.readouterr().err


FULL = """
import errno
from guardsmith.attacks import Attack
from guardsmith.attacks.lora import LoraConfig

def run(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

ATTACK = Attack(run, LoraConfig, "nowhere")
"""


def test_a_full_disk_ends_the_run_and_leaves_no_report(copied, recipe_file, tmp_path, monkeypatch, capsys):
    """Unlike an attack that crashes: every other would find no space either."""
    (tmp_path / "full_disk.py").write_text(FULL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe["verify"]["attacks"] = {"full": {"name": "full_disk:ATTACK"}}
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(recipe))
    (copied / "verify" / "report.json").unlink()
    assert cli.main(["verify", str(copied), "--recipe", str(tmp_path / "full.yaml"), "--workers", "1"]) == 4
    assert "no space left on the disk" in capsys.readouterr().err
    assert not (copied / "verify" / "report.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="no POSIX signals")
def test_a_verification_killed_on_the_way_goes_on_with_what_is_missing(verified, recipe_file, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(verified[0], output, ignore=shutil.ignore_patterns("lora", "report*", "grid.png"))
    command = ["verify", str(output), "--recipe", str(recipe_file), "--workers", "1"]
    child = forked.start(inprocess.command, command, streams=tmp_path / "streams")
    try:
        deadline = time.monotonic() + 300
        while not (done := list((output / "verify").glob("*/*/lora/*/*/[!.]*/scores.json"))):
            assert child.is_alive(), (tmp_path / "streams/err").read_text()
            assert time.monotonic() < deadline, "no unit within five minutes"
            time.sleep(0.005)
    finally:
        child.kill()
        child.join()
    assert len(done) < 4
    assert not (output / "verify" / "report.json").exists()
    before = {file: file.stat().st_mtime_ns for file in done}
    assert cli.main(["verify", str(output), "--recipe", str(recipe_file), "--workers", "1"]) == 3
    assert {file: file.stat().st_mtime_ns for file in done} == before
    again = json.loads((output / "verify" / "report.json").read_text())
    assert again["checks"] == verified[1].as_json()["checks"]


def test_changed_weights_are_refused(copied, capsys):
    file = copied / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + torch.ones_like(tensors["conv_in.bias"])
    save_file(tensors, file, metadata={"format": "pt"})
    code = cli.main(["verify", str(copied), "--subjects", str(ROOT / "registries" / "demo.yaml")])
    assert code == 2
    said = capsys.readouterr().err
    assert "changed after hardening" in said
    assert "Traceback" not in said


def test_another_registry_is_refused(copied, capsys):
    assert cli.main(["verify", str(copied), "--subjects", str(ROOT / "registries" / "avatars.yaml")]) == 2
    assert "is not the registry" in capsys.readouterr().err


def test_a_model_made_elsewhere_is_verified_against_its_base(verified, recipe_file, tmp_path, capsys):
    given = ["--recipe", str(recipe_file), "--workers", "1", "--base-runs", str(verified[0] / "verify" / "base")]
    released = verified[0] / "model"  # as anyone would find it, without the record of how it came about
    code = cli.main(["verify", str(tmp_path / "judged"), "--model", str(released), "--base", "builtin:avatar", *given])
    assert code == 3
    assert "verdict: inconclusive" in capsys.readouterr().out
    told = json.loads((tmp_path / "judged" / "verify" / "report.json").read_text())
    assert told["checks"] == verified[1].as_json()["checks"]
    assert told["hardening"]["model_digest"] == verified[1].hardening.model_digest
    assert told["hardening"]["method"] is None
    assert "not made by guardsmith" in (tmp_path / "judged" / "verify" / "report.html").read_text()
    assert cli.main(["compare", str(tmp_path / "judged"), str(verified[0])]) == 0
    assert "not guardsmith's" in capsys.readouterr().out


def test_a_model_of_another_kind_than_its_base_is_refused(v_folder, recipe_file, tmp_path, capsys):
    given = ["--recipe", str(recipe_file), "--base", "builtin:avatar"]
    assert cli.main(["verify", str(tmp_path / "judged"), "--model", str(v_folder), *given]) == 2
    said = capsys.readouterr().err
    assert "4 latent channels" in said and "16 latent channels" in said and "do not belong together" in said
    assert not (tmp_path / "judged").exists()


def test_a_report_on_another_model_does_not_go_into_a_hardening(copied, recipe_file, capsys):
    before = (copied / "verify" / "report.json").read_bytes()
    assert cli.main(["verify", str(copied), "--recipe", str(recipe_file), "--model", "builtin:avatar"]) == 2
    assert "another folder" in capsys.readouterr().err
    assert (copied / "verify" / "report.json").read_bytes() == before


def test_a_base_without_a_model_is_refused(copied, recipe_file, capsys):
    assert cli.main(["verify", str(copied), "--recipe", str(recipe_file), "--base", "builtin:avatar"]) == 2
    assert "belong to --model" in capsys.readouterr().err


def test_the_command_prints_a_table_and_its_exit_code(verified, recipe_file, capsys):
    code = cli.main(["verify", str(verified[0]), "--recipe", str(recipe_file), "--workers", "1"])
    out = capsys.readouterr().out
    assert code == 3
    assert "verdict: inconclusive" in out
    assert "mira" in out and "nora" in out


def test_an_unknown_class_noun_is_refused_with_a_near_one(tmp_path, capsys):
    text = (ROOT / "registries" / "demo.yaml").read_text().replace("class_noun: person", "class_noun: persn")
    shutil.copytree(ROOT / "registries" / "avatars", tmp_path / "avatars")
    (tmp_path / "r.yaml").write_text(text)
    assert cli.main(["harden", "--subjects", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "did you mean 'person'" in said
    assert not (tmp_path / "out").exists()


def test_verification_judges_by_the_policy_and_names_it(copied, verified, registry, recipe_file, tmp_path, capsys):
    """The same scores, other levels and another bar for the number of pictures."""
    assert verified[1].policy.name == "guardsmith, embedded judges"
    low = {noun: {"chance": -0.9, "chance_high": -0.8, "genuine": 0.5} for noun in ("person", "robot", "character")}
    file = tmp_path / "policy.yaml"
    told = yaml.safe_load(as_yaml(default_policy())) | {"name": "house rules", "classes": low}
    file.write_text(yaml.safe_dump(told))
    code = cli.main(
        ["verify", str(copied), "--recipe", str(recipe_file), "--subjects", str(ROOT / "registries/demo.yaml"),
         "--policy", str(file), "--json"]
    )  # fmt: skip
    assert code == 1, capsys.readouterr().err
    report = Report.load(copied)
    assert report.policy == PolicyRecord.of(load_policy(file))
    [check] = [c for c in report.checks if c.name == "protected"]
    assert (check.status, check.limit) == ("fail", -0.8)
    assert report.calibration["person"].genuine == 0.5
    assert "house rules" in (copied / "verify/report.html").read_text()
    before = [c for c in verified[1].checks if c.name == "protected"]
    assert (before[0].value, before[0].status) == (check.value, "inconclusive")
    assert before[0].sentence.startswith("no evidence"), "nor did two steps teach the attacker anything on the base"
    many = default_policy(GateSpec(minimum_images=9))
    report = verify(registry, load_recipe(str(recipe_file)), copied, workers=1, policy=many, quiet=True)
    [check] = [c for c in report.checks if c.name == "protected"]
    assert check.status == "inconclusive"
    assert report.recipe.gate.minimum_images == 9


def test_a_class_without_levels_is_refused_before_anything_is_drawn(copied, registry, recipe_file):
    levels = {"robot": calibration()["robot"]}
    policy = Policy(name="robots only", dated="2026-01-01", classes=levels)
    with pytest.raises(UserError, match="'robots only' has no levels for person"):
        verify(registry, load_recipe(str(recipe_file)), copied, policy=policy, quiet=True)
