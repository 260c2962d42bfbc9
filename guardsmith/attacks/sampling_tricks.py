"""Ways of drawing with a personalized model, some of which avoid what a protection does at some of the timesteps.

    finish_with_base  the personalized model draws the rough picture, the public base the details
    start_with_base   the public base draws the rough picture, the personalized model the details
    one_step          one prediction of the clean picture from pure noise, at the largest timestep
    average_two       the weights of two personalized models, of two seeds, averaged
    ddim, euler_ancestral, lcm, few_steps, many_steps, unguided, strongly_guided
                      other samplers, numbers of steps and guidance scales (`SETTINGS`)

A protection that recognises its subject below some timestep only is avoided by not asking it there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from guardsmith.core.errors import UserError
from guardsmith.core.seeds import SECOND_MODEL_OFFSET
from guardsmith.diffusion.latents import decode
from guardsmith.diffusion.losses import clean_coefficients
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.diffusion.sampling import first_noise, generate, guided
from guardsmith.models.checkpoint import DiffusionModel

TrickName = Literal[
    "finish_with_base", "start_with_base", "one_step", "average_two", "ddim", "euler_ancestral", "lcm", "few_steps",
    "many_steps", "unguided", "strongly_guided",
]  # fmt: skip
TRICKS: tuple[str, ...] = get_args(TrickName)
NEEDS_BASE = ("finish_with_base", "start_with_base")
SETTINGS: dict[str, dict[str, Any]] = {
    "ddim": {"sampler": "ddim", "steps": 20}, "euler_ancestral": {"sampler": "euler_ancestral", "steps": 20},
    "lcm": {"sampler": "lcm", "steps": 4}, "few_steps": {"steps": 4}, "many_steps": {"steps": 50},
    "unguided": {"guidance": 1.0}, "strongly_guided": {"guidance": 12.0},
}  # fmt: skip
"""Arguments of `generate` for ways that are settings of the sampler."""
HAND_OVER = 0.5
"""Share of the timesteps at which the other model takes over."""
SECOND_SEED = SECOND_MODEL_OFFSET


class TwoDenoisers(torch.nn.Module):
    """A denoiser that is one network above a timestep, and another one from there down.

    Args:
        early: called while the timestep is above the boundary.
        late: called otherwise.
        boundary: a timestep.
    """

    def __init__(self, early: Any, late: Any, boundary: float) -> None:
        super().__init__()
        self.early, self.late, self.boundary = early, late, boundary
        self.config = early.config

    def forward(self, latents: Tensor, timestep: Any, context: Tensor, **options: Any) -> Any:
        """The chosen network's prediction; all rows are at one timestep."""
        denoiser = self.early if float(torch.as_tensor(timestep).flatten()[0]) > self.boundary else self.late
        return denoiser(latents, timestep, context, **options)


def handed_over(early: DiffusionModel, late: DiffusionModel, share: float, words: DiffusionModel) -> DiffusionModel:
    """A model that draws with two others in turn.

    Args:
        early: whose denoiser draws first.
        late: whose denoiser takes over.
        share: of the timesteps, at which it does, in (0, 1).
        words: whose text encoder and tokenizer read the prompts.
    """
    both = copy.copy(words)
    both.unet = TwoDenoisers(early.unet, late.unet, share * int(words.scheduler.config.num_train_timesteps))
    return both


def averaged(one: DiffusionModel, other: DiffusionModel) -> DiffusionModel:
    """A copy of the first model whose denoiser has the mean of both models' weights.

    Raises:
        UserError: the two have different weights (adapters of one only, other widths).
    """
    own = copy.copy(one)
    own.unet = copy.deepcopy(one.unet)
    theirs = dict(other.unet.named_parameters())
    mine = dict(own.unet.named_parameters())
    if mine.keys() != theirs.keys():
        raise UserError("two models can be averaged only if they have the same weights")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.lerp_(theirs[name], 0.5)
    return own


@torch.no_grad()
def one_step(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance: float,
    negative_prompt: str = "",
    batch: int = 32,
) -> Tensor:
    """The clean pictures that a model predicts from pure noise in one call, float32 (n, 3, h, w) in [-1, 1].

    Args:
        model: all parts.
        prompts: n prompts.
        seeds: n seeds of the noise.
        guidance: classifier-free guidance scale.
        negative_prompt: prompt of the unconditional half.
        batch: pictures per U-Net call.
    """
    bank = PromptBank(model)
    timestep = torch.tensor([int(model.scheduler.config.num_train_timesteps) - 1])
    pictures = []
    for start in range(0, len(prompts), batch):
        some = slice(start, start + batch)
        context = bank.encode(prompts[some])
        empty = bank.encode([negative_prompt]).expand(len(context), -1, -1)
        noise = first_noise(model, seeds[some])
        prediction = guided(model, noise, timestep[0], context, empty, guidance)
        image_share, output_share = (share.to(noise) for share in clean_coefficients(model.scheduler, timestep))
        pictures.append(decode(model, image_share * noise - output_share * prediction).clamp(-1, 1))
    return torch.cat(pictures)


def draw(
    model: DiffusionModel,
    trick: str | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    base: DiffusionModel | None,
    hand_over: float = HAND_OVER,
    negative_prompt: str = "",
    sampling: dict[str, Any],
) -> Tensor:
    """Pictures drawn by a personalized model with one of these tricks, or as usual.

    Args:
        model: personalized (with `average_two`, the average already).
        trick: one of `TRICKS`, or `None`.
        prompts: n prompts.
        seeds: n seeds.
        base: the public model, for the tricks that hand over.
        hand_over: share of the timesteps at which they do.
        negative_prompt: what is not asked for.
        sampling: further arguments of `generate`.

    Returns:
        float32 (n, 3, h, w) in [-1, 1].

    Raises:
        ValueError: the trick needs a base and there is none.
    """
    if trick == "one_step":
        settings = {key: sampling[key] for key in ("guidance", "batch") if key in sampling}
        return one_step(model, prompts, seeds, negative_prompt=negative_prompt, **settings)
    sampling = sampling | SETTINGS.get(trick or "", {})
    if trick in NEEDS_BASE:
        if base is None:
            raise ValueError(f"{trick} needs the public base")
        first, second = (model, base) if trick == "finish_with_base" else (base, model)
        model = handed_over(first, second, hand_over, model)
    return generate(model, prompts, seeds, negative_prompt=negative_prompt, **sampling)


__all__ = [
    "HAND_OVER",
    "NEEDS_BASE",
    "SECOND_SEED",
    "SETTINGS",
    "TRICKS",
    "TrickName",
    "averaged",
    "draw",
    "handed_over",
    "one_step",
]
