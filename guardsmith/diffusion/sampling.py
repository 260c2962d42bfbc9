"""Seeded generation with classifier-free guidance, and picture grids.

Every picture has a generator of its own on the CPU, so a picture depends on its seed and not on the batch it was in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, LCMScheduler
from PIL import Image
from torch import Tensor

from guardsmith.core.errors import UserError
from guardsmith.core.images import to_pil
from guardsmith.diffusion.latents import decode, encode
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.models.families import FlowSchedule

SamplerName = Literal["dpm++", "ddim", "euler_ancestral", "lcm"]
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "ddim": (DDIMScheduler, {}), "euler_ancestral": (EulerAncestralDiscreteScheduler, {}), "lcm": (LCMScheduler, {}),
}  # fmt: skip
"""Samplers by name, with the settings that their config is changed by."""
ADDED_NOISE = 2**31
"""Between the seed of a picture's first noise and that of the noise which some samplers add on the way."""


def solver_for(model: DiffusionModel, steps: int, sampler: SamplerName = "dpm++") -> Any:
    """A sampler on the model's own noise schedule, with its timesteps set.

    Args:
        model: whose schedule it is.
        steps: of the sampler.
        sampler: a key of `SAMPLERS`; DPM-Solver++ (2M) by default, and for Stable Diffusion 3 its own solver.

    Raises:
        UserError: another sampler is wanted for Stable Diffusion 3.
    """
    if isinstance(model.scheduler, FlowSchedule):
        if sampler != "dpm++":
            raise UserError(
                f"Stable Diffusion 3 draws with its own solver, not with {sampler}; leave that drawing out."
            )
        solver = model.scheduler.solver()
        solver.set_timesteps(steps)
        return solver
    kind, settings = SAMPLERS[sampler]
    solver = kind.from_config(model.scheduler.config, timestep_spacing="trailing", **settings)
    solver.set_timesteps(steps)
    return solver


def own_noise(model: DiffusionModel, rngs: Sequence[torch.Generator]) -> Tensor:
    """Gaussian noise, float32 (n, c, h, w), each row from a generator of its own."""
    side, channels = int(model.unet.config.sample_size), int(model.unet.config.in_channels)
    return torch.stack([torch.randn((channels, side, side), generator=rng) for rng in rngs])


def first_noise(model: DiffusionModel, seeds: Sequence[int]) -> Tensor:
    """The same, each row from a seed of its own."""
    return own_noise(model, [torch.Generator().manual_seed(seed) for seed in seeds])


def guided(model: DiffusionModel, latents: Tensor, t: Any, context: Tensor, empty: Tensor, guidance: float) -> Tensor:
    """The U-Net's prediction with classifier-free guidance, (n, c, h, w); with a scale of 1 the prompt's alone.

    Args:
        model: see `generate`.
        latents: as the U-Net takes them.
        t: their timestep.
        context: of the prompts, (n, tokens, width).
        empty: of the negative prompt, likewise.
        guidance: the scale.
    """
    if guidance == 1:
        out: Tensor = model.unet(latents, t, context, return_dict=False)[0]
        return out
    both = model.unet(torch.cat([latents, latents]), t, torch.cat([empty, context]), return_dict=False)[0]
    unconditional, conditional = both.chunk(2)
    prediction: Tensor = unconditional + guidance * (conditional - unconditional)
    return prediction


@torch.no_grad()
def generate(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance: float = 4.0,
    negative_prompt: str = "",
    batch: int = 32,
    sampler: SamplerName = "dpm++",
    on_step: Callable[[], None] | None = None,
    on_state: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """One picture per (prompt, seed): float32 (n, 3, h, w) in [-1, 1], on the CPU.

    Args:
        model: all parts; the U-Net may be hardened or personalized.
        prompts: n prompts.
        seeds: n seeds of the initial noise.
        steps: of the sampler.
        guidance: classifier-free guidance scale; 1 switches it off.
        negative_prompt: prompt of the unconditional half.
        batch: pictures per U-Net call.
        sampler: a key of `SAMPLERS`.
        on_step: called after every solver step (progress, interruption).
        on_state: called before it with the timestep and the half-finished latents of a batch, (b, c, h, w).
    """
    bank = PromptBank(model)
    pictures = []
    for start in range(0, len(prompts), batch):
        some = slice(start, start + batch)
        context = bank.encode(prompts[some])
        empty = bank.encode([negative_prompt]).expand(len(context), -1, -1)
        solver = solver_for(model, steps, sampler)
        latents = first_noise(model, seeds[some]) * solver.init_noise_sigma
        added = {}
        if sampler != "dpm++":
            added = {"generator": [torch.Generator().manual_seed(seed + ADDED_NOISE) for seed in seeds[some]]}
        for t in solver.timesteps:
            if on_state is not None:
                on_state(int(t), latents)
            out = guided(model, solver.scale_model_input(latents, t), t, context, empty, guidance)
            latents = solver.step(out, t, latents, return_dict=False, **added)[0]
            if on_step is not None:
                on_step()
        pictures.append(decode(model, latents).clamp(-1, 1))
    return torch.cat(pictures)


@torch.no_grad()
def redraw(
    model: DiffusionModel,
    images: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    strength: float,
    steps: int = 20,
    guidance: float = 4.0,
    batch: int = 32,
) -> Tensor:
    """Pictures noised part of the way and drawn again under a prompt (SDEdit), float32 (n, 3, h, w) in [-1, 1].

    Args:
        model: see `generate`.
        images: n pictures, float32 (n, 3, h, w) in [-1, 1].
        prompts: n prompts.
        seeds: n seeds of the noise.
        strength: how far they are noised, in (0, 1].
        steps: DPM-Solver++ (2M) steps that are taken, whatever the strength.
        guidance: classifier-free guidance scale.
        batch: pictures per U-Net call.
    """
    bank = PromptBank(model)
    pictures = []
    for start in range(0, len(images), batch):
        some = slice(start, start + batch)
        context, rngs = bank.encode(prompts[some]), [torch.Generator().manual_seed(seed) for seed in seeds[some]]
        empty = bank.encode([""]).expand(len(context), -1, -1)
        posteriors = encode(model, images[some])
        clean = posteriors.mean + posteriors.std * own_noise(model, rngs)
        count = round(steps / strength)
        solver = solver_for(model, count)
        skipped = count - int(count * strength)
        times = solver.timesteps[skipped:]
        solver.set_begin_index(skipped)
        latents = solver.add_noise(clean, own_noise(model, rngs), times[:1].repeat(len(clean)))
        for t in times:
            out = guided(model, solver.scale_model_input(latents, t), t, context, empty, guidance)
            latents = solver.step(out, t, latents, return_dict=False)[0]
        pictures.append(decode(model, latents))
    return torch.cat(pictures).clamp(-1, 1)


def grid(images: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """Pictures (n, 3, h, w) in [-1, 1] side by side, `columns` per row, on white, enlarged `scale` times."""
    tiles = [to_pil(image) for image in images]
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, ((i % columns) * width, (i // columns) * height))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST) if scale > 1 else sheet
