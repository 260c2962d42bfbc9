"""Open weights: average the weights with those of a public sibling, such as the base itself."""

from __future__ import annotations

import torch
from pydantic import Field

from guardsmith.attacks.adaptive.base import Removal, RemovalConfig, beside_base
from guardsmith.attacks.base import AttackData
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet


class MergeWeightsConfig(RemovalConfig):
    """How much of the sibling."""

    share: float = Field(0.5, gt=0, lt=1)
    """Share of the sibling's weights in the result."""


@torch.no_grad()
def merge_weights(
    model: DiffusionModel,
    data: AttackData,
    config: MergeWeightsConfig,
    *,
    seed: int = 0,
    base: DiffusionModel | None,
) -> DiffusionModel:
    """A copy of the model whose denoiser lies between it and the base.

    Raises:
        ValueError: there is no base, or it has other weights.
    """
    own = with_own_unet(model)
    for parameter, original in beside_base(own, base):
        parameter.lerp_(original.to(parameter), config.share)
    return own


REMOVAL = Removal(merge_weights, MergeWeightsConfig, needs_base=True)
