"""DDSPure: denoised smoothing (Carlini et al. 2023; hf.co/papers/2206.10550) as a purifier.

Noise as strong as the cloak is allowed to be is added, at the timestep whose noise-to-signal ratio is that, and the pixel model
takes it back:

    t*:  (1 - ab_t) / ab_t = sigma^2          sigma in the range of pictures, [-1, 1]: 2 r / 255

(The released code of the red-teaming paper takes r / 255 for sigma, and the index of a chain of 250 for that of 1000.)
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.purifiers.pixel_model import load_pixel_model, taken_back, tiled


class DdsPureConfig(BaseModel):
    """The paper's settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: float = Field(11.0, gt=0, le=255)
    """What the cloak is thought to have been allowed, of 255."""
    stride: float = Field(0.5, gt=0, le=1)
    """Tiles begin so many of their sides apart."""
    pixel_model: str = "google/ddpm-ema-celebahq-256"
    """Folder or Hub id of an unconditional diffusion model (diffusers: UNet2DModel and scheduler)."""


def timestep_of(alphas_bar: Tensor, sigma: float) -> int:
    """The timestep whose noise-to-signal ratio is nearest to sigma squared."""
    return int(((1 - alphas_bar) / alphas_bar - sigma**2).abs().argmin())


def purify(model: DiffusionModel, images: Tensor, config: DdsPureConfig, *, class_noun: str, seed: int) -> Tensor:
    """Pictures after it, float32 (n, 3, h, w) in [-1, 1]; model and class noun are not used.

    Raises:
        UserError: the pixel model cannot be had.
    """
    pixel_model = load_pixel_model(config.pixel_model)
    timestep = timestep_of(torch.as_tensor(pixel_model.scheduler.alphas_cumprod), 2 * config.budget / 255)
    return tiled(
        pixel_model, images, lambda tiles: taken_back(pixel_model, tiles, timestep, seed), stride=config.stride
    )
