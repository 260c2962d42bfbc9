"""Edge maps: what the ControlNet and the T2I-Adapter of the embedded base are steered by, and how well a picture follows one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EDGE = 0.15
"""An edge is where the gradient of the luminance reaches this share of its largest in the picture."""


def gradient(pictures: Tensor) -> Tensor:
    """Size of the luminance's gradient (Sobel), float32 (n, 1, h, w), of pictures (n, 3, h, w); any range of values."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    grey = F.pad((pictures.float() * weights).sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).view(1, 1, 3, 3)
    magnitude: Tensor = (F.conv2d(grey, across) ** 2 + F.conv2d(grey, across.mT) ** 2).sqrt()
    return magnitude


def edge_maps(pictures: Tensor) -> Tensor:
    """White edges on black, as ControlNets for edges are given them.

    Args:
        pictures: float (n, 3, h, w), any range of values.

    Returns:
        float32 (n, 3, h, w), zeros and ones.
    """
    slopes = gradient(pictures)
    largest = slopes.amax((1, 2, 3), keepdim=True)
    return ((slopes >= EDGE * largest) & (largest > 0)).float().repeat(1, 3, 1, 1)


def followed(pictures: Tensor, maps: Tensor) -> Tensor:
    """How well pictures follow edge maps: the correlation of their gradients with the map, both blurred by a pixel.

    Args:
        pictures: float (n, 3, h, w); one that holds NaN or infinity, or has no edges at all, follows nothing.
        maps: of the same size, from `edge_maps`.

    Returns:
        float32 (n,), in [-1, 1]; 0 is as good as an unrelated picture.
    """
    finite = torch.isfinite(pictures).flatten(1).all(1)
    pairs = [F.avg_pool2d(each, 3, 1).flatten(1) for each in (gradient(torch.nan_to_num(pictures)), maps[:, :1])]
    edges, reference = (each - each.mean(1, keepdim=True) for each in pairs)
    size = edges.norm(dim=1) * reference.norm(dim=1)
    return torch.where(finite & (size > 1e-6), (edges * reference).sum(1) / size.clamp_min(1e-6), torch.zeros(()))
