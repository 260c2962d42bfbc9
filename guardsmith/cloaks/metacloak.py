"""MetaCloak (Liu et al. 2024; hf.co/papers/2311.13127): pixels that hold against a pool of surrogates and transformations.

The pool has the states that a DreamBooth run on the subject goes through. In turn the pixels climb each of them, seen through
random crops, blurs and mirrors, and the surrogate takes a few steps on the pixels as they are then.

The released code feeds surrogates pictures in 0..255 and trains half-precision weights that hardly move; both are as the paper
means them here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from guardsmith.attacks.base import AttackData
from guardsmith.cloaks.pixels import OnStep, Surrogate, SurrogateConfig, ascend, denoising_loss
from guardsmith.diffusion.prompts import instance_prompt
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.purifiers.gaussian import blurred
from guardsmith.training.loop import generator


class MetaCloakConfig(SurrogateConfig):
    """The released script's settings."""

    budget: float = Field(11.0, gt=0, le=255)
    """Largest change of a pixel, of 255."""
    step: float = Field(1.1, gt=0, le=255)
    """Change of every pixel in one step, of 255."""
    pool: int = Field(6, gt=1)
    """States of the surrogate, evenly spread over its training, the first and the last among them."""
    pool_steps: int = Field(1000, gt=0)
    """DreamBooth steps of that training."""
    sweeps: int = Field(4, gt=0)
    """How often all states are gone through."""
    rounds: int = Field(100, gt=0)
    """Rounds at every state."""
    steps: int = Field(6, gt=0)
    """Steps on the pixels in every round."""
    surrogate_steps: int = Field(2, gt=0)
    """DreamBooth steps on the cloaked pictures after them."""
    blur_kernel: int = Field(7, gt=0)
    """Side of the blur's kernel in pixels (at 512); smaller pictures get as many as their share, at least 3."""
    crop: float = Field(0.9, gt=0, le=1)
    """Smallest share of a side that a random crop leaves."""

    def total(self, models: int, pictures: int) -> int:
        """Steps on the pixels in all."""
        return self.sweeps * models * self.pool * self.rounds * self.steps


def transformed(pixels: Tensor, config: MetaCloakConfig, rng: torch.Generator) -> Tensor:
    """Pictures as an attacker may preprocess them before training: cropped and scaled back, blurred, perhaps mirrored."""
    size = pixels.shape[-1]
    share, left, top, deviation, mirror = torch.rand(5, generator=rng).tolist()
    side = max(8, round(size * (config.crop + (1 - config.crop) * share)))
    x, y = round(left * (size - side)), round(top * (size - side))
    cropped = pixels[:, :, y : y + side, x : x + side]
    if side != size:
        cropped = F.interpolate(cropped, (size, size), mode="bilinear", align_corners=False, antialias=True)
    kernel = max(3, round(config.blur_kernel * size / 512) // 2 * 2 + 1)
    result = blurred(cropped, kernel, 0.1 + 1.9 * deviation * min(1.0, size / 512))
    return (result.flip(3) if mirror < 0.5 else result).clamp(-1, 1)


def cloak(
    models: Sequence[DiffusionModel],
    data: AttackData,
    config: MetaCloakConfig,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> Tensor:
    """Cloaked pictures, float32 (n, 3, h, w) in [-1, 1].

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
    surrogates, pools = [Surrogate(model, config) for model in models], []
    for number, surrogate in enumerate(surrogates):
        states = [surrogate.snapshot()]
        for place in range(1, config.pool):
            before, after = (round(at * config.pool_steps / (config.pool - 1)) for at in (place - 1, place))
            if after > before:
                surrogate.learn(data, data.images, after - before, seed + 1_000 * number + place)
            states.append(surrogate.snapshot())
        pools.append(states)
    pixels = data.images
    for sweep in range(config.sweeps):
        for which, (surrogate, states) in enumerate(zip(surrogates, pools, strict=True)):
            for number, state in enumerate(states):
                state.restore()
                for j in range(config.rounds):
                    place = ((sweep * len(models) + which) * config.pool + number) * config.rounds + j
                    context = surrogate.context(prompt)
                    for step in range(config.steps):
                        rng = generator(seed, place, step)

                        def gain(part: Tensor, _: slice) -> Tensor:
                            view = transformed(part, config, rng)  # noqa: B023 (called at once)
                            return denoising_loss(surrogate.model, view, context, rng)  # noqa: B023

                        pixels, value = ascend(pixels, data.images, gain, config)
                        if on_step is not None:
                            on_step(value)
                    surrogate.learn(data, pixels, config.surrogate_steps, seed + 1_000_000 + place)
    return pixels
