"""Open weights: undo rescaling, by giving every row of every weight the length that it has in the public base.

Some protections multiply weights in one layer and divide them in the next, so that the function stays and an optimizer's steps
count less. An attacker who has the base can read off the factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guardsmith.attacks.adaptive.base import Removal, RemovalConfig, beside_base
from guardsmith.attacks.base import AttackData
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet


class NormaliseScalesConfig(RemovalConfig):
    """There is nothing to set."""


def rescaled(weight: Tensor, like: Tensor) -> Tensor:
    """A weight whose rows (for vectors: the whole) have the lengths of another's; rows of zeros stay."""
    rows = (weight.flatten(1) if weight.dim() > 1 else weight[None]).double()  # squares overflow in float32
    target = (like.flatten(1) if like.dim() > 1 else like[None]).double()
    length = rows.norm(dim=1, keepdim=True)
    factor = torch.where(length > 0, target.norm(dim=1, keepdim=True) / length, torch.ones_like(length))
    return (rows * factor).reshape(weight.shape).to(weight.dtype)


@torch.no_grad()
def normalise_scales(
    model: DiffusionModel,
    data: AttackData,
    config: NormaliseScalesConfig,
    *,
    seed: int = 0,
    base: DiffusionModel | None,
) -> DiffusionModel:
    """A copy of the model whose weights have the base's scales.

    Raises:
        ValueError: there is no base, or it has other weights.
    """
    own = with_own_unet(model)
    for parameter, original in beside_base(own, base):
        parameter.copy_(rescaled(parameter, original))
    return own


REMOVAL = Removal(normalise_scales, NormaliseScalesConfig, needs_base=True)
