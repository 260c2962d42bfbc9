"""Verification end to end on the embedded base, with attacks too short to learn anything: what is tested is the judging."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from guardsmith import cli
from guardsmith.harden import harden
from guardsmith.models import weights_digest
from guardsmith.recipe import load_recipe
from guardsmith.registry import load_registry
from guardsmith.verify import verify

ROOT = Path(__file__).parent.parent
TINY = {
    "sampling": {"steps": 4, "guidance": 3.0, "batch": 32},
    "method": {"name": "apdm", "params": {"outer_steps": 2, "inner_steps": 2, "class_images": 4, "learning_rate": 1e-4}},
    "verify": {
        "attacks": {"lora": {"name": "lora", "params": {"steps": 2, "batch_size": 2, "learning_rate": 1e-3}}},
        "identifiers": ["sks"],
        "images_per_unit": 8,
        "class_images": 4,
        "ordinary_images": 24,
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
    assert report["verdict"] == "inconclusive"
    assert report["exit_code"] == 3
    learnt = [c for c in report["checks"] if c["name"] == "attack works on base"]
    assert {c["subject"] for c in learnt} == {"mira", "nora"}
    assert {c["status"] for c in learnt} == {"inconclusive"}


def test_every_unit_leaves_pictures_scores_and_settings(verified):
    output, report = verified
    units = sorted((output / "verify").glob("*/*/lora/sks/0"))
    assert [u.relative_to(output / "verify").parts[:2] for u in units] == [
        ("base", "mira"), ("base", "nora"), ("hardened", "mira"), ("hardened", "nora"),
    ]  # fmt: skip
    for unit in units:
        assert len(list((unit / "images").glob("*.png"))) == 8
        assert len(json.loads((unit / "scores.json").read_text())["identity"]) == 8
        told = json.loads((unit / "attack.json").read_text())
        assert told["params"]["steps"] == 2
        assert str(ROOT) not in json.dumps(told)  # nothing of this machine
    assert str(ROOT) not in json.dumps(report)
    assert (output / "verify" / "grid.png").stat().st_size > 10_000


def test_the_report_names_the_weights_it_judged(verified):
    output, report = verified
    assert report["hardening"]["model_digest"] == weights_digest(output / "model")


def test_utility_is_measured_against_the_base_with_other_seeds(verified):
    utility = verified[1]["utility"]
    assert 0 < utility["kid_base"] < 1
    assert utility["kid_ratio"] == pytest.approx(utility["kid_hardened"] / utility["kid_base"])
    assert utility["kid_ratio_low"] <= utility["kid_ratio"] <= utility["kid_ratio_high"]
    assert 0 <= utility["fidelity_hardened"] <= 1


def test_a_second_run_repeats_nothing_and_says_the_same(verified, registry, recipe_file):
    output, report = verified
    files = {f: f.stat().st_mtime_ns for f in (output / "verify").glob("*/*/lora/**/*.json")}
    again = verify(registry, load_recipe(str(recipe_file)), output, workers=1, quiet=True)
    assert {f: f.stat().st_mtime_ns for f in files} == files
    assert again["checks"] == report["checks"]


def test_a_missing_unit_is_run_again_with_the_same_result(copied, registry, recipe_file):
    unit = copied / "verify" / "hardened" / "mira" / "lora" / "sks" / "0"
    before = json.loads((unit / "scores.json").read_text())["identity"]
    (unit / "scores.json").unlink()  # what a kill leaves behind
    verify(registry, load_recipe(str(recipe_file)), copied, workers=1, quiet=True)
    assert json.loads((unit / "scores.json").read_text())["identity"] == pytest.approx(before, abs=1e-5)


def test_another_setting_is_another_unit(copied, registry, recipe_file):
    unit = copied / "verify" / "base" / "mira" / "lora" / "sks" / "0"
    before = json.loads((unit / "scores.json").read_text())["digest"]
    verify(
        registry, load_recipe(str(recipe_file), ["verify.attacks.lora.params.steps=1"]), copied, workers=1, quiet=True
    )
    assert json.loads((unit / "scores.json").read_text())["digest"] != before


def test_an_attack_that_crashes_makes_the_verdict_inconclusive(copied, registry, recipe_file):
    # A rank that no device could hold: the attack itself fails, on both models.
    crash = ["verify.attacks.lora.params.rank=1000000000"]
    report = verify(registry, load_recipe(str(recipe_file), crash), copied, workers=1, quiet=True)
    assert report["exit_code"] == 3
    assert len(report["failed_units"]) == 4
    assert all(c["value"] is None for c in report["checks"] if c["attack"] == "lora")


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
