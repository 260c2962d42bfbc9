"""GrIDPure (Zhao et al. 2024; hf.co/papers/2312.00084): many small steps of DiffPure in pixels, tile by tile.

    x <- (1 - share) DiffPure(x) + share x          `rounds` times; tiles overlap and are averaged

Timesteps are of the pixel model's own schedule, of 1000, as in GrIDPure's code; tiles end at the borders, so that no corner is
left out.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.purifiers.pixel_model import load_pixel_model, taken_back, tiled


class GridPureConfig(BaseModel):
    """The paper's settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rounds: int = Field(10, gt=0)
    """How often."""
    timestep: int = Field(10, ge=0, le=999)
    """How far pictures are noised each time, of 1000."""
    share: float = Field(0.1, ge=0, lt=1)
    """Of the picture before, that is mixed in each time."""
    stride: float = Field(0.5, gt=0, le=1)
    """Tiles begin so many of their sides apart."""
    pixel_model: str = "google/ddpm-ema-celebahq-256"
    """Folder or Hub id of an unconditional diffusion model (diffusers: UNet2DModel and scheduler)."""


def purify(model: DiffusionModel, images: Tensor, config: GridPureConfig, *, class_noun: str, seed: int) -> Tensor:
    """Pictures after it, float32 (n, 3, h, w) in [-1, 1]; model and class noun are not used.

    Raises:
        UserError: the pixel model cannot be had.
    """
    pixel_model = load_pixel_model(config.pixel_model)
    for j in range(config.rounds):

        def work(tiles: Tensor) -> Tensor:
            return taken_back(pixel_model, tiles, config.timestep, seed + j)  # noqa: B023 (called at once)

        pure = tiled(pixel_model, images, work, stride=config.stride)
        images = (1 - config.share) * pure + config.share * images
    return images.clamp(-1, 1)
