"""Open weights: round every weight to few bits, as tools do that make models smaller; small details of weights are lost."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from guardsmith.attacks.adaptive.base import Removal, RemovalConfig, weight_layers
from guardsmith.attacks.base import AttackData
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet


class QuantizeWeightsConfig(RemovalConfig):
    """How coarse."""

    bits: int = Field(4, ge=2, le=8)
    """Bits of every weight; each output channel has a scale of its own."""


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A weight rounded to the nearest of 2^bits - 1 values, evenly spread and symmetric about zero, for each of its rows."""
    rows = weight.flatten(1)
    largest = 2 ** (bits - 1) - 1
    scale = rows.abs().amax(dim=1, keepdim=True) / largest
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ((rows / safe).round() * safe).reshape(weight.shape)


@torch.no_grad()
def quantize_weights(
    model: DiffusionModel,
    data: AttackData,
    config: QuantizeWeightsConfig,
    *,
    seed: int = 0,
    base: DiffusionModel | None = None,
) -> DiffusionModel:
    """A copy of the model whose linear layers and convolutions have rounded weights (stored as float32)."""
    own = with_own_unet(model)
    for layer in weight_layers(own.unet).values():
        layer.weight.copy_(rounded(layer.weight, config.bits))
    return own


REMOVAL = Removal(quantize_weights, QuantizeWeightsConfig)
