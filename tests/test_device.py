"""Networks on an accelerator, everything around them on the CPU.

No accelerator is here, so torch's meta device plays one: it has shapes and no numbers, and may not be mixed with tensors of the
CPU, which is what goes wrong first on a real one. Numbers that come back from it are a tenth.
"""

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from itertools import chain

import pytest
import torch
from test_apdm import make_benign, make_subject
from test_attacks import make_data
from test_cloaks import SMALL as CLOAKS_SMALL
from test_cloaks import defender  # noqa: F401 (a fixture)
from test_parallel import recipe_for
from tiny import assert_one_sentence, harden_with, pictures
from torch.utils._python_dispatch import TorchDispatchMode

import guardsmith as gs
from guardsmith.attacks import ATTACKS, draw_after_attack
from guardsmith.cli import app as cli
from guardsmith.cloaks import CLOAKS
from guardsmith.cloaks.rid import RidTraining, train
from guardsmith.core.errors import UserError
from guardsmith.diffusion.sampling import generate, redraw
from guardsmith.methods import METHODS
from guardsmith.models.checkpoint import load_model, weights_digest
from guardsmith.purifiers import PURIFIERS
from guardsmith.runtime import device
from guardsmith.runtime.device import chosen_device, moved, put
from guardsmith.runtime.processes import processes

META = torch.device("meta")
TWO = {"steps": 2, "batch_size": 2}
HARDENINGS = [
    ("apdm", {"outer_steps": 1, "inner_steps": 2, "batch_size": 2, "distillation_weight": 1.0, "train_text_encoder": True}),
    ("apdm", {"outer_steps": 1, "inner_steps": 2, "distillation_weight": 1.0, "offload_reference": True}),
    ("imma", TWO | {"distillation_weight": 1.0}),
    ("imma", TWO | {"adapter": "textual_inversion"}),
    ("imma", TWO | {"adapter": "dreambooth"}),
    ("persguard", TWO),
    ("persguard", TWO | {"backdoor": "pattern"}),
]  # fmt: skip
PARAMS = {
    "unlearn_first": {"unlearn_steps": 2},
    "dreambooth": {"train_text_encoder": True},
    "purified_cdl": {"purifier": "impress", "purifier_params": {"steps": 1}},
}


ATEN = torch.ops.aten


def devices(args, kwargs):
    """Where the floating-point tensors among arguments are that have a dimension: True for the meta device."""
    found = set()
    for each in (*args, *kwargs.values()):
        if isinstance(each, torch.Tensor):
            if each.dim() and each.dtype.is_floating_point:
                found.add(each.is_meta)
        elif isinstance(each, list | tuple):
            found |= devices(each, {})
    return found


