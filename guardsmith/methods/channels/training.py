"""How a recogniser is trained: by itself, on noised latents of protected subjects against those of many others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guardsmith.diffusion.losses import alpha_sigma
from guardsmith.methods.channels.recogniser import Recogniser
from guardsmith.training.loop import generator

TEMPERATURE = 2.0


@dataclass(frozen=True)
class RecogniserTraining:
    """Settings.

    Attributes:
        steps: of AdamW.
        positives: rows of protected subjects in a step.
        negatives: rows of others in a step, half of them the hardest.
        horizon: share of the timesteps, from the clean end, in which subjects are to be recognised.
        margin: how far scores are pushed from 0 on either side.
        learning_rate: AdamW's peak rate.
        strangers_weight: of negatives' losses.
    """

    steps: int = 1500
    positives: int = 48
    negatives: int = 192
    horizon: float = 0.5
    margin: float = 4.0
    learning_rate: float = 3e-3
    strangers_weight: float = 1.0


def highest(scores: Tensor) -> Tensor:
    """The soft maximum of scores over maps and places, (n,): at least the largest."""
    result: Tensor = torch.logsumexp(TEMPERATURE * scores.flatten(1), 1) / TEMPERATURE
    return result


def noised(scheduler: Any, latents: Tensor, times: Tensor, rng: torch.Generator) -> Tensor:
    """Latents with fresh noise."""
    signal, sigma = alpha_sigma(scheduler, times)
    return signal * latents + sigma * torch.randn(latents.shape, generator=rng)


def train(
    recogniser: Recogniser,
    positives: Sequence[Tensor],
    negatives: Tensor,
    scheduler: Any,
    config: RecogniserTraining,
    *,
    seed: int,
    states: tuple[Tensor, Tensor] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train a recogniser in place.

    Args:
        recogniser: see there.
        positives: latents of every protected subject, variations included, (n, c, h, w) each.
        negatives: latents of others, (m, c, h, w).
        scheduler: of the noise.
        config: settings.
        seed: of everything drawn.
        states: half-finished pictures that may not trip, (k, c, h, w) each with its timestep (k,), shown beside the negatives.
        on_step: called with step and loss.
    """
    optimizer = torch.optim.AdamW(recogniser.parameters(), config.learning_rate, weight_decay=1e-3, fused=True)
    hard = torch.zeros(len(negatives))
    total = int(scheduler.config.num_train_timesteps)
    horizon, half = int(config.horizon * total), config.negatives // 2
    for step in range(config.steps):
        rng = generator(seed, step)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / 50, 2 * (1 - step / config.steps))
        subjects = torch.randint(len(positives), (config.positives,), generator=rng).tolist()
        wanted = torch.stack([positives[i][torch.randint(len(positives[i]), (), generator=rng)] for i in subjects])
        easy = torch.randint(len(negatives), (half,), generator=rng)
        picked = torch.cat([easy, torch.multinomial(hard.exp(), config.negatives - half, generator=rng)])
        times = torch.randint(horizon, (config.positives + config.negatives,), generator=rng)
        # Beyond the horizon nothing may trip either: a fifth of the easy ones is anywhere there.
        beyond = config.positives + half // 5
        times[config.positives : beyond] = torch.randint(horizon, total, (half // 5,), generator=rng)
        rows = noised(scheduler, torch.cat([wanted, negatives[picked]]), times, rng)
        if states is not None:
            some = torch.randint(len(states[0]), (half // 2,), generator=rng)
            rows = torch.cat([rows, states[0][some]])
        scores = recogniser(rows)
        high = highest(scores)
        low = high[: config.positives] - math.log(scores[0].numel()) / TEMPERATURE
        missed = F.softplus(config.margin - low)
        false = F.softplus(config.margin + high[config.positives :])
        worst = false.topk(len(false) // 2).values
        loss = missed.mean() + 0.1 * missed.max() + config.strangers_weight * (worst.mean() + 0.1 * worst.max())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(recogniser.parameters(), 1.0)
        optimizer.step()
        seen = high[config.positives : config.positives + config.negatives].detach().clamp(-6, 6)
        hard[picked] = 0.7 * hard[picked] + 0.3 * seen
        if on_step is not None:
            on_step(step, loss.item())


@torch.no_grad()
def tripped(recogniser: Recogniser, latents: Tensor, scheduler: Any, times: Sequence[int], seed: int) -> Tensor:
    """Whether noised latents trip, as the U-Net computes it, bool (timesteps, n)."""
    found = []
    for number, time in enumerate(times):
        rng = generator(seed, number)
        parts = [
            recogniser.tripping(recogniser(noised(scheduler, part, torch.full((len(part),), time), rng))) > 0
            for part in latents.split(512)
        ]
        found.append(torch.cat(parts))
    return torch.stack(found)
