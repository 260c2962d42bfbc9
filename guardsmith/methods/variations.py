"""Pictures of a subject as other photographs of it might have come out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def variations(images: Tensor, copies: int, rng: torch.Generator) -> Tensor:
    """The pictures (n, 3, h, w), and `copies` versions of each, as other photographs of the same might have come out.

    Mirrored half of the time, turned by up to 10 degrees, zoomed by up to 10 %, shifted by up to 6 %, and recoloured:
    every channel is multiplied by up to 1 +- 0.15 and moved by up to +- 0.15.
    """
    every = [images]
    for _ in range(copies):
        every.append(drawn_variation(len(images), rng).of(images))
    return torch.cat(every).clamp(-1, 1)


@dataclass(frozen=True)
class Variation:
    """How each of n pictures is varied.

    Attributes:
        frames: where the pixels come from, (n, 2, 3).
        gain: on the channels, less 1, (n, 3, 1, 1).
        shift: likewise.
    """

    frames: Tensor
    gain: Tensor
    shift: Tensor

    def __getitem__(self, some: slice) -> Variation:
        """That of some of the pictures."""
        return Variation(self.frames[some], self.gain[some], self.shift[some])

    def of(self, images: Tensor) -> Tensor:
        """The pictures (n, 3, h, w), varied; a value may lie outside of their range."""
        places = F.affine_grid(self.frames, list(images.shape), align_corners=False)
        moved = F.grid_sample(images, places, padding_mode="border", align_corners=False)
        return moved * (1 + self.gain) + self.shift


def drawn_variation(count: int, rng: torch.Generator) -> Variation:
    """One version of each of `count` pictures."""
    frame = torch.zeros(count, 2, 3)
    zoom = 1 + 0.1 * (2 * torch.rand(count, generator=rng) - 1)
    angle = math.radians(10) * (2 * torch.rand(count, generator=rng) - 1)
    mirror = torch.randint(2, (count,), generator=rng) * 2.0 - 1
    frame[:, 0, 0], frame[:, 0, 1] = zoom * angle.cos() * mirror, -zoom * angle.sin()
    frame[:, 1, 0], frame[:, 1, 1] = zoom * angle.sin() * mirror, zoom * angle.cos()
    frame[:, :, 2] = 0.12 * (2 * torch.rand(count, 2, generator=rng) - 1)  # the picture spans 2
    gain, shift = 0.15 * (2 * torch.rand(2, count, 3, 1, 1, generator=rng) - 1)
    return Variation(frame, gain, shift)
