"""An adaptive attacker of protections that raise the attacker's starting loss (APDM, IMMA): DreamBooth with warm restarts.

Such a hardening leaves the weights where the usual rate leads nowhere good. This attacker's rate begins every cycle many times
higher and falls along a cosine to the usual one (SGDR, Loshchilov & Hutter 2017; hf.co/papers/1608.03983), so that it is thrown
out of there again and again; prior preservation keeps the class together meanwhile.
"""

from __future__ import annotations

import math

from pydantic import Field

from guardsmith.attacks import dreambooth
from guardsmith.attacks.dreambooth import AttackData, DreamBoothConfig, OnStep
from guardsmith.models.checkpoint import DiffusionModel


class WarmRestartsConfig(DreamBoothConfig):
    """DreamBooth's settings; `learning_rate` is where a cycle ends."""

    peak: float = Field(5.0, gt=1)
    """A cycle begins at so many times the rate."""
    cycle: int = Field(100, gt=1)
    """Steps of a cycle."""


def rate_at(config: WarmRestartsConfig, step: int) -> float:
    """The learning rate of a step."""
    fallen = 0.5 * (1 + math.cos(math.pi * (step % config.cycle) / (config.cycle - 1)))
    return config.learning_rate * (1 + (config.peak - 1) * fallen)


def attack(
    model: DiffusionModel, data: AttackData, config: WarmRestartsConfig, *, seed: int, on_step: OnStep | None = None
) -> tuple[DiffusionModel, list[float]]:
    """Personalize a copy of the model; returns it, frozen again, and the loss of every step."""
    return dreambooth.attack(
        model, data, config, seed=seed, on_step=on_step, rate_at=lambda step: rate_at(config, step)
    )
