"""PhotoGuard (Salman et al. 2023; hf.co/papers/2302.06588): pictures whose latents, or whose edits, are those of nothing.

    encoder     bring the latents to zero; steps get smaller, and the start is random within the budget
    diffusion   bring what the model makes of a picture (noised half-way, a few solver steps, decoded) to black

The paper's diffusion attack goes through an inpainting model; a Stable Diffusion base has no mask channels, so it goes through
image to image here. Both are within the L_inf budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from guardsmith.attacks.base import AttackData
from guardsmith.cloaks.pixels import PIXEL, OnStep, PixelConfig, ascend, project, sampled_latents
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.diffusion.sampling import guided, solver_for
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import generator


class PhotoguardConfig(PixelConfig):
    """The released notebook's settings of the encoder attack, in pixel values (its 0.06 and 0.02 are of [-1, 1])."""

    budget: float = Field(7.65, gt=0, le=255)
    """Largest change of a pixel, of 255."""
    step: float = Field(2.55, gt=0, le=255)
    """Change of every pixel in the first step, of 255; it falls linearly to a hundredth."""
    attack: Literal["encoder", "diffusion"] = "encoder"
    """Which of the two."""
    steps: int = Field(1000, gt=0)
    """Steps on the pixels (the paper's diffusion attack takes 200)."""
    solver_steps: int = Field(4, gt=0)
    """diffusion: solver steps that are gone back through."""
    strength: float = Field(0.5, gt=0, le=1)
    """diffusion: how far pictures are noised."""
    prompt: str = ""
    """diffusion: what the editor asks for."""
    guidance: float = Field(7.5, ge=1)
    """diffusion: classifier-free guidance scale."""

    def total(self, models: int, pictures: int) -> int:
        """Steps on the pixels in all."""
        return self.steps


def edited(
    model: DiffusionModel,
    pixels: Tensor,
    context: Tensor,
    empty: Tensor,
    config: PhotoguardConfig,
    rng: torch.Generator,
) -> Tensor:
    """What the model makes of pictures, with gradients to their pixels, (n, 3, h, w)."""
    count = round(config.solver_steps / config.strength)
    solver = solver_for(model, count)
    times = solver.timesteps[-config.solver_steps :]
    latents = sampled_latents(model, pixels, rng)
    noise = torch.randn(latents.shape, generator=rng)
    latents = model.scheduler.add_noise(latents, noise, times[:1].expand(len(latents)))
    solver.set_begin_index(count - len(times))
    for t in times:
        conditions = context.expand(len(latents), -1, -1), empty.expand(len(latents), -1, -1)
        out = guided(model, latents, t, *conditions, config.guidance)
        latents = solver.step(out, t, latents, return_dict=False)[0]
    return model.decode(latents)


def cloak(
    models: Sequence[DiffusionModel],
    data: AttackData,
    config: PhotoguardConfig,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> Tensor:
    """Cloaked pictures, float32 (n, 3, h, w) in [-1, 1]; of several models the mean distance falls.

    Args:
        models: the bases that editors may use.
        data: pictures; whom they show does not matter.
        config: settings.
        seed: of everything random.
        on_step: see `OnStep`.

    Raises:
        RunFailed: it diverged.
    """
    contexts = [PromptBank(model).encode([config.prompt, ""]).split(1) for model in models]
    start = torch.rand(data.images.shape, generator=generator(seed, -1)) * 2 - 1
    pixels = project(data.images + config.budget * PIXEL * start, data.images, config.budget)
    for step in range(config.steps):
        rng = generator(seed, step)

        def gain(part: Tensor, _: slice) -> Tensor:
            norms = []
            for model, (context, empty) in zip(models, contexts, strict=True):
                if config.attack == "encoder":
                    norms.append(model.posterior(part)[0].flatten(1).norm(dim=1).mean())
                else:
                    result = edited(model, part, context, empty, config, rng)  # noqa: B023 (called at once)
                    norms.append((result + 1).flatten(1).norm(dim=1).mean())
            return -torch.stack(norms).mean()

        size = config.step * (1 - 0.99 * step / max(config.steps - 1, 1))
        pixels, value = ascend(pixels, data.images, gain, config, step=size)
        if on_step is not None:
            on_step(value)
    return pixels
