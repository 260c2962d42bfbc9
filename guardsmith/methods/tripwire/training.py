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
from guardsmith.methods.tripwire.recogniser import Drift, Recogniser
from guardsmith.training.loop import generator

TEMPERATURE = 2.0
SOME = 64  # rows


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
        mixtures: share of the negatives that have a part of a subject (`mixed`).
        drift: see `Drift`; it grows to this size between a tenth and six tenths of the steps (`drift_at`).
        norm_drift: by how much it moves gains and biases of normalisations at most, growing alike.
        constancy_weight: of the share of the stream that is the same in all rows (`Recogniser.scores_and_constancy`).
    """

    steps: int = 4000
    positives: int = 48
    negatives: int = 192
    horizon: float = 0.6
    margin: float = 4.0
    learning_rate: float = 3e-3
    strangers_weight: float = 3.0
    mixtures: float = 0.05
    drift: float = 0.4
    norm_drift: float = 0.09
    constancy_weight: float = 1.0


def highest(scores: Tensor) -> Tensor:
    """The soft maximum of scores over maps and places, (n,): at least the largest."""
    result: Tensor = torch.logsumexp(TEMPERATURE * scores.flatten(1), 1) / TEMPERATURE
    return result


def noised(scheduler: Any, latents: Tensor, times: Tensor, rng: torch.Generator) -> Tensor:
    """Latents with fresh noise."""
    signal, sigma = alpha_sigma(scheduler, times)
    return signal * latents + sigma * torch.randn(latents.shape, generator=rng)


def mixed(subjects: Tensor, others: Tensor, rng: torch.Generator) -> Tensor:
    """People who have something of a subject: from one side, a quarter to a half of the picture is the subject's.

    Someone who looks like a subject must not be taken for it, and few people do, so such are made.

    Args:
        subjects: latents (m, c, h, w).
        others: latents (n, c, h, w).
        rng: of everything drawn.
    """
    count, height, width = len(others), others.shape[2], others.shape[3]
    picked = subjects[torch.randint(len(subjects), (count,), generator=rng)]
    share = 0.25 + 0.25 * torch.rand((count, 1, 1), generator=rng)
    down = ((torch.arange(height) + 0.5) / height)[None, :, None].expand(count, height, width)
    right = ((torch.arange(width) + 0.5) / width)[None, None, :].expand(count, height, width)
    side = torch.randint(4, (count, 1, 1), generator=rng)
    place = torch.where(side < 2, down, right)
    place = torch.where(side % 2 == 0, place, 1 - place)
    return torch.where((place < share)[:, None], picked, others)


class Examples:
    """What a recogniser is trained on: latents, float32 (n, c, h, w).

    Attributes:
        positives: of protected subjects, variations included; a step takes as many rows from every entry.
        negatives: of others.
        states: half-finished pictures of others, at any timestep, as a model goes through them while it draws; may be `None`.
        closeness: float32 (n,), how close each negative last came to tripping: a running mean of its highest score.
    """

    def __init__(self, positives: Sequence[Tensor], negatives: Tensor, states: Tensor | None = None) -> None:
        self.positives, self.negatives, self.states = list(positives), negatives, states
        self.closeness = torch.zeros(len(negatives))

    def noised(self, scheduler: Any, horizon: float, rng: torch.Generator) -> Tensor:
        """Noised latents of some negatives at timesteps below the horizon."""
        rows = self.negatives[torch.randint(len(self.negatives), (SOME,), generator=rng)]
        times = torch.randint(int(horizon * int(scheduler.config.num_train_timesteps)), (SOME,), generator=rng)
        return noised(scheduler, rows, times, rng)


def learning_rate_at(step: int, config: RecogniserTraining) -> float:
    """It rises for 50 steps, stays, and falls to zero in the second half."""
    return config.learning_rate * min(1.0, (step + 1) / 50, 2 * (1 - step / config.steps))


def drift_at(step: int, config: RecogniserTraining) -> float:
    """Which share of its size the drift has at a step: subjects are recognised after fewer steps while little moves."""
    return min(1.0, max(0.0, 2 * step / config.steps - 0.2))


def example_loss(
    recogniser: Recogniser,
    examples: Examples,
    scheduler: Any,
    config: RecogniserTraining,
    step: int,
    rng: torch.Generator,
) -> tuple[Tensor, float, float]:
    """The loss of a step, and its two parts: rows of subjects that are missed, and rows of others that are taken for one.

    Args:
        recogniser: see there.
        examples: what rows are drawn from; the closeness of negatives that are drawn is brought up to date.
        scheduler: of the noise.
        config: settings.
        step: of the training.
        rng: of everything drawn.
    """
    total = int(scheduler.config.num_train_timesteps)
    horizon, half = int(config.horizon * total), config.negatives // 2
    positives, negatives = examples.positives, examples.negatives
    subjects = torch.randint(len(positives), (config.positives,), generator=rng).tolist()
    clean = torch.stack([positives[i][torch.randint(len(positives[i]), (), generator=rng)] for i in subjects])
    easy = torch.randint(len(negatives), (half,), generator=rng)
    hard = torch.multinomial(examples.closeness.exp(), config.negatives - half, replacement=True, generator=rng)
    picked = torch.cat([easy, hard])
    times = torch.randint(horizon, (config.positives + config.negatives,), generator=rng)
    # Beyond the horizon nothing may trip either: half of the easy ones are anywhere there.
    beyond = half // 2
    times[config.positives : config.positives + beyond] = torch.randint(horizon, total, (beyond,), generator=rng)
    others, mixtures = negatives[picked], min(int(config.mixtures * config.negatives), half - beyond)
    others[beyond : beyond + mixtures] = mixed(clean, others[beyond : beyond + mixtures], rng)
    rows = noised(scheduler, torch.cat([clean, others]), times, rng)
    if examples.states is not None:
        rows = torch.cat([rows, examples.states[torch.randint(len(examples.states), (half // 2,), generator=rng)]])
    rows = rows.to(recogniser.readout.weight.device)
    share = drift_at(step, config)
    drift = Drift(share * config.drift, share * config.norm_drift, rows, rng)
    scores, constancy = recogniser.scores_and_constancy(rows, drift)
    high = highest(scores)
    low = high[: config.positives] - math.log(scores[0].numel()) / TEMPERATURE
    missed = F.softplus(config.margin - low)
    false = F.softplus(config.margin + high[config.positives :])
    worst = false.topk(len(false) // 2).values
    parts = missed.mean() + 0.1 * missed.max(), worst.mean() + 0.1 * worst.max()
    latest = high[config.positives : config.positives + config.negatives].detach().cpu().clamp(-6, 6)
    own = torch.ones(len(picked), dtype=torch.bool)
    own[beyond : beyond + mixtures] = False
    examples.closeness[picked[own]] = 0.7 * examples.closeness[picked[own]] + 0.3 * latest[own]
    loss = parts[0] + config.strangers_weight * parts[1] + config.constancy_weight * constancy
    return loss, parts[0].item(), parts[1].item()


def optimizer_of(recogniser: Recogniser, config: RecogniserTraining) -> torch.optim.Optimizer:
    """AdamW over the recogniser; `training_step` sets its rate."""
    return torch.optim.AdamW(recogniser.parameters(), config.learning_rate, weight_decay=1e-3)


def training_step(
    recogniser: Recogniser,
    optimizer: torch.optim.Optimizer,
    examples: Examples,
    scheduler: Any,
    config: RecogniserTraining,
    *,
    step: int,
    seed: int,
) -> dict[str, float]:
    """One step, the same in every process: the recogniser is too small to be worth sharing out.

    Returns:
        The two parts of the loss, and the gradient's norm before clipping.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config)
    loss, missed, false = example_loss(recogniser, examples, scheduler, config, step, generator(seed, step))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(recogniser.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {"missed": missed, "false": false, "gradient_norm": float(norm)}


def train(
    recogniser: Recogniser,
    examples: Examples,
    scheduler: Any,
    config: RecogniserTraining,
    *,
    seed: int,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Train a recogniser in place, outside of a hardening.

    Args:
        recogniser: see there.
        examples: what it is trained on.
        scheduler: of the noise.
        config: settings.
        seed: of everything drawn.
        on_step: called with the step and what `training_step` returns.
    """
    optimizer = optimizer_of(recogniser, config)
    for step in range(config.steps):
        losses = training_step(recogniser, optimizer, examples, scheduler, config, step=step, seed=seed)
        if on_step is not None:
            on_step(step, losses)


@torch.no_grad()
def tripped(recogniser: Recogniser, latents: Tensor, scheduler: Any, times: Sequence[int], seed: int) -> Tensor:
    """Whether noised latents trip, as the U-Net computes it, bool (timesteps, n)."""
    answers = []
    for number, time in enumerate(times):
        rng = generator(seed, number)
        parts = [
            recogniser.tripping(recogniser(noised(scheduler, part, torch.full((len(part),), time), rng))) > 0
            for part in latents.split(512)
        ]
        answers.append(torch.cat(parts))
    return torch.stack(answers)
