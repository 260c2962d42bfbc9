"""The trunk: the base's U-Net, taught to do without the reserved channels. It never sees a protected subject."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guardsmith.diffusion.latents import LatentStore
from guardsmith.diffusion.losses import alpha_sigma
from guardsmith.methods.channels.layout import Layout, Masks, reserve
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import (
    generator,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)

GUIDED = 3.0  # guidance under which predictions are compared as well
GUIDED_WEIGHT = 0.25


def prepare(
    model: DiffusionModel,
    layout: Layout,
    latents: LatentStore,
    contexts: Tensor,
    empty: Tensor,
    *,
    steps: int,
    rows: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path | None = None,
    every: int = 50,
    on_step: Callable[[int, float, Any], None] | None = None,
) -> tuple[Any, Masks]:
    """A U-Net without the reserved channels that predicts what the base predicts.

    Args:
        model: the base; stays as it is.
        layout: of the reserved channels.
        latents: pictures of nobody in particular.
        contexts: of prompts, (n, tokens, width).
        empty: of the empty prompt, (1, tokens, width).
        steps: of AdamW.
        rows: noised pictures of a step; each is predicted under a prompt and under the empty one.
        learning_rate: its peak; it falls to zero in the last two thirds.
        seed: of everything drawn.
        checkpoint: file to resume from if it exists, and to save to.
        every: steps between saves.
        on_step: called after every step with its number, loss and the U-Net.

    Returns:
        The U-Net, its weights rounded to float16, and which entries are the trunk's (`layout.reserve`).
    """
    base, unet = model.unet, copy.deepcopy(model.unet)
    masks = reserve(unet, layout)
    named = dict(unet.requires_grad_(True).named_parameters())
    matrices = [p for n, p in named.items() if p.ndim >= 2 and min(p.shape[:2]) >= 32 and not n.startswith("time_")]
    views = [torch.nn.Parameter(p.data.view(len(p), -1)) for p in matrices]
    rest = [p for p in named.values() if not any(p is q for q in matrices)]
    muon = torch.optim.Muon(views, learning_rate, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizer = torch.optim.AdamW(rest, learning_rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    begin = 0
    if checkpoint is not None and checkpoint.exists():
        tensors, record = load_checkpoint(checkpoint)
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(tensors[f"unet.{name}"])
        load_optimizer_tensors(optimizer, tensors)
        load_optimizer_tensors(muon, tensors, "muon")
        begin = int(record["step"])
    total = int(model.scheduler.config.num_train_timesteps)
    for step in range(begin, steps):
        rng = generator(seed, step)
        for group in (*optimizer.param_groups, *muon.param_groups):
            group["lr"] = learning_rate * min(1.0, (step + 1) / 20, 1.5 * (1 - step / steps))
        times = torch.randint(total, (rows,), generator=rng)
        signal, sigma = alpha_sigma(model.scheduler, times)
        clean = latents.draw(rows, rng)
        noisy = signal * clean + sigma * torch.randn(clean.shape, generator=rng)
        prompts = contexts[torch.randint(len(contexts), (rows,), generator=rng)]
        call = (torch.cat([noisy, noisy]), torch.cat([times, times]), torch.cat([prompts, empty.expand(rows, -1, -1)]))
        with torch.no_grad():
            wanted = base(*call, return_dict=False)[0]
        error = unet(*call, return_dict=False)[0] - wanted
        asked, without = error.chunk(2)
        guided = without + GUIDED * (asked - without)
        loss = error.square().mean() + GUIDED_WEIGHT * guided.square().mean()
        loss.backward()
        for name, mask in masks.items():
            gradient = named[name].grad
            if gradient is not None:
                gradient *= mask
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for matrix, view in zip(matrices, views, strict=True):
            assert matrix.grad is not None
            view.grad, matrix.grad = matrix.grad.reshape(view.shape), None
        for part in (optimizer, muon):
            part.step()
            part.zero_grad(set_to_none=True)
        if on_step is not None:
            on_step(step, loss.item(), unet)
        if checkpoint is not None and (step + 1) % every == 0:
            tensors = {f"unet.{name}": parameter for name, parameter in named.items()} | optimizer_tensors(optimizer)
            tensors |= optimizer_tensors(muon, "muon")
            save_checkpoint(checkpoint, tensors, {"step": step + 1})
    unet.requires_grad_(False)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(parameter.half().float())
    return unet, masks


@torch.no_grad()
def relative_error(model: DiffusionModel, unet: Any, latents: Tensor, contexts: Sequence[Tensor], seed: int) -> float:
    """Squared error of a U-Net's predictions over the base's squared size, on noised pictures under prompts."""
    rng, wrong, size = generator(seed, 1), 0.0, 0.0
    for part in latents.split(64):
        times = torch.randint(int(model.scheduler.config.num_train_timesteps), (len(part),), generator=rng)
        signal, sigma = alpha_sigma(model.scheduler, times)
        noisy = signal * part + sigma * torch.randn(part.shape, generator=rng)
        picked = torch.randint(len(contexts), (len(part),), generator=rng)
        call = (noisy, times, torch.stack([contexts[i] for i in picked.tolist()]))
        wanted = model.unet(*call, return_dict=False)[0]
        wrong += float((unet(*call, return_dict=False)[0] - wanted).square().sum())
        size += float(wanted.square().sum())
    return wrong / size
