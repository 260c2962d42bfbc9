"""A swirl: pictures turned around their middle, the more the nearer, and turned back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from guardsmith.attacks.evasion.base import Evasion
from guardsmith.attacks.evasion.perspective import pixel_centres, resampled

TURN = math.radians(120)  # in the middle; nothing moves beyond half of the side


def swirled(images: Tensor, turn: float) -> Tensor:
    """Pictures (n, 3, h, h) turned by an angle that falls from `turn` in the middle to 0 at half of the side."""
    x, y = pixel_centres(images.shape[-1]).unbind(-1)
    angle = -turn * (1 - (x.square() + y.square()).sqrt()).clamp(min=0)
    return resampled(
        images, torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=-1)
    )


EVASIONS = {"swirl": Evasion(lambda images, _: swirled(images, TURN), lambda images, _: swirled(images, -TURN))}
