"""DiffPure (Nie et al. 2022; hf.co/papers/2205.07460): noise a picture some way, and let a diffusion model take it back.

In the latents of the model under attack (`latent`, with or without a prompt), or in pixels with an unconditional model (`pixel`).
The way back is DDPM, step by step. Timesteps are of the model's own training schedule, of 1000, and pictures in [-1, 1]. (The
released code of the red-teaming paper counts timesteps of a chain of 250, and gives the pixel model pictures in [0, 1].)
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import DDPMScheduler
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from guardsmith.diffusion.latents import decode, encode
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.diffusion.sampling import guided
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.purifiers.pixel_model import load_pixel_model, taken_back, tiled
from guardsmith.training.loop import generator


class DiffPureConfig(BaseModel):
    """The red-teaming paper's settings of the latent one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: Literal["latent", "pixel"] = "latent"
    """Where."""
    timestep: int = Field(300, ge=0, le=999)
    """How far pictures are noised, of 1000 (the paper's pixel model: 400)."""
    prompt: str = "a photo of a {class_noun}, high quality, highres"
    """latent: its prompt; empty for the paper's variant without a prompt."""
    guidance: float = Field(7.5, ge=1)
    """latent: classifier-free guidance scale; without a prompt there is none."""
    pixel_model: str = "google/ddpm-ema-celebahq-256"
    """pixel: folder or Hub id of an unconditional diffusion model (diffusers: UNet2DModel and scheduler)."""
    stride: float = Field(0.5, gt=0, le=1)
    """pixel: larger pictures are taken in tiles, so many of a tile's sides apart, averaged where they overlap."""


@torch.no_grad()
def latent(model: DiffusionModel, images: Tensor, config: DiffPureConfig, class_noun: str, seed: int) -> Tensor:
    """Pictures noised and taken back in the model's latents."""
    rng = generator(seed)
    bank, scheduler = PromptBank(model), DDPMScheduler.from_config(model.scheduler.config)
    prompt = config.prompt.format(class_noun=class_noun)
    context = bank.encode([prompt]).expand(len(images), -1, -1)
    empty = bank.encode([""]).expand(len(images), -1, -1)
    latents = encode(model, images).mean
    noise = torch.randn(latents.shape, generator=rng)
    latents = scheduler.add_noise(latents, noise, torch.full((len(images),), config.timestep))
    for t in range(config.timestep, -1, -1):
        out = guided(model, latents, t, context, empty, config.guidance if prompt else 1)
        latents = scheduler.step(out, t, latents, generator=rng, return_dict=False)[0]
    return decode(model, latents).clamp(-1, 1)


def purify(model: DiffusionModel, images: Tensor, config: DiffPureConfig, *, class_noun: str, seed: int) -> Tensor:
    """Pictures after it, float32 (n, 3, h, w) in [-1, 1].

    Raises:
        UserError: the pixel model cannot be had.
    """
    if config.space == "latent":
        return latent(model, images, config, class_noun, seed)
    pixel_model = load_pixel_model(config.pixel_model)
    return tiled(
        pixel_model, images, lambda tiles: taken_back(pixel_model, tiles, config.timestep, seed), stride=config.stride
    )
