"""A swirl: pictures turned around their middle, the more the nearer, and turned back."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from guardsmith.attacks.evasion.base import Evasion

TURN = math.radians(120)  # in the middle; nothing moves beyond half of the side


def swirled(images: Tensor, turn: float) -> Tensor:
    """Pictures (n, 3, h, h) turned by an angle that falls from `turn` in the middle to 0 at half of the side."""
    side = images.shape[-1]
    centres = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    angle = -turn * (1 - (x.square() + y.square()).sqrt()).clamp(min=0)
    grid = torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=-1)
    moved = F.grid_sample(images, grid.expand(len(images), -1, -1, -1).to(images), mode="bicubic", align_corners=False)
    return moved.clamp(-1, 1)


EVASIONS = {"swirl": Evasion(lambda images, _: swirled(images, TURN), lambda images, _: swirled(images, -TURN))}
