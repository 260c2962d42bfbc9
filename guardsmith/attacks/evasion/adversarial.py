"""Small adversarial noise: pixels moved within a budget so that the model under attack sees other features in them.

A recogniser inside a denoiser reads what the denoiser computes of a noised picture. The change is found by projected gradient
ascent on how far the activations behind the denoiser's middle block move from those of the clean picture, relative to their size,
at the same timesteps and noise. The attacker needs the weights for that, or a public model of the same family.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guardsmith.attacks.evasion.base import Evasion, EvasionContext
from guardsmith.diffusion.losses import add_noise
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import generator

BUDGET = 8 * 2 / 255  # largest change of a pixel, in the range of pictures
STEPS = 40
STEP = 1 * 2 / 255
LATEST = 0.6  # noised up to this share of the timesteps: later ones show too little to recognise


def middle_features(
    model: DiffusionModel, latents: Tensor, timesteps: Tensor, noise: Tensor, context: Tensor
) -> Tensor:
    """Activations behind the denoiser's middle block, one row per picture, with gradients to the latents.

    Raises:
        ValueError: the denoiser has no middle block (Stable Diffusion 3).
    """
    block = getattr(model.unet, "mid_block", None)
    if block is None:
        raise ValueError("adversarial_noise needs a U-Net; this model's denoiser has no middle block")
    captured: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        captured.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(keep)
    try:
        noisy = add_noise(model.scheduler, latents, noise, timesteps)
        model.unet(noisy, timesteps, context.expand(len(latents), -1, -1), return_dict=False)
    finally:
        handle.remove()
    return captured[0].float().flatten(1)


def disturbed(images: Tensor, context: EvasionContext) -> Tensor:
    """Pictures within 8 of 255 of those given, per pixel, whose features are far from theirs.

    Raises:
        ValueError: there is no model to compute features with, or it has no middle block.
    """
    model = context.model
    if model is None:
        raise ValueError("adversarial_noise needs the model under attack")
    prompt = PromptBank(model).encode([""])
    latest = int(LATEST * int(model.scheduler.config.num_train_timesteps))
    pixels = images + STEP * torch.randn(images.shape, generator=generator(context.seed)).sign().to(images)
    with torch.no_grad():
        clean = model.posterior(images)[0]
    for step in range(STEPS):
        rng = generator(context.seed, step)
        timesteps = torch.randint(latest, (len(images),), generator=rng)
        noise = torch.randn(clean.shape, generator=rng)
        with torch.no_grad():
            before = middle_features(model, clean, timesteps, noise, prompt)
        pixels = pixels.clamp(-1, 1).detach().requires_grad_()
        after = middle_features(model, model.posterior(pixels)[0], timesteps, noise, prompt)
        apart = ((after - before).norm(dim=1) / before.norm(dim=1)).sum()
        [gradient] = torch.autograd.grad(apart, pixels)
        ascent = pixels.detach() + STEP * torch.nan_to_num(gradient).sign()
        pixels = images + (ascent - images).clamp(-BUDGET, BUDGET)
    return pixels.clamp(-1, 1)


EVASIONS = {"adversarial_noise": Evasion(disturbed, needs_model=True)}
