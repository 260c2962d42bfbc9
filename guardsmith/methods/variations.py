"""Pictures of a subject as other photographs of it might have come out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def variations(images: Tensor, copies: int, rng: torch.Generator) -> Tensor:
    """The pictures (n, 3, h, w), and `copies` versions of each, as other photographs of the same might have come out.

    Mirrored half of the time, turned by up to 10 degrees, zoomed by up to 10 %, shifted by up to 6 %, and recoloured:
    every channel is multiplied by up to 1 +- 0.15 and moved by up to +- 0.15.
    """
    every, n = [images], len(images)
    for _ in range(copies):
        frame = torch.zeros(n, 2, 3)
        zoom = 1 + 0.1 * (2 * torch.rand(n, generator=rng) - 1)
        angle = math.radians(10) * (2 * torch.rand(n, generator=rng) - 1)
        mirror = torch.randint(2, (n,), generator=rng) * 2.0 - 1
        frame[:, 0, 0], frame[:, 0, 1] = zoom * angle.cos() * mirror, -zoom * angle.sin()
        frame[:, 1, 0], frame[:, 1, 1] = zoom * angle.sin() * mirror, zoom * angle.cos()
        frame[:, :, 2] = 0.12 * (2 * torch.rand(n, 2, generator=rng) - 1)  # the picture spans 2
        places = F.affine_grid(frame, list(images.shape), align_corners=False)
        moved = F.grid_sample(images, places, padding_mode="border", align_corners=False)
        gain, shift = 0.15 * (2 * torch.rand(2, n, 3, 1, 1, generator=rng) - 1)
        every.append(moved * (1 + gain) + shift)
    return torch.cat(every).clamp(-1, 1)
