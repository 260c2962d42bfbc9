"""Restoration: shrink a picture, and let a super-resolution model draw it large again.

The second half of the red-teaming paper's CodeSR. Two kinds: a small network trained for the base at hand (`restorer`), or
diffusers' upscaling pipeline (`upscaler`, e.g. the Stable Diffusion x4 one, which the paper uses with 75 steps, guidance 9, noise
level 20 and "A photo of a ..."). The paper restores faces by CodeFormer before; no such model can be had as a package here, and
people who have one can run it on the files themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from guardsmith.core.errors import UserError
from guardsmith.core.images import to_pil, to_tensor
from guardsmith.core.sources import check_source
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.models.networks import load_network


class RestoreConfig(BaseModel):
    """Which model, and its settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    restorer: str | None = "builtin:avatar"
    """The embedded network, or a file of one; its own shrinking counts."""
    upscaler: str | None = None
    """Instead: folder or Hub id of a pipeline for diffusers' `StableDiffusionUpscalePipeline`, which enlarges four times."""
    steps: int = Field(75, gt=0)
    """upscaler: solver steps."""
    guidance: float = Field(9.0, ge=1)
    """upscaler: classifier-free guidance scale."""
    noise_level: int = Field(20, ge=0)
    """upscaler: noise that is added to the small picture."""
    prompt: str = "A photo of a {class_noun}"
    """upscaler: its prompt."""


class Restorer(nn.Module):
    """Pictures shrunk `shrink` times and drawn large again: an enlargement, and what residual blocks add to it.

    Args:
        shrink: how many times.
        width: channels.
        depth: residual blocks.
    """

    def __init__(self, shrink: int = 2, width: int = 48, depth: int = 8) -> None:
        super().__init__()
        self.shape = {"shrink": shrink, "width": width, "depth": depth}
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(depth)
        )
        self.last = nn.Conv2d(width, 3 * shrink * shrink, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def shrunk(self, pictures: Tensor) -> Tensor:
        """What it is given, (n, 3, h / shrink, w / shrink)."""
        return F.interpolate(pictures, scale_factor=1 / self.shape["shrink"], mode="area")

    def forward(self, small: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] -> (n, 3, shrink h, shrink w)."""
        inside = self.first(small)
        for block in self.blocks:
            inside = inside + block(inside)
        result = F.pixel_shuffle(self.last(inside), self.shape["shrink"])
        return F.interpolate(small, scale_factor=self.shape["shrink"], mode="bicubic", align_corners=False) + result


def load_restorer(source: str) -> Restorer:
    """The embedded restorer or one from a file.

    Raises:
        UserError: there is none, or the file is something else.
    """
    return load_network(Restorer, source, "name a file of one, or an upscaler")


def upscaled(images: Tensor, config: RestoreConfig, class_noun: str, seed: int) -> Tensor:
    """Pictures shrunk four times and enlarged by diffusers' pipeline.

    Raises:
        UserError: the pipeline cannot be had.
    """
    from diffusers import StableDiffusionUpscalePipeline

    check_source(str(config.upscaler), "upscaler")
    try:
        pipeline = StableDiffusionUpscalePipeline.from_pretrained(config.upscaler, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{config.upscaler}: this upscaler cannot be read ({reason})") from error
    pipeline.set_progress_bar_config(disable=True)
    small = F.interpolate(images, scale_factor=0.25, mode="area").clamp(-1, 1)
    result = pipeline(
        prompt=[config.prompt.format(class_noun=class_noun)] * len(images), image=[to_pil(each) for each in small],
        num_inference_steps=config.steps, guidance_scale=config.guidance, noise_level=config.noise_level,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(images))],
    ).images  # fmt: skip
    return to_tensor(list(result))


@torch.no_grad()
def purify(model: DiffusionModel, images: Tensor, config: RestoreConfig, *, class_noun: str, seed: int) -> Tensor:
    """Pictures after it, float32 (n, 3, h, w) in [-1, 1]; the base is not used.

    Raises:
        UserError: the model cannot be had, or none is named.
    """
    if config.upscaler is not None:
        return upscaled(images, config, class_noun, seed)
    if config.restorer is None:
        raise UserError("restoration needs a restorer or an upscaler; name one")
    restorer = load_restorer(config.restorer)
    result: Tensor = restorer(restorer.shrunk(images))
    return result.clamp(-1, 1)
