"""An adaptive attacker of protections that raise the attacker's starting loss (APDM, IMMA): DreamBooth with warm restarts.

Such a hardening leaves the weights in a region where the usual rate makes little progress. This attacker's rate begins every
cycle many times higher and falls along a cosine to the usual one (SGDR, Loshchilov & Hutter 2017; hf.co/papers/1608.03983), so
that every cycle can leave that region; prior preservation keeps the class intact meanwhile.
"""

from __future__ import annotations

import math

from pydantic import Field

from guardsmith.attacks import dreambooth
from guardsmith.attacks.base import Attack, AttackData, OnStep
from guardsmith.attacks.dreambooth import DreamBoothConfig
from guardsmith.models.checkpoint import DiffusionModel


class WarmRestartsConfig(DreamBoothConfig):
    """DreamBooth's settings; `learning_rate` is where a cycle ends."""

    peak: float = Field(5.0, gt=1)
    """Rate at the beginning of a cycle, as a multiple of `learning_rate`."""
    cycle: int = Field(100, gt=1)
    """Steps of a cycle."""


def rate_at(config: WarmRestartsConfig, step: int) -> float:
    """The learning rate of a step."""
    share = 0.5 * (1 + math.cos(math.pi * (step % config.cycle) / (config.cycle - 1)))
    return config.learning_rate * (1 + (config.peak - 1) * share)


def attack(
    model: DiffusionModel, data: AttackData, config: WarmRestartsConfig, *, seed: int, on_step: OnStep | None = None
) -> tuple[DiffusionModel, list[float]]:
    """Personalize a copy of the model; returns it, frozen again, and the loss of every step."""
    return dreambooth.attack(
        model, data, config, seed=seed, on_step=on_step, rate_at=lambda step: rate_at(config, step)
    )


ATTACK = Attack(attack, WarmRestartsConfig, "hf.co/papers/1608.03983")
