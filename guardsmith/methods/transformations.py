"""Pictures as those who want to evade recognition transform them, so that they are recognised all the same."""

from __future__ import annotations

import torch
from torch import Tensor

from guardsmith.attacks.evasion import EvasionContext, transformed
from guardsmith.methods.variations import variations

FAMILIES = (
    ("negative",), ("channels_rbg", "channels_grb", "channels_gbr", "channels_brg", "channels_bgr", "hue_rotation"),
    ("colour_matrix",), ("vertical_flip", "turn_180"), ("turn_90", "turn_270"), ("frame",), ("tiles",), ("crop",),
    ("side_by_side",), ("blur", "pixelate"), ("paint",),
)  # fmt: skip
"""Transformations that a recogniser is trained on; every family is as likely as the others.

Perspective and posterizing are kept out, to measure what it makes of new ones. Shuffled blocks and sketches are out because they
were not learnt beside the others, and adversarial noise because it is made against a model.
"""


def transformed_at_random(images: Tensor, strangers: Tensor, rng: torch.Generator) -> Tensor:
    """Every picture after a transformation of `FAMILIES`, and then varied as photographs are (`variations`).

    Args:
        images: float32 (n, 3, h, h) in [-1, 1].
        strangers: of others, likewise (m, 3, h, h): who is put beside a picture.
        rng: of everything drawn.

    Returns:
        The same shape and range.
    """
    results = []
    for image in images.split(1):
        family = FAMILIES[int(torch.randint(len(FAMILIES), (), generator=rng))]
        name = family[int(torch.randint(len(family), (), generator=rng))]
        seed, row = torch.randint(2**30, (), generator=rng), torch.randint(len(strangers), (), generator=rng)
        context = EvasionContext(int(seed), strangers=strangers[int(row)][None])
        results.append(transformed(image, [name], context))
    return variations(torch.cat(results), 1, rng)[len(images) :]
