"""The Python interface: what the documentation promises, run on the embedded base with attacks too short to learn anything."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from test_verify import TINY
from tiny import make_parts

import guardsmith as gs
from guardsmith.models.checkpoint import weights_digest

ROOT = Path(__file__).parent.parent
REGISTRY = ROOT / "registries" / "demo.yaml"


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return file


@pytest.fixture(scope="module")
def run(recipe_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("api") / "out"
    registry = gs.load_registry(REGISTRY)
    hardened = gs.harden("builtin:avatar", registry, recipe=recipe_file, output=output, seed=3, device="cpu")
    return registry, hardened, gs.verify(hardened, registry, workers=1)


def pipeline(seed=0):
    parts = make_parts("epsilon", seed)
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )  # fmt: skip


def test_hardening_and_verifying_as_the_readme_says(run):
    _, hardened, report = run
    assert report.verdict == "inconclusive"  # two steps teach an attacker nothing
    assert {check.name for check in report.checks} >= {"protected", "control learnable", "attack works on base"}
    assert hardened.record["seed"] == 3
    assert (hardened.output / "verify" / "report.html").is_file()


def test_verification_takes_the_recipe_that_was_hardened_with(run, recipe_file):
    """Not the demo's: its attackers would take 300 steps."""
    _, hardened, report = run
    assert report.recipe.verify.attacks["lora"].params["steps"] == 2
    assert hardened.record["recipe"]["verify"]["attacks"].keys() == {"lora"}
    public = json.loads((hardened.output / "verify/public/harden.json").read_text())
    assert public["recipe"]["verify"] == hardened.record["recipe"]["verify"]


def test_the_command_line_takes_it_too(run, recipe_file, capsys):
    from guardsmith.cli.app import main

    _, hardened, _ = run
    code = main(["verify", str(hardened.output), "--subjects", str(REGISTRY), "--workers", "1", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 3
    assert report["recipe"]["verify"]["attacks"]["lora"]["params"]["steps"] == 2


def test_the_figure_is_the_grid_of_the_verification(run):
    _, hardened, report = run
    figure = report.figure()
    assert isinstance(figure, Image.Image) and figure.mode == "RGB"
    with Image.open(hardened.output / "verify" / "grid.png") as grid:
        assert figure.size == grid.size
    assert gs.Report.load(hardened.output).figure().size == figure.size
    with pytest.raises(gs.UserError, match="no pictures beside"):
        gs.Report.load(ROOT / "docs/results/demo-report.json").figure()


def test_the_pipeline_holds_the_hardened_weights_in_the_precision_that_is_asked_for(run):
    _, hardened, _ = run
    pipe = hardened.to_pipeline(torch_dtype=torch.float16)
    assert isinstance(pipe, StableDiffusionPipeline)
    assert next(pipe.unet.parameters()).dtype == torch.float16
    again = gs.load_hardened(hardened.output).to_pipeline()
    assert next(again.unet.parameters()).dtype == torch.float32
    assert torch.equal(again.unet.state_dict()["conv_in.weight"].half(), pipe.unet.state_dict()["conv_in.weight"])


def test_a_pipeline_is_a_base_too_and_is_kept_beside_the_output(tmp_path):
    registry, output = gs.load_registry(REGISTRY), tmp_path / "out"
    params = {"steps": 1, "class_images": 2, "batch_size": 1, "benign_images": 2}
    short = gs.load_recipe("persguard-avatar", {"sampling.steps": 2, "probe.times": 0, "method.params": params})
    hardened = gs.harden(pipeline(), registry, recipe=short, output=output)
    assert hardened.record["base_digest"] == weights_digest(tmp_path / "out-base")
    again = gs.harden(pipeline(), registry, recipe=short, output=output, resume=True)
    assert again.record["model_digest"] == hardened.record["model_digest"]
    with pytest.raises(gs.UserError, match="holds another model"):
        gs.harden(pipeline(seed=1), registry, recipe=short, output=output, resume=True)
    assert not list(tmp_path.glob("*-new")) and not list(tmp_path.glob(".*"))


def test_errors_are_those_of_the_command_line(run, tmp_path):
    registry, hardened, _ = run
    with pytest.raises(gs.UserError, match="does not exist"):
        gs.load_registry(tmp_path / "none.yaml")
    with pytest.raises(gs.UserError, match="there is no recipe"):
        gs.load_recipe("nothing-of-this-name")
    with pytest.raises(gs.UserError, match="holds no finished hardening"):
        gs.load_hardened(tmp_path)
    with pytest.raises(gs.UserError, match="is no model"):
        gs.harden(3, registry, output=tmp_path / "out")
    with pytest.raises(gs.UserError, match="no budget 'huge'"):
        gs.verify(hardened, registry, budget="huge")
    with pytest.raises(gs.UserError, match="needs base="):
        gs.verify("builtin:avatar", registry)
    with pytest.raises(gs.UserError, match="no such device"):
        gs.harden("builtin:avatar", registry, output=tmp_path / "out", device="cuda:7")
    assert "GUARDSMITH_DEVICE" not in os.environ


def test_determinism_holds_for_the_call_only(run, monkeypatch):
    import guardsmith.api as api

    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with api._runtime_settings(None, True):
        assert os.environ["GUARDSMITH_DETERMINISTIC"] == "1"
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
    assert "GUARDSMITH_DETERMINISTIC" not in os.environ


@pytest.mark.parametrize("name", [name for name in gs.__all__ if name != "__version__"])
def test_every_public_name_is_documented(name):
    item = getattr(gs, name)
    text = inspect.getdoc(item)
    assert text and len(text) > 20
    if inspect.isfunction(item):
        arguments = list(inspect.signature(item).parameters)
        assert "Raises:" in text
        for argument in arguments:
            assert f"{argument}:" in text, f"{name} does not say what {argument} is"


def test_importing_guardsmith_imports_neither_torch_nor_pydantic():
    code = "import sys, guardsmith; print([name for name in ('torch', 'pydantic', 'diffusers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_those_that_can_be_had():
    assert set(gs.__all__) - {"__version__"} == set(gs._PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gs.nothing
