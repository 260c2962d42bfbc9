"""Scaled losses in float16: the steps of torch's GradScaler, and small gradients that are not lost."""

import copy
import json

import pytest
import torch
from test_attacks import make_data
from test_persguard import subject_data
from tiny import harden_with, same_weights, weights

from guardsmith.attacks import ATTACKS
from guardsmith.config.recipe import AttackSpec
from guardsmith.core.errors import RunFailed
from guardsmith.methods import METHODS
from guardsmith.models.checkpoint import with_own_unet
from guardsmith.training.compute import ComputeConfig, configure_denoiser
from guardsmith.training.loop import load_checkpoint, optimizer_step
from guardsmith.training.scaling import EVERY, FIRST, LEAST, LossScale

HALF = ComputeConfig(precision="float16")


def losses_of(layer, steps):
    """Losses some of whose gradients overflow when they are scaled."""
    for step in range(steps):
        size = 1e36 if step in (0, 1, 5) else 0.3
        yield (layer(torch.ones(2, 4)) * size).square().mean() if size < 1 else layer(torch.ones(2, 4)).mean() * size


def test_the_steps_are_those_of_torchs_scaler():
    mine = torch.nn.Linear(4, 4)
    theirs = copy.deepcopy(mine)
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.1) for layer in (mine, theirs)]
    scale, scaler = LossScale(enabled=True), torch.amp.GradScaler("cpu")
    norms = []
    for loss in losses_of(mine, 8):
        scale.up(loss).backward()
        norms.append(optimizer_step(optimizers[0], list(mine.parameters()), scale=scale))
    for loss in losses_of(theirs, 8):
        scaler.scale(loss).backward()
        scaler.unscale_(optimizers[1])
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        scaler.step(optimizers[1])
        scaler.update()
        optimizers[1].zero_grad()
    assert [norm == 0 for norm in norms] == [True, True, False, False, False, True, False, False]
    assert scale.value == scaler.get_scale() == FIRST / 8
    assert same_weights(weights(mine), weights(theirs))


def test_it_grows_again_after_many_steps():
    scale = LossScale(enabled=True)
    for _ in range(EVERY):
        assert scale.value == FIRST and scale.takes(1.0)
    assert scale.value == 2 * FIRST


def test_without_an_end_it_says_so():
    scale = LossScale(enabled=True)
    with pytest.raises(RunFailed, match="bfloat16"):
        while True:
            assert not scale.takes(float("nan"))
    assert scale.value < LEAST


def test_off_nothing_is_scaled():
    scale, loss = LossScale(enabled=False), torch.ones(())
    assert scale.up(loss) is loss and scale.takes(float("inf")), "an infinite norm is the loop's to refuse"


def test_small_gradients_survive(tiny_v):
    """Of a loss so small that float16 alone makes 0 of most of its gradients."""
    own = with_own_unet(tiny_v)
    configure_denoiser(own.unet.requires_grad_(True), HALF)

    def lost(scale):
        loss = (
            1e-6
            * own.unet(torch.ones(1, 4, 8, 8), torch.tensor([500]), torch.ones(1, 16, 16), return_dict=False)[0].mean()
        )
        scale.up(loss).backward()
        gradients = [parameter.grad for parameter in own.unet.parameters()]
        scale.down(gradients)
        none = sum(int((gradient == 0).sum()) for gradient in gradients) / sum(each.numel() for each in gradients)
        own.unet.zero_grad(set_to_none=True)
        return none

    assert lost(LossScale(enabled=True)) < 0.5 * lost(LossScale(enabled=False))


def test_attacks_scale_their_losses_in_float16_only(tiny_v, monkeypatch):
    scales = []
    real = LossScale.up
    monkeypatch.setattr(LossScale, "up", lambda self, loss: scales.append(self.value) or real(self, loss))
    config = ATTACKS["dreambooth"].config(steps=2, batch_size=1)
    _, exact = ATTACKS["dreambooth"].run(tiny_v, make_data(), config, seed=0)
    own = with_own_unet(tiny_v)
    own.unet.compute_in(AttackSpec(name="dreambooth", precision="float16").precision)
    _, half = ATTACKS["dreambooth"].run(own, make_data(), config, seed=0)
    assert scales[:2] == [1.0, 1.0] and scales[2] == FIRST
    assert half[0] == pytest.approx(exact[0], rel=0.01) and half[0] != exact[0]


def test_a_resumed_hardening_has_its_scale_again(tiny_v, tmp_path, monkeypatch):
    """The first step overflows, so the scale is another one from then on."""
    monkeypatch.setattr("guardsmith.training.scaling.FIRST", 2.0**60)
    base = with_own_unet(tiny_v)
    configure_denoiser(base.unet, HALF)
    subject = subject_data()

    def run(steps, **saving):
        config = METHODS["persguard"].config(steps=steps, distillation_weight=0, learning_rate=1e-4)
        return harden_with("persguard", base, [subject], None, config, compute=HALF, **saving)

    unbroken, history = run(4)
    saving = {"checkpoint": tmp_path / "last.safetensors", "checkpoint_every": 1}
    run(2, **saving)
    tensors, info = load_checkpoint(tmp_path / "last.safetensors")
    assert tensors["scale.0"][0] < 2.0**60 and info["history"][0]["gradient_norm"] == 0, json.dumps(info["history"])
    resumed, again = run(4, **saving)
    assert again == history and same_weights(weights(unbroken.unet), weights(resumed.unet))
