"""Gaussian blur, a kernel of five pixels.

(The red-teaming paper's code blurs by a radius of five, which is far more.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from guardsmith.models.checkpoint import DiffusionModel


class GaussianConfig(BaseModel):
    """How much."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel: int = Field(5, gt=0)
    """Side of the kernel in pixels, odd."""
    deviation: float | None = Field(None, gt=0)
    """In pixels; left out, 0.3 ((kernel - 1) / 2 - 1) + 0.8, as OpenCV has it."""


def blurred(pixels: Tensor, kernel: int, deviation: float) -> Tensor:
    """Pictures (n, 3, h, w) blurred by a kernel of so many pixels; borders are mirrored; has gradients."""
    place = torch.arange(kernel) - (kernel - 1) / 2
    weights = torch.exp(-0.5 * (place / deviation) ** 2)
    weights = (weights / weights.sum()).to(pixels)
    channels, half = pixels.shape[1], kernel // 2
    padded = F.pad(pixels, (half, half, half, half), mode="reflect")
    along = F.conv2d(padded, weights.expand(channels, 1, 1, kernel), groups=channels)
    return F.conv2d(along, weights[:, None].expand(channels, 1, kernel, 1), groups=channels)


def purify(model: DiffusionModel, images: Tensor, config: GaussianConfig, *, class_noun: str, seed: int) -> Tensor:
    """Pictures blurred, float32 (n, 3, h, w) in [-1, 1]; nothing else is used.

    Raises:
        ValueError: the kernel is even.
    """
    if config.kernel % 2 == 0:
        raise ValueError(f"a kernel has an odd side, not {config.kernel}")
    deviation = config.deviation or 0.3 * ((config.kernel - 1) / 2 - 1) + 0.8
    return blurred(images, config.kernel, deviation).clamp(-1, 1)
