"""A cloak in the way of Glaze (Shan et al. 2023; hf.co/papers/2302.04222), whose own code is closed.

Every picture is drawn again in a distant style by the model; the pixels are then moved, by Adam, so that their latents are those
of the restyled picture, while they look as before:

    min over delta   MSE(E(x + delta), E(style(x))) + weight * max(distance(x, x + delta) - allowed, 0)

Budget and weights are those of the re-implementation in IMPRESS. Glaze measures visibility by LPIPS; here it is
`perceptual_distance`, whose numbers are smaller, so `allowed` is not theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from guardsmith.attacks.base import AttackData
from guardsmith.cloaks.pixels import PIXEL, OnStep, PixelConfig, project
from guardsmith.core.errors import RunFailed
from guardsmith.diffusion.sampling import redraw
from guardsmith.metrics.perceptual import perceptual_distance
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import generator


class GlazeConfig(PixelConfig):
    """The settings of IMPRESS's README, in pixel values (its 0.05 is of [-1, 1])."""

    budget: float = Field(6.375, gt=0, le=255)
    """Largest change of a pixel, of 255."""
    style: str = "an oil painting in the style of van Gogh"
    """Prompt for the redrawn pictures; a style far from their own."""
    strength: float = Field(0.5, gt=0, le=1)
    """How far they are noised for that."""
    solver_steps: int = Field(20, gt=0)
    """Solver steps of that."""
    guidance: float = Field(7.5, ge=1)
    """Classifier-free guidance scale of that."""
    steps: int = Field(500, gt=0)
    """Steps on the pixels."""
    learning_rate: float = Field(0.01, gt=0)
    """Adam's rate on the pixels, in [-1, 1]."""
    weight: float = Field(30.0, ge=0)
    """Of the perceptual distance above the one allowed."""
    allowed: float = Field(0.05, ge=0)
    """How different the pictures may look before that."""

    def total(self, models: int, pictures: int) -> int:
        """Steps on the pixels in all."""
        return self.steps * -(-pictures // self.batch_size)


def cloak(
    models: Sequence[DiffusionModel], data: AttackData, config: GlazeConfig, *, seed: int, on_step: OnStep | None = None
) -> Tensor:
    """Cloaked pictures, float32 (n, 3, h, w) in [-1, 1]; of several models the mean distance falls.

    Args:
        models: the bases that attackers may personalize; the first one restyles.
        data: pictures; whom they show does not matter.
        config: settings.
        seed: of everything random.
        on_step: see `OnStep`.

    Raises:
        RunFailed: it diverged.
    """
    count = len(data.images)
    style_images = redraw(
        models[0], data.images, [config.style] * count, range(seed, seed + count), strength=config.strength,
        steps=config.solver_steps, guidance=config.guidance,
    )  # fmt: skip
    cloaked = []
    for start in range(0, count, config.batch_size):
        clean, goal = (each[start : start + config.batch_size] for each in (data.images, style_images))
        with torch.no_grad():
            targets = [model.posterior(goal)[0] for model in models]
        noise = torch.rand(clean.shape, generator=generator(seed, start)) * 2 - 1
        delta = (config.budget * PIXEL * noise).requires_grad_()
        optimizer = torch.optim.Adam([delta], lr=config.learning_rate)
        for _ in range(config.steps):
            pixels = project(clean + delta, clean, config.budget)
            apart = [
                (model.posterior(pixels)[0] - target).square().mean()
                for model, target in zip(models, targets, strict=True)
            ]
            distance = perceptual_distance(models[0], clean, pixels).mean()
            loss = sum(apart[1:], apart[0]) / len(apart) + config.weight * (distance - config.allowed).clamp(min=0)
            if not bool(torch.isfinite(loss)):
                raise RunFailed("a cloak diverged: its loss is not finite; lower its rates")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                delta.clamp_(-config.budget * PIXEL, config.budget * PIXEL)
            if on_step is not None:
                on_step(float(loss.detach()))
        cloaked.append(project(clean + delta.detach(), clean, config.budget))
    return torch.cat(cloaked)
