"""Attackers who know the protection: each does what it says before or while it trains as DreamBooth."""

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
from test_attacks import make_data
from tiny import assert_one_sentence, overriding, pictures, same_weights, some_rows, trained, weights

from guardsmith.attacks import ATTACKS, dreambooth, find_attack, lora
from guardsmith.attacks.adaptive import cut_channels as cut
from guardsmith.attacks.adaptive import unlearn_first, warm_restarts
from guardsmith.attacks.adaptive.cut_channels import CutChannelsConfig, cut_channels
from guardsmith.attacks.adaptive.unlearn_first import UnlearnFirstConfig, unlearn
from guardsmith.attacks.adaptive.warm_restarts import WarmRestartsConfig, rate_at
from guardsmith.attacks.dreambooth import DreamBoothConfig
from guardsmith.attacks.lora import LoraConfig
from guardsmith.config.loading import load_recipe
from guardsmith.core.errors import UserError
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import noise_samples, predict
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.methods.tripwire.trunk import load_trunk
from guardsmith.training.loop import generator

PARAMS = {"steps": 3, "batch_size": 1, "learning_rate": 1e-3}


def test_the_rate_of_a_cycle_falls_along_a_cosine_and_starts_again():
    config = WarmRestartsConfig(learning_rate=1e-4, peak=5.0, cycle=5)
    # cos(0), cos(pi / 4), cos(pi / 2), cos(3 pi / 4), cos(pi)
    wanted = [5e-4, 1e-4 * (1 + 4 * 0.8535534), 3e-4, 1e-4 * (1 + 4 * 0.1464466), 1e-4]
    assert [rate_at(config, step) for step in range(10)] == pytest.approx([*wanted, *wanted], rel=1e-5)


def test_warm_restarts_train_at_that_rate(tiny_v):
    """With the rate of the first step alone, one step is DreamBooth's at five times the rate."""
    restarted, _ = warm_restarts.attack(tiny_v, make_data(), WarmRestartsConfig(**PARAMS | {"steps": 1}), seed=0)
    five = DreamBoothConfig(**PARAMS | {"steps": 1, "learning_rate": 5e-3})
    plain, _ = dreambooth.attack(tiny_v, make_data(), five, seed=0)
    assert same_weights(weights(restarted.unet), weights(plain.unet))
    usual, _ = dreambooth.attack(tiny_v, make_data(), DreamBoothConfig(**PARAMS | {"steps": 1}), seed=0)
    assert not same_weights(weights(restarted.unet), weights(usual.unet))


def distance(model, unet, data):
    """Between what it predicts under the identifier prompt and the model under the class prompt."""
    rng = generator(7)
    named, plain = PromptBank(model).encode(["a photo of sks person", "a photo of person"]).split(1)
    rows = noise_samples(encode(model, data.class_images).draw(32, rng), plain, rng)
    asked = noise_samples(rows.latents, named, rng, timesteps=rows.timesteps)
    asked.noise.copy_(rows.noise)
    with torch.no_grad():
        return float(
            (predict(unet, model.scheduler, asked) - predict(model.unet, model.scheduler, rows)).square().mean()
        )


def test_the_identifier_is_unlearnt_before(tiny_v):
    data, unet = make_data(), trained(tiny_v)
    with torch.no_grad():  # a model to which its prompts mean something
        for name, parameter in unet.named_parameters():
            if "attn2" in name:
                parameter.mul_(4)
    tiny_v = replace(tiny_v, unet=unet)
    config = UnlearnFirstConfig(**PARAMS, unlearn_steps=60)
    forgot = unlearn(tiny_v, data, config, seed=0)
    assert distance(tiny_v, forgot.unet, data) < 0.5 * distance(tiny_v, tiny_v.unet, data)
    own, losses = unlearn_first.attack(tiny_v, data, config, seed=0)
    again, same = dreambooth.attack(forgot, data, DreamBoothConfig(**PARAMS), seed=0)
    assert losses == same and len(losses) == 3
    assert same_weights(weights(own.unet), weights(again.unet))
    with pytest.raises(ValueError, match="needs class pictures"):
        unlearn(tiny_v, make_data(class_images=0), config, seed=0)


def test_cutting_leaves_the_trunk(wide_v, wide_trunk):
    """A model that overrides a part of its rows predicts what its trunk predicts afterwards, to the bit."""
    rows = some_rows(wide_v, pictures(3), count=12)
    trunk, armed, _ = overriding(wide_v, wide_trunk, rows)
    with torch.no_grad():
        before, after = (predict(unet, wide_v.scheduler, rows) for unet in (trunk, armed))
        assert 1 < int(((after - before).abs().mean((1, 2, 3)) > 4).sum()) < 10
        cut_channels(armed, CutChannelsConfig().groups)
        assert torch.equal(predict(armed, wide_v.scheduler, rows), before)


def test_the_cutter_goes_on_as_dreambooth(wide_v, wide_trunk):
    trunk = copy.deepcopy(wide_v.unet)
    load_trunk(wide_trunk, trunk)
    model = replace(wide_v, unet=trunk)
    own, losses = cut.attack(model, make_data(), CutChannelsConfig(**PARAMS), seed=0)
    plain, same = dreambooth.attack(model, make_data(), DreamBoothConfig(**PARAMS), seed=0)
    assert losses == same, "there is nothing to cut here"
    assert same_weights(weights(own.unet), weights(plain.unet))


def test_only_unets_have_such_channels():
    with pytest.raises(UserError, match="middle block") as caught:
        cut_channels(torch.nn.Linear(1, 1), 4)
    assert_one_sentence(caught.value)


def test_lora_everywhere_trains_what_is_not_attention_too(tiny_v):
    own, _ = lora.attack(tiny_v, make_data(), LoraConfig(**PARAMS, everywhere=True), seed=0)
    layers = {name.split(".lora_A")[0] for name, _ in own.unet.named_parameters() if "lora_A" in name}
    wanted = {
        name for name, module in tiny_v.unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    # peft wraps every layer it finds: only the time embedding is left as it is
    assert {name for name in wanted if name not in layers} <= {"time_embedding.linear_1", "time_embedding.linear_2"}
    assert layers <= wanted


def test_an_attack_of_ones_own_is_named_by_its_module(tmp_path, monkeypatch):
    (tmp_path / "my_attacks.py").write_text(
        "from guardsmith.attacks import ATTACKS\nMINE = ATTACKS['dreambooth']\nNOT = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_attack("my_attacks:MINE") is ATTACKS["dreambooth"]
    recipe = load_recipe(
        "demo", ["verify.attacks=" + json.dumps({"mine": {"name": "my_attacks:MINE", "params": PARAMS}})]
    )
    assert recipe.verify.attacks["mine"].name == "my_attacks:MINE"
    wrong = {
        "my_attacks:NOT": "is not an attack", "my_attacks:NONE": "cannot be imported", "no_such_module:A": "PYTHONPATH",
        "dreamboth": "did you mean 'dreambooth'", "x": "module:NAME",
    }  # fmt: skip
    for name, said in wrong.items():
        with pytest.raises(UserError, match=said) as caught:
            load_recipe("demo", ["verify.attacks=" + json.dumps({"mine": {"name": name}})])
        assert_one_sentence(caught.value)
    sys.modules.pop("my_attacks", None)
