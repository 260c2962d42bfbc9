"""RID, the real-time identity defender (Guo et al. 2024; hf.co/papers/2412.09844): one network cloaks a picture in one pass.

    x' = clip(x + e tanh(G(x)))

G is a small vision transformer over patches. It is trained, per base m, with a score-distillation loss that raises the denoising
loss without going through the U-Net,

    g_m = -w(t) (eps_m(z_t, t, c0) - eps)     w(t) = 1 - ab_t     c0 = " "
    L_m = 1/2 mean || z_t - sg(z_t - g_m) ||^2,   whose gradient on z_t is g_m over its size

and, on a share of the pictures, to give what an optimization-based cloak gives: L_reg = MSE(G(x), x_adv - x). The total is the
mean of L_reg and 4/3 L_m. (The paper finds the two together best; the released script multiplies L_reg by nothing, conditions the
transformer on zeros, and feeds Stable Diffusion 1's encoders tokens of 2.1. Here the condition is what it amounts to, a trained
scale, shift and gate for each block.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from guardsmith.attacks.base import AttackData
from guardsmith.cloaks.pixels import PIXEL, OnStep, PixelConfig, sampled_latents
from guardsmith.core.errors import UserError
from guardsmith.diffusion.losses import add_noise, alpha_sigma, noise_samples, score_residual
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.models.networks import load_network
from guardsmith.training.loop import TrainingLoop, generator, optimizer_step


class RidConfig(PixelConfig):
    """A trained defender, and how far it may go."""

    defender: str = "builtin:avatar"
    """File that `guardsmith train-rid` wrote, or the embedded one."""

    def total(self, models: int, pictures: int) -> int:
        """Batches."""
        return -(-pictures // self.batch_size)


class RidTraining(BaseModel):
    """How a defender is built and trained; the paper's settings, for 512 px."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: float = Field(8.0, gt=0, le=255)
    """Largest change of a pixel that it is trained with, of 255. (The paper's 6, 8, 12 are of a range twice as large.)"""
    patch: int = Field(16, gt=0)
    """Side of a patch in pixels."""
    width: int = Field(1152, gt=0)
    """Numbers per patch inside."""
    depth: int = Field(14, gt=0)
    """Blocks."""
    heads: int = Field(8, gt=0)
    """Attention heads."""
    steps: int = Field(100_000, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(8, gt=0)
    """Pictures per step, and as many with a pair."""
    learning_rate: float = Field(3e-4, gt=0)
    """AdamW's rate; it falls linearly to nothing."""
    warm_up: int = Field(500, ge=0)
    """Steps in which it rises before."""
    weight_decay: float = Field(1e-2, ge=0)
    """AdamW's."""
    prompt: str = " "
    """Prompt for the bases."""
    adversarial_weight: float = Field(4 / 3, ge=0)
    """Of the score-distillation loss of every base."""
    regression_weight: float = Field(10.0, ge=0)
    """Of the distance to the pairs; 0 for no pairs."""
    pair_share: float = Field(0.1, gt=0, le=1)
    """Share of the pictures that are cloaked by optimization first."""
    pair_cloak: str = "aspl"
    """By which cloak."""
    pair_params: dict[str, Any] = {}
    """Its parameters."""
    pair_group: int = Field(4, gt=0)
    """Pictures that are cloaked together, as if of one subject."""


class Block(nn.Module):
    """Attention and a two-layer network, each behind a normalisation with learnt scale and shift, and a gate that begins shut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.gates = nn.Parameter(torch.zeros(2, width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, tokens, width) -> the same."""
        n, count, width = tokens.shape
        q, k, v = self.qkv(self.norms[0](tokens)).reshape(n, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, count, width)
        tokens = tokens + self.gates[0] * self.out(attention)
        inside: Tensor = self.narrow(F.gelu(self.widen(self.norms[1](tokens)), approximate="tanh"))
        return tokens + self.gates[1] * inside


def grid_positions(side: int, width: int) -> Tensor:
    """Sine and cosine of the place of every patch of a square, (side * side, width)."""
    quarter = width // 4
    rates = 1e4 ** (-torch.arange(quarter) / max(quarter - 1, 1))
    place = torch.arange(side)[:, None] * rates
    waves = torch.cat([place.sin(), place.cos()], 1)
    both = torch.cat([waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)], 2)
    return F.pad(both.reshape(side * side, -1), (0, width - 4 * quarter))


