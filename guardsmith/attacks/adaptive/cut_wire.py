"""An adaptive attacker of Tripwire who has read how it works: find the wire's neurons, cut them, then DreamBooth.

A wire is four neurons of the last feed-forward layer of the middle block whose weights, on either side, are orders larger than
the others'. Without them there is no surge, the alarm stays silent, and what is left is the distilled model. This attacker
needs the weights and a text editor's worth of knowledge, and no pictures: Tripwire is a lock on the door, not a wall.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import FeedForward
from pydantic import Field

from guardsmith.attacks import dreambooth
from guardsmith.attacks.dreambooth import AttackData, DreamBoothConfig, OnStep
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet


class CutWireConfig(DreamBoothConfig):
    """DreamBooth's settings."""

    outlier: float = Field(1e4, gt=1)
    """A neuron is part of a wire if the lengths of its gate's weights and of its output weights, multiplied, are so many times
    those of the median neuron."""


@torch.no_grad()
def cut(unet: Any, outlier: float) -> int:
    """Take such neurons out of a denoiser, in place; returns how many there were."""
    count = 0
    for layer in unet.modules():
        if not isinstance(layer, FeedForward):
            continue
        widen, narrow = layer.net[0].proj, layer.net[2]
        # Rescaling makes all output weights large, so either side counts.
        size = widen.weight[-narrow.in_features :].float().norm(dim=1) * narrow.weight.float().norm(dim=0)
        outliers = size > outlier * size.median()
        narrow.weight[:, outliers] = 0
        count += int(outliers.sum())
    return count


def attack(
    model: DiffusionModel, data: AttackData, config: CutWireConfig, *, seed: int, on_step: OnStep | None = None
) -> tuple[DiffusionModel, list[float]]:
    """Personalize a copy of the model without its wires; returns it, frozen again, and the loss of every step."""
    own = with_own_unet(model)
    cut(own.unet, config.outlier)
    return dreambooth.attack(own, data, config, seed=seed, on_step=on_step)
