"""Less detail: heavy blur, pixels as large as a sixteenth of the side, four values per channel.

Nothing gives the detail back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from guardsmith.attacks.evasion.base import Evasion

DEVIATION = 1 / 24  # of the blur, as a share of the side
CELLS = 16  # large pixels along each side
VALUES = 4  # per channel


def blurred(images: Tensor) -> Tensor:
    """Gaussian blur with a deviation of a 24th of the side, five times that of the `blurred` data of an attack."""
    deviation = DEVIATION * images.shape[-1]
    reach = round(3 * deviation)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation).square()).to(images)
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    smooth = F.conv2d(F.pad(images, (reach, reach, reach, reach), mode="reflect"), weights, groups=3)
    return F.conv2d(smooth, weights.transpose(2, 3), groups=3).clamp(-1, 1)


def pixelated(images: Tensor) -> Tensor:
    """Pictures in 16 x 16 squares of one colour each, the mean of what was there."""
    return F.interpolate(F.adaptive_avg_pool2d(images, CELLS), images.shape[-2:], mode="nearest")


def posterized(images: Tensor) -> Tensor:
    """Every channel rounded to one of four values, evenly spread over the range."""
    return ((images + 1) / 2 * (VALUES - 1)).round() / (VALUES - 1) * 2 - 1


EVASIONS = {
    "blur": Evasion(lambda images, _: blurred(images)),
    "pixelate": Evasion(lambda images, _: pixelated(images)),
    "posterize": Evasion(lambda images, _: posterized(images)),
}
