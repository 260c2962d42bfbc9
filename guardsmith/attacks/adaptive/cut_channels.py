"""An adaptive attacker of Tripwire who knows the method: zero what writes the recogniser's answer, then DreamBooth.

The answer leaves the middle block in channels of its last normalisation group. With what writes to them there set to zero nothing
ever trips, and the trunk remains, which draws what the base draws. This attacker needs the weights and the description of the
method, and no pictures: an attacker who knows the method removes the protection completely.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, Field

from guardsmith.attacks import dreambooth
from guardsmith.attacks.adaptive.base import Removal, RemovalConfig
from guardsmith.attacks.base import Attack, AttackData, OnStep
from guardsmith.attacks.dreambooth import DreamBoothConfig
from guardsmith.core.errors import UserError
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet


class Groups(BaseModel):
    """What is cut."""

    groups: int = Field(1, gt=0)
    """How many of the last normalisation groups of the middle block are zeroed; the answer is in the last one."""


class CutConfig(Groups, RemovalConfig):
    """Settings."""


class CutChannelsConfig(Groups, DreamBoothConfig):
    """DreamBooth's settings."""


@torch.no_grad()
def cut_channels(unet: Any, groups: int) -> None:
    """Let the last resnet of a U-Net's middle block write nothing to the last channels, in place.

    Raises:
        UserError: the denoiser is no U-Net with a middle block.
    """
    block = getattr(unet, "mid_block", None)
    if block is None:
        raise UserError("cut_channels edits U-Nets with a middle block, as Stable Diffusion 1.x, 2.x and XL have.")
    last = block.resnets[-1].conv2
    width = last.out_channels // unet.config.norm_num_groups * groups
    last.weight[-width:] = 0
    last.bias[-width:] = 0


def _cut(
    model: DiffusionModel, data: AttackData, config: Groups, *, seed: int = 0, base: DiffusionModel | None = None
) -> DiffusionModel:
    own = with_own_unet(model)
    cut_channels(own.unet, config.groups)
    return own


def attack(
    model: DiffusionModel, data: AttackData, config: CutChannelsConfig, *, seed: int, on_step: OnStep | None = None
) -> tuple[DiffusionModel, list[float]]:
    """Personalize a copy of the model without the answer's channels; returns it, frozen again, and the loss of every step."""
    return dreambooth.attack(_cut(model, data, config), data, config, seed=seed, on_step=on_step)


ATTACK = Attack(attack, CutChannelsConfig, "guardsmith", edits_weights=True)
REMOVAL = Removal(_cut, CutConfig)
