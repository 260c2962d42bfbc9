"""FSMG, the fully-trained surrogate of Anti-DreamBooth (Van Le et al. 2023; hf.co/papers/2303.15433).

A DreamBooth model is trained on clean pictures of the subject; then the pixels climb its denoising loss under the identifier
prompt, against that model as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from guardsmith.attacks.base import AttackData
from guardsmith.cloaks.pixels import OnStep, Surrogate, SurrogateConfig, ascend, denoising_loss
from guardsmith.diffusion.prompts import instance_prompt
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import generator


class FsmgConfig(SurrogateConfig):
    """The released code's settings, in pixel values (its 0.05 and 0.005 are of [-1, 1])."""

    budget: float = Field(6.375, gt=0, le=255)
    """Largest change of a pixel, of 255."""
    step: float = Field(0.6375, gt=0, le=255)
    """Change of every pixel in one step, of 255."""
    surrogate_steps: int = Field(1000, gt=0)
    """DreamBooth steps of the surrogate, on the clean pictures."""
    steps: int = Field(100, gt=0)
    """Steps on the pixels."""

    def total(self, models: int, pictures: int) -> int:
        """Steps on the pixels in all."""
        return self.steps


def cloak(
    models: Sequence[DiffusionModel], data: AttackData, config: FsmgConfig, *, seed: int, on_step: OnStep | None = None
) -> Tensor:
    """Cloaked pictures, float32 (n, 3, h, w) in [-1, 1]; of several models the mean of their losses is climbed.

    Args:
        models: the bases that attackers may personalize.
        data: clean pictures of one subject, class pictures, identifier and class noun.
        config: settings.
        seed: of everything random.
        on_step: see `OnStep`.

    Raises:
        RunFailed: it diverged.
    """
    prompt = instance_prompt(data.identifier, data.class_noun)
    surrogates = [Surrogate(model, config) for model in models]
    for number, surrogate in enumerate(surrogates):
        surrogate.learn(data, data.images, config.surrogate_steps, seed + number)
    contexts = [surrogate.context(prompt) for surrogate in surrogates]
    pixels = data.images
    for step in range(config.steps):
        rng = generator(seed, step, 1)

        def gain(part: Tensor, _: slice) -> Tensor:
            losses = [
                denoising_loss(surrogate.model, part, context, rng)  # noqa: B023 (called at once)
                for surrogate, context in zip(surrogates, contexts, strict=True)
            ]
            return torch.stack(losses).mean()

        pixels, value = ascend(pixels, data.images, gain, config)
        if on_step is not None:
            on_step(value)
    return pixels
