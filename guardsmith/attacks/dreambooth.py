"""DreamBooth (Ruiz et al. 2023; hf.co/papers/2208.12242) as in diffusers' `train_dreambooth.py`.

Trains the whole U-Net; the text encoder stays frozen unless `train_text_encoder` is set. Every step is one batch
[instance pictures; class pictures] with independent timesteps and noise, loss = MSE(instance) + w MSE(class).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from string import Formatter

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from guardsmith.attacks.base import Attack, AttackData, OnStep, train
from guardsmith.attacks.optimizers import OptimizerName, check_optimizer
from guardsmith.core.errors import UserError
from guardsmith.diffusion.latents import LatentStore, encode
from guardsmith.diffusion.losses import join, noise_samples, row_losses
from guardsmith.diffusion.prompts import INSTANCE_TEMPLATE, PromptBank, class_prompt, instance_prompt
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.runtime.device import outputs_stay
from guardsmith.training.loop import generator


class DreamBoothConfig(BaseModel):
    """Settings of diffusers' script; its defaults are for Stable Diffusion 1.5 at 512 px."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(5e-6, gt=0)
    """The optimizer's rate, constant."""
    optimizer: OptimizerName = "adamw"
    """adamw; adamw8bit (bitsandbytes); sgd (momentum 0.9); adafactor; prodigy, whose rate is usually 1. Others than adamw need
    other learning rates."""
    weight_decay: float = Field(1e-2, ge=0)
    """The optimizer's weight decay."""
    steps: int = Field(800, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(4, gt=0)
    """Instance pictures per step, and as many class pictures."""
    prior_weight: float = Field(1.0, ge=0)
    """Weight of the class pictures' loss; 0 switches prior preservation off."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient clipping."""
    train_text_encoder: bool = False
    """Train the text encoder too, with the same rate."""
    template: str = INSTANCE_TEMPLATE
    """Instance prompt, with {identifier} and {class_noun} in it."""

    @field_validator("optimizer")
    @classmethod
    def _is_installed(cls, name: OptimizerName) -> OptimizerName:
        try:
            check_optimizer(name)
        except UserError as error:
            raise ValueError(str(error)) from error
        return name

    @field_validator("template")
    @classmethod
    def _has_its_words(cls, template: str) -> str:
        fields = [field for _, field, *_ in Formatter().parse(template) if field is not None]
        if sorted(fields) != ["class_noun", "identifier"]:
            raise ValueError("has to contain {identifier} and {class_noun}, once each")
        return template


def train_on_subject(
    model: DiffusionModel,
    data: AttackData,
    config: DreamBoothConfig,
    parameters: Sequence[torch.nn.Parameter],
    *,
    seed: int,
    on_step: OnStep | None = None,
    prompts: tuple[str, str] | None = None,
    rate_at: Callable[[int], float] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """DreamBooth's loop over the given parameters (all of the U-Net's, or an adapter's), which change in place.

    Args:
        model: what the parameters belong to.
        data: what the attacker has.
        config: settings.
        parameters: what is trained.
        seed: of timesteps, noise and the choice of pictures.
        on_step: see `OnStep`.
        prompts: of the instance pictures and of the class pictures, where they are not the usual ones.
        rate_at: step -> learning rate, where it is not constant.
        optimizer: over these parameters, in place of the one of the settings.

    Returns:
        The training loss of every step.

    Raises:
        RunFailed: a loss is not finite.
    """
    subject: LatentStore = encode(model, data.images)
    prior = encode(model, data.class_images) if config.prior_weight and len(data.class_images) else None
    texts = prompts or (
        instance_prompt(data.identifier, data.class_noun, config.template),
        class_prompt(data.class_noun),
    )
    bank = PromptBank(model)
    tokens, contexts = bank.tokens(texts), bank.encode(texts)
    timesteps = int(model.scheduler.config.num_train_timesteps)

    def loss_at(step: int) -> Tensor:
        rng = generator(seed, step)
        words = contexts
        if config.train_text_encoder:
            with outputs_stay():
                words = model.text_encoder(tokens).last_hidden_state
        instance_context, class_context = words.split(1)
        rows = noise_samples(subject.draw(config.batch_size, rng), instance_context, rng, steps=timesteps)
        if prior is not None:
            rows = join(rows, noise_samples(prior.draw(config.batch_size, rng), class_context, rng, steps=timesteps))
        errors = row_losses(model.unet, model.scheduler, rows)
        loss = errors[: config.batch_size].mean()
        if prior is not None:
            loss = loss + config.prior_weight * errors[config.batch_size :].mean()
        return loss

    return train(
        model, loss_at, parameters, steps=config.steps, learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm, on_step=on_step, rate_at=rate_at, optimizer_name=config.optimizer,
        weight_decay=config.weight_decay, optimizer=optimizer,
    )  # fmt: skip


def attack(
    model: DiffusionModel,
    data: AttackData,
    config: DreamBoothConfig,
    *,
    seed: int,
    on_step: OnStep | None = None,
    prompts: tuple[str, str] | None = None,
    rate_at: Callable[[int], float] | None = None,
    optimizer_of: Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> tuple[DiffusionModel, list[float]]:
    """Personalize a copy of the model; returns it, frozen again, and the loss of every step (see `train_on_subject`).

    `optimizer_of` makes the optimizer over what is trained, in place of the one of the settings.
    """
    own = with_own_unet(model)
    trained = [own.unet]
    if config.train_text_encoder:
        own.text_encoder = copy.deepcopy(model.text_encoder)
        trained.append(own.text_encoder)
    parameters = [p for part in trained for p in part.requires_grad_(True).parameters()]
    losses = train_on_subject(
        own, data, config, parameters, seed=seed, on_step=on_step, prompts=prompts, rate_at=rate_at,
        optimizer=None if optimizer_of is None else optimizer_of(parameters),
    )  # fmt: skip
    for part in trained:
        part.requires_grad_(False)
    return own, losses


ATTACK = Attack(attack, DreamBoothConfig, "hf.co/papers/2208.12242")
