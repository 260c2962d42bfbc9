"""What every hardening method has to declare, and methods and judges of one's own."""

import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_apdm import make_benign, make_subject
from test_parallel import EVERY as SHORT
from tiny import assert_one_sentence, largest_difference, pictures

from guardsmith.cli.app import main
from guardsmith.config.judge import JudgeSpec
from guardsmith.config.loading import load_recipe
from guardsmith.core.errors import UserError
from guardsmith.methods import METHODS, HardeningContext, HardeningMethod, MethodConfig, Preparation, find_method
from guardsmith.metrics import JUDGES, JudgeEntry, find_judge, load_judge
from guardsmith.training.compute import ComputeConfig

ROOT = Path(__file__).parent.parent

TOY = '''
"""A method of one's own: every weight of the last layer grows a little at every step, on pictures of its own prompt."""

from dataclasses import replace

import torch
from pydantic import Field

from guardsmith.diffusion.latents import encode
from guardsmith.methods import (
    HardeningContext, HardeningMethod, HardeningResult, MemoryFootprint, MethodConfig, Prepared,
)
from guardsmith.models.checkpoint import with_own_unet


class ToyConfig(MethodConfig):
    """Parameters."""

    steps: int = Field(3, gt=0)
    """Steps."""
    growth: float = 0.01
    """A step's."""


class Toy(HardeningMethod[ToyConfig]):
    name = "toy"
    title = "Toy"
    paper = "nowhere"
    config = ToyConfig

    def steps(self, config):
        return config.steps

    def cost(self, config, class_nouns):
        return 7 * config.steps * len(class_nouns)

    def memory(self, config, unet):
        return MemoryFootprint(0, 0, 0)

    def prepare(self, preparation):
        drawn = preparation.draw("a photo of a toy")
        subjects = [replace(subject, instead_images=drawn) for subject in preparation.subjects]
        return Prepared(subjects, preparation.benign, forward_rows=5)

    def run(self, context):
        own = with_own_unet(context.model)
        assert all(len(subject.instead_images) == context.config.class_images for subject in context.subjects)
        optimizer = context.adamw(list(own.unet.parameters()), lr=1e-3)
        loop = context.training_loop(
            "Toy", context.config.steps, modules={"unet": own.unet}, optimizers={"optimizer": optimizer},
            released=lambda: own,
        )
        for step in loop:
            with torch.no_grad():
                own.unet.conv_out.bias.add_(context.config.growth)
            loop.finish_step(step, {"bias": float(own.unet.conv_out.bias.mean())})
        return HardeningResult(own, loop.history)


TOY = Toy()
CLASS = Toy
'''

