"""AdvDM, Mist and the score-distillation gradient of Diff-Protect: cloaks against the frozen base under a generic prompt.

advdm   climb the denoising loss (Liang et al. 2023; hf.co/papers/2302.04578)
mist    come close to the latents of a target picture, and climb it (Liang and Wu 2023; hf.co/papers/2305.12683)
sds     the gradient on the latents is eps_theta(z_t) - eps, without the U-Net's Jacobian; only the encoder is gone back
        through (Xue et al. 2024; hf.co/papers/2311.12832)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from guardsmith.attacks.base import AttackData
from guardsmith.cloaks.pixels import OnStep, PixelConfig, ascend, denoising_loss, sampled_latents
from guardsmith.core.errors import UserError
from guardsmith.diffusion.losses import noise_samples, score_residual
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.purifiers import find_purifier, purified
from guardsmith.training.loop import generator


class AdvdmConfig(PixelConfig):
    """Budget and step as in Mist's code are 16 and 1; AdvDM's port in GrIDPure has 4 and 0.8."""

    mode: Literal["advdm", "mist", "sds"] = "advdm"
    """Which of the three."""
    steps: int = Field(100, gt=0)
    """Steps on the pixels."""
    prompt: str = "a photo"
    """Prompt for the base."""
    loss_weight: float = Field(1e4, ge=0)
    """mist: weight of the denoising loss beside the squared distance to the target's latents; 0 leaves the encoder attack."""
    direction: Literal["up", "down"] = "down"
    """sds: whether the score's residual is climbed or descended (the paper finds descending better)."""
    against: str | None = None
    """A purifier that the cloak is to survive: the model sees purified pixels, and the gradient is taken for that of the pixels
    themselves (BPDA, Athalye et al. 2018; hf.co/papers/1802.00420)."""
    against_params: dict[str, Any] = Field({})
    """Its parameters."""

    @model_validator(mode="after")
    def _purifier_is_known(self) -> AdvdmConfig:
        if self.against is not None:
            try:
                find_purifier(self.against).config(**self.against_params)
            except UserError as error:
                raise ValueError(str(error)) from error
        return self

    def total(self, models: int, pictures: int) -> int:
        """Steps on the pixels in all."""
        return self.steps


def target_pattern(size: int) -> Tensor:
    """A picture to come close to, float32 (1, 3, size, size): rings in black and white, which no photograph is like."""
    line = torch.linspace(-1, 1, size)
    rings = torch.sin(40 * (line[None] ** 2 + line[:, None] ** 2)).sign()
    return rings.expand(1, 3, size, size).contiguous()


def purified_straight_through(purify: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Purified pixels that pass their gradient on to the pixels as it is (BPDA)."""
    with torch.no_grad():
        apart = purify(pixels) - pixels
    return pixels + apart


def score_gain(model: DiffusionModel, pixels: Tensor, context: Tensor, rng: torch.Generator) -> Tensor:
    """A scalar whose gradient on the latents is eps_theta(z_t, t) - eps, averaged over pictures."""
    latents = sampled_latents(model, pixels, rng)
    rows = noise_samples(latents, context, rng, steps=int(model.scheduler.config.num_train_timesteps))
    residual = score_residual(model.unet, model.scheduler, rows)
    return (latents * residual).sum() / len(pixels)


def cloak(
    models: Sequence[DiffusionModel], data: AttackData, config: AdvdmConfig, *, seed: int, on_step: OnStep | None = None
) -> Tensor:
    """Cloaked pictures, float32 (n, 3, h, w) in [-1, 1]; of several models the mean is climbed.

    Args:
        models: the bases that attackers may personalize.
        data: pictures; whom they show matters to purifiers with a prompt only.
        config: settings.
        seed: of everything random.
        on_step: see `OnStep`.

    Raises:
        RunFailed: it diverged.
    """
    contexts = [PromptBank(model).encode([config.prompt]) for model in models]
    with torch.no_grad():
        targets = [model.posterior(target_pattern(model.image_size))[0] for model in models]

    def of_model(model: DiffusionModel, context: Tensor, target: Tensor, part: Tensor, rng: torch.Generator) -> Tensor:
        if config.mode == "sds":
            gain = score_gain(model, part, context, rng)
            return gain if config.direction == "up" else -gain
        if config.mode == "advdm":
            return denoising_loss(model, part, context, rng)
        apart = (model.posterior(part)[0] - target).square().sum() / len(part)
        objective = config.loss_weight * denoising_loss(model, part, context, rng) if config.loss_weight else 0.0
        return objective - apart

    pixels = data.images
    for step in range(config.steps):
        rng = generator(seed, step)
        purify = None
        if config.against is not None:
            purify = partial(
                purified, config.against, config.against_params, models[0], class_noun=data.class_noun, seed=seed + step
            )

        def gain(part: Tensor, _: slice) -> Tensor:
            if purify is not None:  # noqa: B023 (called at once)
                part = purified_straight_through(purify, part)  # noqa: B023 (called at once)
            gains = [
                of_model(model, context, target, part, rng)  # noqa: B023 (called at once)
                for model, context, target in zip(models, contexts, targets, strict=True)
            ]
            return torch.stack(gains).mean()

        pixels, value = ascend(pixels, data.images, gain, config)
        if on_step is not None:
            on_step(value)
    return pixels