class Defender(nn.Module):
    """G: pictures (n, 3, size, size) in [-1, 1] -> their change as a share of the budget, in (-1, 1).

    Args:
        size: side of the pictures, a multiple of `patch`.
        patch: side of a patch.
        width: numbers per patch, a multiple of `heads`.
        depth: blocks.
        heads: attention heads.
    """

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.shape = {"size": size, "patch": patch, "width": width, "depth": depth, "heads": heads}
        self.side, self.patch = size // patch, patch
        self.cut = nn.Conv2d(3, width, patch, stride=patch)
        self.register_buffer("positions", grid_positions(self.side, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, 3 * patch * patch)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        """See the class."""
        tokens = self.cut(pictures).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        n, side, patch = len(pictures), self.side, self.patch
        patches = self.last(self.norm(tokens)).reshape(n, side, side, 3, patch, patch)
        change: Tensor = patches.permute(0, 3, 1, 4, 2, 5).reshape(n, 3, side * patch, side * patch)
        return change.tanh()


def applied(defender: nn.Module, pictures: Tensor, budget: float) -> Tensor:
    """Cloaked pictures, with gradients to the defender."""
    change: Tensor = budget * PIXEL * defender(pictures)
    return (pictures + change).clamp(-1, 1)


def load_defender(source: str) -> Defender:
    """The embedded defender or one from a file.

    Raises:
        UserError: there is none, or the file is something else.
    """
    return load_network(Defender, source, "train one with `guardsmith train-rid`")


@torch.no_grad()
def cloak(
    models: Sequence[DiffusionModel], data: AttackData, config: RidConfig, *, seed: int, on_step: OnStep | None = None
) -> Tensor:
    """Cloaked pictures, float32 (n, 3, h, w) in [-1, 1]; models and seed are not used.

    Args:
        models: give the size only.
        data: pictures; whom they show does not matter.
        config: settings.
        seed: of nothing.
        on_step: called after every batch.

    Raises:
        UserError: there is no such defender, or it is for pictures of another size.
    """
    defender = load_defender(config.defender)
    size = data.images.shape[-1]
    if defender.shape["size"] != size:
        raise UserError(
            f"{config.defender} cloaks pictures of {defender.shape['size']} pixels, and the base draws {size}"
        )
    cloaked_parts = []
    for part in data.images.split(config.batch_size):
        cloaked_parts.append(applied(defender, part, config.budget))
        if on_step is not None:
            on_step(float((cloaked_parts[-1] - part).abs().mean() / PIXEL))
    return torch.cat(cloaked_parts)


def adversarial_loss(model: DiffusionModel, pictures: Tensor, context: Tensor, rng: torch.Generator) -> Tensor:
    """L_m: a scalar whose gradient on z_t is g_m = -(1 - ab_t) (eps_m - eps) over the number of its entries.

    Args:
        model: the base m.
        pictures: cloaked, with gradients to the defender.
        context: of the prompt c0, (1, tokens, width).
        rng: of timesteps, noise and the VAE's sample.
    """
    latents = sampled_latents(model, pictures, rng)
    rows = noise_samples(latents, context, rng, steps=int(model.scheduler.config.num_train_timesteps))
    noisy = add_noise(model.scheduler, rows.latents, rows.noise, rows.timesteps)
    weight = alpha_sigma(model.scheduler, rows.timesteps)[1].square()
    target = noisy.detach() + weight * score_residual(model.unet, model.scheduler, rows)
    loss: Tensor = 0.5 * (noisy - target).square().mean()
    return loss


def rate_at(step: int, config: RidTraining) -> float:
    """The learning rate: up in the warm-up, then down to nothing."""
    if step < config.warm_up:
        return config.learning_rate * (step + 1) / config.warm_up
    return config.learning_rate * (config.steps - step) / max(config.steps - config.warm_up, 1)


def train(
    models: Sequence[DiffusionModel],
    pictures: Tensor,
    pairs: Tensor,
    config: RidTraining,
    *,
    seed: int,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[Defender, list[dict[str, float]]]:
    """Train a defender; goes on from the checkpoint if there is one, to the same weights.

    Args:
        models: the bases (RID-Ensemble where there are several), all of one size.
        pictures: float32 (n, 3, size, size) in [-1, 1].
        pairs: cloaked copies of the first of them, likewise; may be empty.
        config: settings.
        seed: of everything random.
        checkpoint: file.
        checkpoint_every: steps between saves.
        on_step: called after every step.

    Returns:
        The defender, frozen, and what every step showed.

    Raises:
        UserError: its shape is impossible.
        RunFailed: it diverged.
    """
    size = models[0].image_size
    if size % config.patch or config.width % config.heads:
        raise UserError(
            f"a patch of {config.patch} has to fit into {size} pixels, and {config.heads} heads into the width"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        defender = Defender(size, config.patch, config.width, config.depth, config.heads)
    parameters = list(defender.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    contexts = [PromptBank(model).encode([config.prompt]) for model in models]
    loop = TrainingLoop(
        "RID", config.steps, modules={"defender": defender}, optimizers={"optimizer": optimizer}, checkpoint=checkpoint,
        checkpoint_every=checkpoint_every, on_step=on_step,
    )  # fmt: skip
    reach = config.budget * PIXEL
    for step in loop:
        rng = generator(seed, step)
        optimizer.param_groups[0]["lr"] = rate_at(step, config)
        batch = pictures[torch.randint(len(pictures), (config.batch_size,), generator=rng)]
        cloaked = applied(defender, batch, config.budget)
        losses = [
            config.adversarial_weight * adversarial_loss(model, cloaked, context, rng)
            for model, context in zip(models, contexts, strict=True)
        ]
        numbers = {"adversarial": sum(float(loss.detach()) for loss in losses) / len(losses)}
        if config.regression_weight and len(pairs):
            rows = torch.randint(len(pairs), (config.batch_size,), generator=rng)
            apart = F.mse_loss(reach * defender(pictures[rows]), pairs[rows] - pictures[rows])
            losses.append(config.regression_weight * apart)
            numbers["regression"] = float(apart.detach())
        torch.stack(losses).mean().backward()
        norm = optimizer_step(optimizer, parameters)
        numbers["change"] = float((cloaked.detach() - batch).abs().mean() / PIXEL)
        loop.finish_step(step, numbers, finite_weights=math.isfinite(norm))
    return defender.eval().requires_grad_(False), loop.history
