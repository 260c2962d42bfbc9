"""IMPRESS (Cao et al. 2023; hf.co/papers/2310.19248): what a cloak adds is what the VAE does not give back.

The picture is moved until it agrees with its own reconstruction, while it looks as before:

    min over x   MSE(x, D(E(x))) + weight * max(distance(x, cloaked) - allowed, 0)

The paper measures visibility by LPIPS; here it is `perceptual_distance`, whose numbers are smaller, so `allowed` is not theirs.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from guardsmith.core.errors import RunFailed
from guardsmith.metrics.perceptual import perceptual_distance
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import generator


class ImpressConfig(BaseModel):
    """The paper's settings; the red-teaming paper's code has ten times the rate, falling."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(3000, gt=0)
    """Steps on the pixels."""
    learning_rate: float = Field(1e-3, gt=0)
    """Adam's rate on the pixels, in [-1, 1]."""
    weight: float = Field(0.1, ge=0)
    """Of the perceptual distance above the one allowed."""
    allowed: float = Field(0.1, ge=0)
    """How different the picture may look before that."""
    noise: float = Field(0.1, ge=0)
    """Deviation of the noise that it begins with, in [-1, 1]."""
    batch_size: int = Field(4, gt=0)
    """Pictures that go through the VAE together."""


def purify(model: DiffusionModel, images: Tensor, config: ImpressConfig, *, class_noun: str, seed: int) -> Tensor:
    """Pictures after it, float32 (n, 3, h, w) in [-1, 1]; the class noun is not used.

    Raises:
        RunFailed: it diverged.
    """
    purified = []
    for start in range(0, len(images), config.batch_size):
        originals = images[start : start + config.batch_size]
        noise = torch.randn(originals.shape, generator=generator(seed, start))
        pixels = (originals + config.noise * noise).clamp(-1, 1).requires_grad_()
        optimizer = torch.optim.Adam([pixels], lr=config.learning_rate)
        for _ in range(config.steps):
            again = model.vae.decode(model.vae.encode(pixels).latent_dist.mean, return_dict=False)[0]
            distance = perceptual_distance(model, pixels, originals)
            loss = (again - pixels).square().mean() + config.weight * (distance - config.allowed).clamp(min=0).mean()
            if not bool(torch.isfinite(loss)):
                raise RunFailed("purification by IMPRESS diverged: its loss is not finite; lower its rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                pixels.clamp_(-1, 1)
        purified.append(pixels.detach())
    return torch.cat(purified)
