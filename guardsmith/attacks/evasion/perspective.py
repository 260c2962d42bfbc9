"""A perspective view of the picture, as if it were photographed from the side, and the view back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from guardsmith.attacks.evasion.base import Evasion

CORNERS = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
SEEN_AT = torch.tensor([[-0.95, -0.9], [0.7, -0.6], [0.8, 0.95], [-0.6, 0.7]])  # where the corners are in the view


def homography(source: Tensor, target: Tensor) -> Tensor:
    """The 3 x 3 matrix that maps four points (4, 2) onto four others."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source.tolist(), target.tolist(), strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    solution = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.tensor(values, dtype=torch.float64))
    return torch.cat([solution, solution.new_ones(1)]).reshape(3, 3).float()


def pixel_centres(side: int) -> Tensor:
    """Where the pixels of a square picture are, as (x, y) in (-1, 1), float32 (side, side, 2)."""
    centres = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], dim=-1)


def resampled(images: Tensor, places: Tensor) -> Tensor:
    """Pictures (n, 3, h, h) whose pixels come from `places`, (x, y) as in `pixel_centres`; what lies outside is mid-grey."""
    grid = places.expand(len(images), -1, -1, -1).to(images)
    return F.grid_sample(images, grid, mode="bicubic", align_corners=False).clamp(-1, 1)


def warped(images: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Pictures whose corners `source` are moved to `target`, both (4, 2) in [-1, 1]; what lies outside is mid-grey."""
    centres = pixel_centres(images.shape[-1])
    points = torch.cat([centres, torch.ones_like(centres[..., :1])], dim=-1) @ homography(target, source).T
    return resampled(images, points[..., :2] / points[..., 2:])


EVASIONS = {
    "perspective": Evasion(
        lambda images, _: warped(images, CORNERS, SEEN_AT), lambda images, _: warped(images, SEEN_AT, CORNERS)
    )
}
