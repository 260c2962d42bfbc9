"""Linear changes of the colours: the negative, permuted channels, hue rotations and random matrices; negatives in a checkerboard.

Every change but the last is a 3 x 3 matrix on (red, green, blue) in [-1, 1], where 0 is mid-grey. No row's absolute values add up
to more than 1, so no colour leaves the range and nothing has to be clipped; the inverse is the inverse matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from guardsmith.attacks.evasion.base import Evasion, EvasionContext
from guardsmith.training.loop import generator

NEGATIVE = -torch.eye(3)
SQUARES = 4  # of a checkerboard, along each side
LARGEST_CONDITION = 6.0  # of random matrices: a worse one loses colours to the rounding of the VAE


def permutation(order: str) -> Tensor:
    """The matrix that puts the named channels, e.g. "brg", in the places of red, green and blue."""
    return torch.eye(3)[["rgb".index(channel) for channel in order]]


def in_range(matrix: Tensor) -> Tensor:
    """The matrix scaled down so that it maps [-1, 1]^3 into itself."""
    return matrix / matrix.abs().sum(dim=1).max().clamp(min=1)


def hue_rotation(degrees: float) -> Tensor:
    """A rotation around the grey axis, scaled so that it stays in range (colours become paler; the inverse restores them)."""
    angle = math.radians(degrees)
    axis = torch.full((3,), 3**-0.5)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) * 3**-0.5
    rotation = (
        math.cos(angle) * torch.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * torch.outer(axis, axis)
    )
    return in_range(rotation)


def random_matrix(seed: int) -> Tensor:
    """A well-conditioned matrix that depends on the seed alone."""
    for attempt in range(1000):
        matrix = torch.randn(3, 3, generator=generator(seed, attempt))
        values = torch.linalg.svdvals(matrix)
        if values[0] <= LARGEST_CONDITION * values[-1]:
            return matrix / matrix.abs().sum(dim=1).max()
    raise AssertionError("one in ten random matrices is well-conditioned")


def recoloured(images: Tensor, matrix: Tensor) -> Tensor:
    """Every pixel of pictures (n, 3, h, w) multiplied by a 3 x 3 matrix, clipped to [-1, 1]."""
    return torch.einsum("ij,njhw->nihw", matrix.to(images), images).clamp(-1, 1)


def by_matrix(matrix: Tensor) -> Evasion:
    """The transformation by a fixed matrix."""
    inverse = torch.linalg.inv(matrix)
    return Evasion(
        lambda images, _: recoloured(images, matrix), lambda images, _: recoloured(images, inverse), exact=True
    )


def _random(images: Tensor, context: EvasionContext) -> Tensor:
    return recoloured(images, random_matrix(context.seed))


def _random_inverse(images: Tensor, context: EvasionContext) -> Tensor:
    return recoloured(images, torch.linalg.inv(random_matrix(context.seed)))


def checkered(images: Tensor) -> Tensor:
    """Pictures of which every other square of 4 x 4 is its negative; done twice, it is undone."""
    side = images.shape[-1]
    square = torch.arange(side) * SQUARES // side
    return images * (1 - 2 * ((square[:, None] + square) % 2)).to(images)


EVASIONS = {
    "negative": by_matrix(NEGATIVE),
    **{f"channels_{order}": by_matrix(permutation(order)) for order in ("rbg", "grb", "gbr", "brg", "bgr")},
    "hue_rotation": by_matrix(hue_rotation(90)),
    "colour_matrix": Evasion(_random, _random_inverse, exact=True),
    "checkerboard": Evasion(lambda images, _: checkered(images), lambda images, _: checkered(images), exact=True),
}
