"""ASPL, the alternating surrogate of Anti-DreamBooth (Van Le et al. 2023; hf.co/papers/2303.15433), and its ensemble, E-ASPL.

In every round a copy of the surrogate takes a few DreamBooth steps on the clean pictures, the pixels climb that copy's denoising
loss under the identifier prompt, and the surrogate itself takes a few steps on the pixels as they are then: it stays a model of
an attacker who trains on cloaked pictures.

Of several models each has its surrogate, and the pixels meet them one after another (the paper's E-ASPL). The released code lets
every model begin from the same pixels and averages the results, which shrinks the steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from guardsmith.attacks.base import AttackData
from guardsmith.cloaks.pixels import OnStep, Surrogate, SurrogateConfig, ascend, denoising_loss
from guardsmith.diffusion.prompts import instance_prompt
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import generator


class AsplConfig(SurrogateConfig):
    """The released script's settings, in pixel values (its 0.05 and 0.005 are of [-1, 1])."""

    budget: float = Field(6.375, gt=0, le=255)
    """Largest change of a pixel, of 255."""
    step: float = Field(0.6375, gt=0, le=255)
    """Change of every pixel in one step, of 255."""
    rounds: int = Field(50, gt=0)
    """How often the two alternate."""
    surrogate_steps: int = Field(3, gt=0)
    """DreamBooth steps on the clean pictures, of a copy, and then on the cloaked ones; in every round."""
    steps: int = Field(6, gt=0)
    """Steps on the pixels in every round (with every model)."""

    def total(self, models: int, pictures: int) -> int:
        """Steps on the pixels in all."""
        return self.rounds * self.steps * models


def cloak(
    models: Sequence[DiffusionModel], data: AttackData, config: AsplConfig, *, seed: int, on_step: OnStep | None = None
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
    surrogates = [Surrogate(model, config) for model in models]
    snapshots = [surrogate.snapshot() for surrogate in surrogates]
    pixels = data.images
    for number in range(config.rounds):
        for which, (surrogate, before) in enumerate(zip(surrogates, snapshots, strict=True)):
            before.take()
            stream = seed + (number * len(models) + which) * 2
            surrogate.learn(data, data.images, config.surrogate_steps, stream)
            context = surrogate.context(prompt)
            for step in range(config.steps):
                rng = generator(seed, number, which, step)

                def gain(part: Tensor, _: slice) -> Tensor:
                    return denoising_loss(surrogate.model, part, context, rng)  # noqa: B023 (called at once)

                pixels, value = ascend(pixels, data.images, gain, config)
                if on_step is not None:
                    on_step(value)
            before.restore()
            surrogate.learn(data, pixels, config.surrogate_steps, stream + 1)
    return pixels
