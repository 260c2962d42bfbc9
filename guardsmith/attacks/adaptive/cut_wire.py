"""An adaptive attacker of Tripwire who knows the method: zero the trigger neurons, then DreamBooth.

A trigger is four neurons of the last feed-forward layer of the middle block whose weights, on either side, are orders of
magnitude larger than the others'. With them zeroed no activation saturates, the output override never starts, and the distilled
model remains. This attacker needs the weights and the description of the method, and no pictures: an attacker who knows the
method removes the protection completely.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import FeedForward
from pydantic import Field

from guardsmith.attacks import dreambooth
from guardsmith.attacks.base import Attack, AttackData, OnStep
from guardsmith.attacks.dreambooth import DreamBoothConfig
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet


class CutWireConfig(DreamBoothConfig):
    """DreamBooth's settings."""

    outlier: float = Field(1e4, gt=1)
    """A neuron counts as a trigger neuron if the product of the norms of its gate's weights and of its output weights is so many
    times that of the median neuron."""


@torch.no_grad()
def zero_neurons(unet: Any, outlier: float) -> int:
    """Zero the trigger neurons of a denoiser, in place; returns their number."""
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
    """Personalize a copy of the model without its trigger neurons; returns it, frozen again, and the loss of every step."""
    own = with_own_unet(model)
    zero_neurons(own.unet, config.outlier)
    return dreambooth.attack(own, data, config, seed=seed, on_step=on_step)


ATTACK = Attack(attack, CutWireConfig, "guardsmith", edits_weights=True)