def shape_of(value):
    """What of an argument decides the shapes of a result."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(map(shape_of, value))
    return float if isinstance(value, float) else (type(value), value)


def empty(shape):
    """A tensor of such a shape, see `shape_of`."""
    return (
        None
        if shape == (type(None), None)
        else torch.empty_strided(shape[0], shape[1], dtype=shape[2], device=shape[3])
    )


class Accelerator(TorchDispatchMode):
    """Lets numbers of the meta device be asked for, and counts how many a copy to the CPU has, in `copied`."""

    def __init__(self):
        super().__init__()
        self.copied, self.known = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is ATEN._local_scalar_dense.default and args[0].is_meta:
            return 0.1
        if func is ATEN._to_copy.default and args[0].is_meta and kwargs.get("device", META).type == "cpu":
            self.copied.append(args[0].numel())
            return torch.full(args[0].shape, 0.1, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is ATEN.copy_.default and args[1].is_meta and not args[0].is_meta:
            self.copied.append(args[0].numel())
            return args[0].fill_(0.1)
        # Convolutions of the meta device do not look; a real one would not take this. Numbers and places may be the CPU's.
        if func not in (ATEN.copy_.default, ATEN._foreach_copy_.default) and len(mixed := devices(args, kwargs)) > 1:
            raise RuntimeError(f"{func}: not all tensors are on one device ({mixed})")
        if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_meta:
            return func(*args, **kwargs)
        return self.shaped(func, args, kwargs)

    def shaped(self, func, args, kwargs):
        """What the meta device finds out in Python for every call, a millisecond, once for all calls with the same shapes."""
        schema = func._schema
        if schema.is_mutable:
            only_values = schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags
            return args[0] if only_values else func(*args, **kwargs)
        if any(value.alias_info for value in schema.returns):  # a view
            return func(*args, **kwargs)
        key = func, *map(shape_of, args), *((name, shape_of(value)) for name, value in kwargs.items())
        if key not in self.known:
            made = func(*args, **kwargs)
            self.known[key] = [shape_of(each) for each in made] if isinstance(made, tuple) else shape_of(made)
        made = self.known[key]
        return tuple(map(empty, made)) if isinstance(made, list) else empty(made)


@pytest.fixture
def model(v_folder, monkeypatch):
    """The tiny model on the accelerator."""
    real = torch.optim.AdamW  # the fused one does not know the meta device
    monkeypatch.setattr(
        torch.optim,
        "AdamW",
        lambda rows, lr=1e-3, **how: real(rows, lr, **{k: v for k, v in how.items() if k != "fused"}),
    )
    monkeypatch.setenv(device.VARIABLE, "meta")
    with Accelerator() as accelerator:
        loaded = load_model(str(v_folder))
        loaded.accelerator = accelerator
        yield loaded


def test_a_mixture_is_noticed(model):
    with pytest.raises(RuntimeError, match="not all tensors are on one device"):
        torch.nn.functional.conv2d(pictures(1), model.vae.encoder.conv_in.weight)


def test_networks_are_there_and_pictures_are_here(model):
    for network in (model.unet, model.vae, model.text_encoder):
        assert {parameter.device for parameter in network.parameters()} == {META}
    told = generate(model, ["a photo"] * 2, [0, 1], steps=2, guidance=2.0)
    again = redraw(model, told, ["a photo"] * 2, [0, 1], strength=0.5, steps=2)
    assert (told.device.type, again.device.type) == ("cpu", "cpu")


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(model, name):
    params = {"steps": 2} | PARAMS.get(name, {})
    sampling = {"steps": 2, "guidance": 2.0, "batch": 2}
    images, losses = draw_after_attack(model, name, params, make_data(), seed=0, count=2, sampling=sampling)
    assert images.device.type == "cpu" and len(losses) == 2


@pytest.mark.parametrize(("name", "params"), HARDENINGS)
def test_hardening(model, name, params):
    subject = replace(make_subject(), instead_images=pictures(3, 8))
    config = METHODS[name].config(**params)
    hardened, history = harden_with(name, model, [subject], make_benign(), config)
    assert {parameter.device for parameter in hardened.unet.parameters()} == {META}
    assert history


class Watch:
    """Called after every step: what was copied to the CPU in all steps but the first, which may still prepare something."""

    def __init__(self, accelerator):
        self.accelerator, self.copied = accelerator, []

    def __call__(self, step, *_):
        if step > 0:
            self.copied.append(list(self.accelerator.copied))
        self.accelerator.copied.clear()


TRAINED = [
    ("dreambooth", {}), ("dreambooth", {"train_text_encoder": True}), ("lora", {}), ("lora", {"train_text_encoder": True}),
    ("textual_inversion", {}), ("custom_diffusion", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params"), TRAINED)
def test_nothing_but_scalars_comes_back_in_a_step_of_an_attack(model, name, params):
    watch = Watch(model.accelerator)
    attack = ATTACKS[name]
    attack.run(model, make_data(), attack.config(steps=3, **params), seed=0, on_step=watch)
    assert len(watch.copied) == 2 and max([0, *chain(*watch.copied)]) <= 1


@pytest.mark.parametrize(("name", "params"), [entry for entry in HARDENINGS if entry[0] != "tripwire"])
def test_nothing_but_scalars_comes_back_in_a_step_of_a_hardening(model, name, params):
    if params.get("offload_reference"):
        pytest.skip("its reference lies in the machine's memory because the user wants that")
    watch = Watch(model.accelerator)
    subject = replace(make_subject(), instead_images=pictures(3, 8))
    steps = (
        {"outer_steps": 3} if name == "apdm" else {"steps": 12, "inner_steps": 2} if name == "imma" else {"steps": 3}
    )
    config = METHODS[name].config(**params | steps)
    harden_with(name, model, [subject], make_benign(), config, on_step=watch)
    assert len(watch.copied) >= 2 and max([0, *chain(*watch.copied)]) <= 1


def test_a_copy_in_a_step_is_noticed(model):
    watch = Watch(model.accelerator)
    watch(0)
    model.unet.conv_in.weight.detach().cpu()
    watch(1)
    assert watch.copied == [[model.unet.conv_in.weight.numel()]]


def test_hardening_with_a_recogniser(wide_folder, wide_trunk, model):
    wide = load_model(str(wide_folder))
    config = METHODS["tripwire"].config(
        trunk=str(wide_trunk), steps=2, positives=2, negatives=4, copies=1, early_steps=()
    )
    hardened, history = harden_with("tripwire", wide, [make_subject()], make_benign(), config, cache=wide_trunk.parent)
    assert {parameter.device for parameter in hardened.unet.parameters()} == {META}
    assert history


FEWER = {
    "aspl": {"rounds": 1, "steps": 1},
    "fsmg": {"steps": 1},
    "metacloak": {"rounds": 1, "steps": 1},
    "advdm": {"steps": 1},
}


@pytest.mark.parametrize("name", CLOAKS)
def test_cloaks(model, name):
    config = CLOAKS[name].config(**CLOAKS_SMALL[name] | FEWER.get(name, {}))
    assert CLOAKS[name].run([model], make_data(), config, seed=0).device.type == "cpu"


@pytest.mark.parametrize("name", ["diffpure", "impress", "gaussian", "jpeg", "tvm"])
def test_purifiers(model, name):
    config = PURIFIERS[name].config(**{"diffpure": {"timestep": 1}, "impress": {"steps": 1}}.get(name, {}))
    found = PURIFIERS[name].run(model, pictures(2), config, class_noun="person", seed=0)
    assert found.device.type == "cpu"


def test_training_a_defender(model):
    config = RidTraining(patch=16, width=16, depth=1, heads=2, steps=2, warm_up=1, batch_size=2)
    network, history = train([model], pictures(4), pictures(2), config, seed=0)
    assert len(history) == 2 and {parameter.device.type for parameter in network.parameters()} == {"cpu"}


def test_on_the_cpu_nothing_is_wrapped():
    layer = torch.nn.Linear(2, 2)
    put(layer, torch.device("cpu"))
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_everything_in_it_is_moved():
    told = moved({"a": [torch.ones(1), (torch.ones(2), "word")], "b": 3}, META)
    assert told["a"][0].is_meta and told["a"][1][0].is_meta and told["a"][1][1] == "word" and told["b"] == 3


def test_which_device(monkeypatch, capsys):
    monkeypatch.delenv(device.VARIABLE, raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert chosen_device() == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert chosen_device() == torch.device("cuda")
    with processes() as (pool, _):
        assert pool._max_workers == 1, "processes would share the accelerator"
    monkeypatch.setenv(device.VARIABLE, "cpu")
    assert chosen_device() == torch.device("cpu")
    for wrong in ("cuda", "toaster"):
        monkeypatch.setenv(device.VARIABLE, wrong)
        with pytest.raises(UserError, match="there is no such device") as caught:
            chosen_device()
        assert_one_sentence(caught.value)
    assert cli.main(["--device", "cpu", "list", "methods"]) == 0
    assert chosen_device() == torch.device("cpu")


def test_a_picture_is_redrawn_as_diffusers_does(tiny_v):
    from diffusers import StableDiffusionImg2ImgPipeline

    from guardsmith.diffusion.sampling import solver_for

    images, prompts, seeds = pictures(2), ["a photo of person", "a photo"], [3, 4]
    found = redraw(tiny_v, images, prompts, seeds, strength=0.6, steps=6, guidance=2.0)
    pipeline = StableDiffusionImg2ImgPipeline(
        vae=tiny_v.vae, text_encoder=tiny_v.text_encoder, tokenizer=tiny_v.tokenizer, unet=tiny_v.unet,
        scheduler=solver_for(tiny_v, 6), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        prompt=prompts, image=images / 2 + 0.5, strength=0.6, num_inference_steps=10, guidance_scale=2.0, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images  # fmt: skip
    assert torch.allclose(found, wanted.float() * 2 - 1, atol=1e-5)


DIGEST = """
import sys, torch
from guardsmith.cli.app import main
code = main(sys.argv[1:])
print(torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
sys.exit(code)
"""


def test_deterministic_gives_the_same_bits_on_any_number_of_cores(v_folder, tmp_path):
    """By a command that may use two, and from Python in this process, which has one."""
    recipe = recipe_for("persguard", v_folder, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", DIGEST, "--deterministic", "harden", "--recipe", recipe, "--output", tmp_path / "two"],
        env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["1", "True"]
    registry = gs.load_registry(gs.load_recipe(recipe).subjects)
    gs.harden(str(v_folder), registry, recipe=recipe, output=tmp_path / "one", deterministic=True)
    two, one = (json.loads((tmp_path / name / "harden.json").read_text()) for name in ("two", "one"))
    for record in (two, one):
        assert record["run"]["deterministic"] and record["run"]["threads"] == record["run"]["processes"] == 1
    assert weights_digest(tmp_path / "two/model") == weights_digest(tmp_path / "one/model") == one["model_digest"]
    assert one["history"] == two["history"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_free_memory_is_given_back():
    script = """
import torch
from pathlib import Path
from guardsmith.runtime.device import settle

def held():
    return int(dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())["RssAnon"].split()[0])

settle()
torch.ones(2**22)  # glibc now keeps blocks as large as this one
before, small = held(), []
large = [torch.ones(2**21) for _ in range(20)]
for number in range(20):
    large[number] = None
    small.append(torch.ones(2**14))  # lies where the large one was
print(held() - before)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    kept = int(
        subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, check=True, text=True).stdout
    )
    assert kept < 10_000  # KiB, of 163,840: glibc left as it is mostly keeps them
