"""The latent store: every picture goes through the VAE once; each step samples from the kept posterior.

Personalization scripts encode every picture again at every step. The posterior of an unaugmented picture never changes,
so keeping its mean and deviation gives the same distribution of latents and saves all those encodings
(96,000 per run in APDM's code).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from guardsmith.models.checkpoint import DiffusionModel


@dataclass(frozen=True)
class LatentStore:
    """Posteriors of n pictures, already multiplied by the VAE's scaling factor.

    Attributes:
        mean: float32 (n, c, h, w).
        std: float32 (n, c, h, w).
    """

    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Latents of the pictures `rows` (int64 (k,)), float32 (k, c, h, w), drawn anew from their posteriors."""
        noise = torch.randn(self.mean[rows].shape, generator=generator)
        return self.mean[rows] + self.std[rows] * noise

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Latents of `count` pictures picked at random with replacement."""
        return self.sample(torch.randint(len(self), (count,), generator=generator), generator)


PIXELS = 2**16  # that go through the VAE at once: a picture of 512 x 512 takes a gibibyte or two by itself


def few(pictures: Tensor, side: int) -> tuple[Tensor, ...]:
    """Pictures (or their latents) of that side in pixels, as many at a time as the VAE is given."""
    parts: tuple[Tensor, ...] = pictures.split(max(1, PIXELS // side**2))
    return parts


@torch.no_grad()
def encode(model: DiffusionModel, images: Tensor) -> LatentStore:
    """Encode pictures (n, 3, h, w), float in [-1, 1], h and w the model's image size."""
    means, deviations = zip(*(model.posterior(chunk) for chunk in few(images, images.shape[-1])), strict=True)
    return LatentStore(torch.cat(means), torch.cat(deviations))


@torch.no_grad()
def decode(model: DiffusionModel, latents: Tensor) -> Tensor:
    """Pictures of latents, float32 (n, 3, h, w), not clipped; without gradients, as `encode`."""
    return torch.cat([model.decode(chunk) for chunk in few(latents, model.image_size)])
