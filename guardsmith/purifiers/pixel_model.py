"""An unconditional diffusion model of pixels, for the purifiers that need one: read with diffusers, used tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guardsmith.core.errors import UserError
from guardsmith.core.sources import check_source
from guardsmith.models.checkpoint import BUILTIN
from guardsmith.training.loop import generator


class PixelModel(NamedTuple):
    """Such a model.

    Attributes:
        unet: predicts noise (or velocity); (n, 3, size, size) in [-1, 1] noised, timestep.
        scheduler: DDPM, of its training.
        size: side of its pictures.
    """

    unet: Any
    scheduler: Any
    size: int


@lru_cache(maxsize=2)
def load_pixel_model(source: str) -> PixelModel:
    """A folder or Hub id with `UNet2DModel` and scheduler, at its top or in the folders `unet` and `scheduler`; `builtin:avatar`.

    Raises:
        UserError: there is none, it is pickled, or it cannot be read.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    if source.startswith("builtin:"):
        source = str(BUILTIN / "pixels" / source.removeprefix("builtin:"))
    else:
        check_source(source, "pixel diffusion model")
    place = Path(source).expanduser()
    inside = (place / "unet").is_dir() if place.exists() else False
    try:
        unet = UNet2DModel.from_pretrained(source, use_safetensors=True, **({"subfolder": "unet"} if inside else {}))
        scheduler = DDPMScheduler.from_pretrained(source, **({"subfolder": "scheduler"} if inside else {}))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source}: this pixel diffusion model cannot be read ({reason}); name a folder or Hub id of one (UNet2DModel, "
            "safetensors)"
        ) from error
    return PixelModel(unet.float().eval().requires_grad_(False), scheduler, int(unet.config.sample_size))


@torch.no_grad()
def taken_back(model: PixelModel, pixels: Tensor, timestep: int, seed: int) -> Tensor:
    """Pictures noised to a timestep and taken back by DDPM, step by step, (n, 3, size, size) in [-1, 1]."""
    if not (pixels.min() >= -1.001 and pixels.max() <= 1.001):
        raise ValueError(f"pictures must be in [-1, 1], not [{pixels.min():.2f}, {pixels.max():.2f}]")
    rng = generator(seed)
    noise = torch.randn(pixels.shape, generator=rng)
    noisy = model.scheduler.add_noise(pixels, noise, torch.full((len(pixels),), timestep))
    for t in range(timestep, -1, -1):
        out = model.unet(noisy, t, return_dict=False)[0]
        noisy = model.scheduler.step(out, t, noisy, generator=rng, return_dict=False)[0]
    pure: Tensor = noisy.clamp(-1, 1)
    return pure


def tiled(model: PixelModel, images: Tensor, work: Callable[[Tensor], Tensor], *, stride: float) -> Tensor:
    """Work on pictures of any size tile by tile, averaged where tiles overlap; the last tiles end at the borders.

    Args:
        model: gives the tiles' size.
        images: (n, 3, h, w) in [-1, 1]; sides shorter than a tile are scaled up to it and back.
        work: tiles (n, 3, size, size) -> the same.
        stride: how far apart tiles begin, as a share of their side.
    """
    height, width = images.shape[2:]
    size = model.size
    if min(height, width) < size:
        share = size / min(height, width)
        scaled = torch.nn.functional.interpolate(
            images, (round(height * share), round(width * share)), mode="bicubic", align_corners=False
        ).clamp(-1, 1)
        result = tiled(model, scaled, work, stride=stride)
        return torch.nn.functional.interpolate(result, (height, width), mode="area").clamp(-1, 1)
    total, count = torch.zeros_like(images), torch.zeros_like(images[:1, :1])
    apart = max(1, round(size * stride))
    for top in sorted({*range(0, height - size, apart), height - size}):
        for left in sorted({*range(0, width - size, apart), width - size}):
            place = (slice(None), slice(None), slice(top, top + size), slice(left, left + size))
            total[place] += work(images[place])
            count[place] += 1
    return total / count