JUDGE = """
from guardsmith.metrics import JUDGES, JudgeEntry
MINE = JudgeEntry(JUDGES["avatar"].load, "nowhere")
NOT = JUDGES["avatar"].load
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The module `my_methods` on Python's path."""
    (tmp_path / "my_methods.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_methods:TOY"
    sys.modules.pop("my_methods", None)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_declares_what_is_needed(tiny_v, name):
    method, nouns = METHODS[name], ["person", "robot"]
    config = method.config()
    assert method.name == name and isinstance(method, HardeningMethod)
    assert method.title and method.paper and inspect.getdoc(type(method))
    assert isinstance(config, MethodConfig) and config.class_images > 0
    assert method.steps(config) > 0 and method.checkpoint_every > 0
    assert method.cost(config, nouns) >= method.cost(config, nouns[:1]) > 0
    numbers, moments, rows, _ = method.memory(config, tiny_v.unet)
    assert numbers > 0 and moments >= 0 and rows > 0
    capacity = method.capacity(tiny_v.unet)
    assert capacity is None or capacity > 0
    distilled = config.model_copy(update={"distillation_weight": 1.0})
    assert method.needs_benign(distilled), "there would be nothing to distill on"
    for field, info in type(config).model_fields.items():
        assert info.description, f"{name}: {field} has no docstring"


def test_every_method_has_short_settings():
    missing = METHODS.keys() - SHORT.keys()
    assert not missing, f"add settings of a few steps for {missing} to METHODS in tests/test_parallel.py"


@pytest.mark.parametrize("name", METHODS)
def test_what_a_run_needs_is_what_prepare_gives(request, tmp_path, name):
    """No method needs anything at the start of its training that it did not ask for before."""
    method, base = METHODS[name], request.getfixturevalue("wide_v" if name == "tripwire" else "tiny_v")
    config = method.config(**SHORT[name])
    benign = make_benign() if method.needs_benign(config) else None
    preparation = Preparation(
        model=base, subjects=[make_subject()], benign=benign, config=config, seed=0, sampling_steps=2, guidance=2.0,
        cache=tmp_path, draw=lambda prompt: pictures(config.class_images, 70),
    )  # fmt: skip
    prepared = method.prepare(preparation)
    context = HardeningContext(
        model=base, subjects=prepared.subjects, benign=prepared.benign, config=config, seed=0, cache=tmp_path
    )
    hardened, history = method.run(context)
    assert len(history) == method.steps(config)
    assert hardened.unet is not base.unet


def test_what_is_forgotten_fails_when_the_module_is_imported():
    complete = {"name": "x", "title": "X", "paper": "none", "config": MethodConfig}
    for missing in complete:
        with pytest.raises(TypeError, match=missing):
            type("Forgetful", (HardeningMethod,), {k: v for k, v in complete.items() if k != missing})
    with pytest.raises(TypeError, match="config"):
        type("Forgetful", (HardeningMethod,), complete | {"config": dict})
    kind = type("Forgetful", (HardeningMethod,), complete)
    with pytest.raises(TypeError, match="run"):
        kind()


def test_a_method_of_ones_own_hardens_from_the_command_line(toy, v_folder, tmp_path, capsys):
    """Named in a recipe, or by --method over a recipe of another method, whose parameters are not its own."""
    asked = {
        "base": str(v_folder), "subjects": str(ROOT / "registries/demo.yaml"),
        "sampling": {"steps": 2, "guidance": 3.0, "batch": 32}, "probe": {"times": 1, "pictures": 0},
    }  # fmt: skip
    params = {"class_images": 3, "growth": 0.5}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(asked | {"method": {"name": toy, "params": params}}))
    other = {"name": "apdm", "params": {"outer_steps": 2}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(asked | {"method": other}))
    own = ["harden", "--recipe", str(tmp_path / "own.yaml"), "--output", str(tmp_path / "own")]
    flags = ["--method", toy, "--set", "method.params.class_images=3", "--set", "method.params.growth=0.5"]
    over = ["harden", "--recipe", str(tmp_path / "other.yaml"), "--output", str(tmp_path / "over"), *flags]
    assert main([*own, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["unet_forward_equivalents"] == 21 and plan["params"]["growth"] == 0.5
    assert main(own) == 0 and main(over) == 0
    base = load_file(v_folder / "unet/diffusion_pytorch_model.safetensors")
    made = [load_file(tmp_path / name / "model/unet/diffusion_pytorch_model.safetensors") for name in ("own", "over")]
    assert largest_difference(*made) == 0
    assert torch.allclose(made[0]["conv_out.bias"], base["conv_out.bias"] + 1.5)
    record = json.loads((tmp_path / "own/harden.json").read_text())
    assert (record["method"], record["paper"], len(record["history"])) == (toy, "nowhere", 3)
    assert record["unet_forward_rows"] == 5, "what prepare reports is counted"
    assert (tmp_path / "own/cache").is_dir() and not list((tmp_path / "own/cache").glob("ordinary*"))
    # Subjects are added to it as to any other.
    again = [*own[:-1], str(tmp_path / "more"), "--add-to", str(tmp_path / "own")]
    assert main(again) == 4, "twice as far, its loss on class pictures is ten times the base's"
    more = load_file(tmp_path / "more/model/unet/diffusion_pytorch_model.safetensors")
    assert torch.allclose(more["conv_out.bias"], base["conv_out.bias"] + 3.0)


def test_the_example_of_the_documentation_hardens(tiny_v, tmp_path, monkeypatch):
    """Up to its three dots, which stand for the step itself."""
    page = (ROOT / "docs/how-to/extend.md").read_text()
    (tmp_path / "documented_methods.py").write_text(page.split("```python\n# my_methods.py\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    method = find_method("documented_methods:MINE")
    config = method.config(steps=2)
    _, history = method.run(
        HardeningContext(model=tiny_v, subjects=[make_subject()], benign=None, config=config, seed=0)
    )
    assert history == [{"loss": 0.0}] * 2 and min(method.memory(config, tiny_v.unet)[:3]) > 0
    sys.modules.pop("documented_methods", None)


def test_a_method_that_cannot_be_had_is_one_sentence(toy, tmp_path, monkeypatch):
    (tmp_path / "broken_methods.py").write_text("TOY = = 3\n")
    wrong = {
        "my_methods:CLASS": "is not a method", "my_methods:NONE": "cannot be imported", "no_such_module:A": "PYTHONPATH",
        "broken_methods:TOY": "SyntaxError", ":TOY": "cannot be imported", "tripwir": "did you mean 'tripwire'",
        "x": "module:NAME",
    }  # fmt: skip
    for name, words in wrong.items():
        with pytest.raises(UserError, match=words) as caught:
            load_recipe("demo", [f"method.name={json.dumps(name)}"])
        assert_one_sentence(caught.value)
    assert find_method(toy).config(growth=1).growth == 1
    with pytest.raises(UserError, match=r"grwoth.*did you mean 'growth'"):
        load_recipe("demo", [f"method.name={json.dumps(toy)}", "method.params.grwoth=1"])


def test_a_judge_of_ones_own_is_named_by_its_module(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(find_judge("my_judges:MINE"), JudgeEntry)
    assert JudgeSpec(name="my_judges:MINE").name == "my_judges:MINE"
    assert load_judge("my_judges:MINE") == load_judge("avatar")
    for name, words in {
        "my_judges:NOT": "is not a judge",
        "dno": "did you mean 'dino'",
        "none:X": "PYTHONPATH",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            find_judge(name)
        assert_one_sentence(caught.value)
        with pytest.raises(ValueError, match=words):
            JudgeSpec(name=name)
    assert all(isinstance(entry, JudgeEntry) and entry.paper for entry in JUDGES.values())
    sys.modules.pop("my_judges", None)


def test_compute_settings_are_handed_down_and_not_put_onto_networks(tiny_v):
    """The optimizer is the context's business; precision is the denoiser's own state, set by a method of its class."""
    context = HardeningContext(
        model=tiny_v, subjects=[make_subject()], benign=None, config=MethodConfig(), seed=0,
        compute=ComputeConfig(optimizer="offloaded"),
    )  # fmt: skip
    kind = type(context.adamw([torch.nn.Parameter(torch.zeros(2))], lr=1.0)).__name__
    assert kind == "Offloaded"
    assert "optimizer" not in vars(tiny_v.unet) and not hasattr(type(tiny_v.unet), "optimizer")
