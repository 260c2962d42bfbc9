"""Open weights: average the weights with those of a public sibling, such as the base itself."""

from __future__ import annotations

import torch
from pydantic import Field

from guardsmith.attacks.adaptive.base import Removal, RemovalConfig
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
    if base is None:
        raise ValueError("merge_weights needs the public base")
    theirs = dict(base.unet.named_parameters())
    own = with_own_unet(model)
    for name, parameter in own.unet.named_parameters():
        if name not in theirs or theirs[name].shape != parameter.shape:
            raise ValueError(
                f"the base has no weight {name} of this shape; name the base that the model was hardened from"
            )
        parameter.lerp_(theirs[name].to(parameter), config.share)
    return own


REMOVAL = Removal(merge_weights, MergeWeightsConfig, needs_base=True)
