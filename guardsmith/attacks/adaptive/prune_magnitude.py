"""Open weights: zero the channels whose weights are outliers of their layer, as hidden triggers often are.

For every linear layer and convolution, output channels (rows) and input channels (columns) whose length is many times the median
of their layer are set to zero. No picture, no forward pass and no other model is needed.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from guardsmith.attacks.adaptive.base import Removal, RemovalConfig, weight_layers
from guardsmith.attacks.base import AttackData
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet


class PruneMagnitudeConfig(RemovalConfig):
    """What an outlier is."""

    outlier: float = Field(8.0, gt=1)
    """A channel is one if the length of its weights is so many times the median of its layer."""


def outliers(lengths: Tensor, factor: float) -> Tensor:
    """Which of these lengths (k,) are more than `factor` times their median, bool (k,)."""
    return lengths > factor * lengths.median()


@torch.no_grad()
def prune_magnitude(
    model: DiffusionModel,
    data: AttackData,
    config: PruneMagnitudeConfig,
    *,
    seed: int = 0,
    base: DiffusionModel | None = None,
) -> DiffusionModel:
    """A copy of the model without such channels."""
    own = with_own_unet(model)
    for layer in weight_layers(own.unet).values():
        squares = layer.weight.double().square()  # in float32 those of large triggers overflow
        squares = squares.flatten(2).sum(2) if squares.dim() > 2 else squares
        rows = outliers(squares.sum(1).sqrt(), config.outlier)
        columns = outliers(squares.sum(0).sqrt(), config.outlier)
        layer.weight[rows] = 0
        layer.weight[:, columns] = 0
        if layer.bias is not None:
            layer.bias[rows] = 0
    return own


REMOVAL = Removal(prune_magnitude, PruneMagnitudeConfig)
