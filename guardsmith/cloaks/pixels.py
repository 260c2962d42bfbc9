"""What all cloaks share: projected gradient ascent on pixels, and a surrogate that learns the subject meanwhile.

    x <- clip to [-1, 1]( x0 + clip to the budget( x + step sign(gradient) - x0 ) )

Budgets and steps are in pixel values of 255, whatever range a paper's code has them in; pictures are in [-1, 1], where a pixel
value is 2 / 255.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from guardsmith.attacks.base import AttackData
from guardsmith.attacks.dreambooth import DreamBoothConfig, train_on_subject
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.diffusion.losses import noise_samples, row_losses
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.models.checkpoint import DiffusionModel, load_model, with_own_unet
from guardsmith.models.families import SD
from guardsmith.training.loop import Snapshot

PIXEL = 2 / 255
"""One pixel value in the range of pictures here."""

OnStep = Callable[[float], None]
"""Called after every step on the pixels with what it showed (a loss)."""


class PixelConfig(BaseModel):
    """How far and how fast pixels move."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: float = Field(8.0, gt=0, le=255)
    """Largest change of a pixel, of 255."""
    step: float = Field(1.0, gt=0, le=255)
    """Change of every pixel in one step, of 255."""
    batch_size: int = Field(4, gt=0)
    """Pictures that go through the model together."""


def project(pixels: Tensor, clean: Tensor, budget: float) -> Tensor:
    """The nearest pictures within the budget (of 255) around the clean ones and within [-1, 1]."""
    reach = budget * PIXEL
    return (clean + (pixels - clean).clamp(-reach, reach)).clamp(-1, 1)


def ascend(
    pixels: Tensor,
    clean: Tensor,
    gain: Callable[[Tensor, slice], Tensor],
    config: PixelConfig,
    *,
    step: float | None = None,
) -> tuple[Tensor, float]:
    """One step of projected gradient ascent by the sign of the gradient.

    Args:
        pixels: where it is, (n, 3, h, w) in [-1, 1].
        clean: where it began, likewise.
        gain: (some of the pixels, which rows they are) -> scalar mean of what is to grow.
        config: budget, step and batch size.
        step: another step, of 255.

    Returns:
        The new pixels, detached, and the mean gain before the step.

    Raises:
        RunFailed: the gain or its gradient is not finite.
    """
    moves, mean_gain = [], 0.0
    for start in range(0, len(pixels), config.batch_size):
        rows = slice(start, min(start + config.batch_size, len(pixels)))
        part = pixels[rows].detach().requires_grad_()
        value = gain(part, rows)
        [gradient] = torch.autograd.grad(value, part)
        if not bool(torch.isfinite(gradient).all()):
            raise RunFailed("a cloak diverged: the gradient of its pixels is not finite; lower its rates")
        moves.append(gradient.sign())
        mean_gain += float(value.detach()) * len(part) / len(pixels)
    size = config.step if step is None else step
    return project(pixels.detach() + size * PIXEL * torch.cat(moves), clean, config.budget), mean_gain


def sampled_latents(model: DiffusionModel, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Scaled latents drawn from the posterior, with gradients to the pixels."""
    mean, deviation = model.posterior(pixels)
    return mean + deviation * torch.randn(mean.shape, generator=generator)


def denoising_loss(model: DiffusionModel, pixels: Tensor, context: Tensor, generator: torch.Generator) -> Tensor:
    """L_simple with gradients to the pixels: a fresh timestep and noise for every picture; a scalar."""
    latents = sampled_latents(model, pixels, generator)
    steps = int(model.scheduler.config.num_train_timesteps)
    rows = noise_samples(latents, context, generator, steps=steps)
    return row_losses(model.unet, model.scheduler, rows).mean()


class SurrogateConfig(PixelConfig):
    """A cloak that trains a DreamBooth model of its own meanwhile."""

    learning_rate: float = Field(5e-7, gt=0)
    """AdamW's rate on the surrogate. The released codes train half-precision weights with it, which hardly move; here they are
    float32 and do."""
    surrogate_batch: int = Field(2, gt=0)
    """Instance rows per step of the surrogate, and as many class rows."""
    prior_weight: float = Field(1.0, ge=0)
    """Weight of the class rows; 0 switches prior preservation off."""
    train_text_encoder: bool = True
    """The surrogate's text encoder learns too."""


class Surrogate:
    """A model that learns the subject as an attacker would, in place; its parameters take no gradient in between.

    Args:
        model: what it begins from; it stays as it is.
        config: how it learns.
    """

    def __init__(self, model: DiffusionModel, config: SurrogateConfig) -> None:
        self.model = with_own_unet(model)
        parts: list[torch.nn.Module] = [self.model.unet]
        if config.train_text_encoder:
            self.model.text_encoder = copy.deepcopy(model.text_encoder)
            parts.append(self.model.text_encoder)
        self.config = config
        self.parameters = [parameter for part in parts for parameter in part.parameters()]

    def learn(self, data: AttackData, images: Tensor, steps: int, seed: int) -> None:
        """DreamBooth on these pictures, with a fresh optimizer (as the released codes have it)."""
        config = self.config
        settings = DreamBoothConfig(
            learning_rate=config.learning_rate, steps=steps, batch_size=config.surrogate_batch,
            prior_weight=config.prior_weight, train_text_encoder=config.train_text_encoder,
        )  # fmt: skip
        own_data = AttackData(images.detach(), data.class_images, data.identifier, data.class_noun)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        train_on_subject(self.model, own_data, settings, self.parameters, seed=seed)
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def snapshot(self) -> Snapshot:
        """Its parameters as they are, to come back to."""
        return Snapshot(self.parameters)

    def context(self, prompt: str) -> Tensor:
        """What it makes of a prompt now, (1, tokens, width), without a graph."""
        return PromptBank(self.model).encode([prompt])


def load_bases(sources: Sequence[str]) -> list[DiffusionModel]:
    """The models that pictures are cloaked against.

    Raises:
        UserError: they draw pictures of different sizes, or are of a family whose text encoders are not trained here; see also
            `load_model`.
    """
    models = [load_model(source) for source in sources]
    for model in models:
        if model.family is not SD:
            raise UserError(f"{model.source} is {model.family.name}; pictures are cloaked and washed on {SD.name} only")
    sizes = sorted({model.image_size for model in models})
    if len(sizes) > 1:
        raise UserError(f"the bases draw pictures of different sizes ({sizes}); name bases of one size at a time")
    return models
