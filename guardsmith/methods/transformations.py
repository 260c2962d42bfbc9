"""Pictures as those who want to evade recognition transform them, so that they are recognised all the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from guardsmith.attacks.evasion import EvasionContext, transformed
from guardsmith.methods.variations import drawn_variation

FAMILIES = (
    ("negative",), ("channels_rbg", "channels_grb", "channels_gbr", "channels_brg", "channels_bgr"), ("hue_rotation",),
    ("colour_matrix",), ("vertical_flip", "turn_180"), ("turn_90", "turn_270"), ("perspective",), ("frame",),
    ("tiles",), ("crop",), ("side_by_side",), ("blur", "pixelate"), ("posterize",), ("paint",),
)  # fmt: skip
"""Transformations that a recogniser is trained on; every family is as likely as the others.

Swirls and checkerboards of negatives are kept out, to measure what it makes of new ones. Shuffled blocks and sketches are out
because they were not recognised beside the others, and adversarial noise because it is made against a model.
"""
AT_ONCE = 64  # pictures


def transformed_at_random(images: Tensor, copies: int, strangers: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
    """Copies of every picture, each after a transformation of `FAMILIES`, and then varied as photographs are (`Variation`).

    Args:
        images: float32 (n, 3, h, h) in [-1, 1].
        copies: of every picture.
        strangers: of others, likewise (m, 3, h, h): who is put beside a picture.
        rng: of everything drawn.

    Yields:
        Some at a time, so that not all have to be in memory: (at most `AT_ONCE`, 3, h, h) in [-1, 1]; all pictures first, then
        the second copy of every picture, and so on.
    """
    count, choices = copies * len(images), []
    for _ in range(count):
        family = FAMILIES[int(torch.randint(len(FAMILIES), (), generator=rng))]
        name = family[int(torch.randint(len(family), (), generator=rng))]
        seed, row = torch.randint(2**30, (), generator=rng), torch.randint(len(strangers), (), generator=rng)
        choices.append((name, int(seed), int(row)))
    variation = drawn_variation(count, rng)
    for first in range(0, count, AT_ONCE):
        some = slice(first, min(first + AT_ONCE, count))
        results = [
            transformed(
                images[number % len(images)][None], [name], EvasionContext(seed, strangers=strangers[row][None])
            )
            for number, (name, seed, row) in enumerate(choices[some], first)
        ]
        yield variation[some].of(torch.cat(results)).clamp(-1, 1)
