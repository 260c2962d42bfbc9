"""An adaptive attacker of protections that depend on a prompt (PersGuard): unlearn the identifier, then DreamBooth.

On class pictures, the model's prediction under the identifier prompt is trained towards its own prediction under the class
prompt, which removes a backdoor that the identifier triggers. Then DreamBooth as usual. Needs no knowledge of the backdoor, only
the suspicion that there is one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from guardsmith.attacks import dreambooth
from guardsmith.attacks.base import Attack, AttackData, OnStep, train
from guardsmith.attacks.dreambooth import DreamBoothConfig
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import noise_samples, predict
from guardsmith.diffusion.prompts import PromptBank, class_prompt, instance_prompt
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.training.loop import generator


class UnlearnFirstConfig(DreamBoothConfig):
    """DreamBooth's settings, for both parts."""

    unlearn_steps: int = Field(100, gt=0)
    """Steps of unlearning, before `steps` of DreamBooth."""


def unlearn(model: DiffusionModel, data: AttackData, config: UnlearnFirstConfig, *, seed: int) -> DiffusionModel:
    """A copy of the model that predicts the same under the identifier prompt as under the class prompt.

    Raises:
        ValueError: there are no class pictures to do it on.
    """
    if not len(data.class_images):
        raise ValueError("unlearning the identifier needs class pictures (verify.class_images)")
    own = with_own_unet(model)
    bank, store = PromptBank(model), encode(model, data.class_images)
    instance_context = bank.encode([instance_prompt(data.identifier, data.class_noun, config.template)])
    plain = bank.encode([class_prompt(data.class_noun)])
    steps = int(model.scheduler.config.num_train_timesteps)

    def loss_at(step: int) -> Tensor:
        rng = generator(seed, -1, step)
        rows = noise_samples(store.draw(2 * config.batch_size, rng), plain, rng, steps=steps)
        with torch.no_grad():
            target = predict(model.unet, model.scheduler, rows)
        instance_rows = replace(rows, context=instance_context.expand(len(rows), -1, -1))
        return (predict(own.unet, model.scheduler, instance_rows) - target).square().mean()

    parameters = list(own.unet.requires_grad_(True).parameters())
    train(
        own, loss_at, parameters, steps=config.unlearn_steps, learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm, optimizer_name=config.optimizer, weight_decay=config.weight_decay,
    )  # fmt: skip
    own.unet.requires_grad_(False)
    return own


def attack(
    model: DiffusionModel, data: AttackData, config: UnlearnFirstConfig, *, seed: int, on_step: OnStep | None = None
) -> tuple[DiffusionModel, list[float]]:
    """Personalize a copy of the model; returns it, frozen again, and the loss of every step of DreamBooth."""
    return dreambooth.attack(unlearn(model, data, config, seed=seed), data, config, seed=seed, on_step=on_step)


ATTACK = Attack(attack, UnlearnFirstConfig, "guardsmith")
