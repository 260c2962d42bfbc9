"""Pictures in another arrangement: in a frame, four times in a grid, cut into blocks, cropped, beside another subject."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from guardsmith.attacks.evasion.base import Evasion, EvasionContext
from guardsmith.training.loop import generator

FRAME = 0.125  # width of a frame, as a share of the side
BLOCKS = 4  # blocks along each side


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Pictures scaled to a size, antialiased, clipped to [-1, 1]."""
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)


def _frame_width(images: Tensor) -> int:
    return max(1, round(FRAME * images.shape[-1]))


def framed(images: Tensor, context: EvasionContext) -> Tensor:
    """Pictures made smaller, in a frame of stripes of two colours that the seed chooses."""
    side, width = images.shape[-1], _frame_width(images)
    colours = torch.rand(2, 3, generator=generator(context.seed)) * 2 - 1
    stripes = torch.arange(side) // max(1, width // 2) % 2
    pattern = stripes[:, None] ^ stripes[None, :]
    canvas = colours.to(images)[pattern].permute(2, 0, 1).repeat(len(images), 1, 1, 1)
    canvas[:, :, width:-width, width:-width] = resized(images, side - 2 * width, side - 2 * width)
    return canvas


def unframed(images: Tensor) -> Tensor:
    """What is inside a frame, at the pictures' size."""
    side, width = images.shape[-1], _frame_width(images)
    return resized(images[:, :, width:-width, width:-width], side, side)


def tiled(images: Tensor) -> Tensor:
    """Every picture four times, at half its size, in a grid of 2 x 2."""
    side = images.shape[-1]
    return resized(images, side // 2, side // 2).repeat(1, 1, 2, 2)


def tile(images: Tensor) -> Tensor:
    """The top left quarter of pictures, at their size."""
    side = images.shape[-1]
    return resized(images[:, :, : side // 2, : side // 2], side, side)


def _blocks(images: Tensor, order: Tensor) -> Tensor:
    n, channels, side, _ = images.shape
    size = side // BLOCKS
    blocks = images.reshape(n, channels, BLOCKS, size, BLOCKS, size).permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
    result = blocks[order].unflatten(0, (BLOCKS, BLOCKS)).permute(2, 3, 0, 4, 1, 5)
    whole: Tensor = result.reshape(n, channels, side, side)
    return whole


def block_order(seed: int) -> Tensor:
    """Which block stands in each place; every block somewhere else than before."""
    places = torch.arange(BLOCKS**2)
    for attempt in range(1000):
        order = torch.randperm(BLOCKS**2, generator=generator(seed, attempt))
        if not bool((order == places).any()):
            return order
    raise AssertionError("one in three permutations leaves nothing in its place")


def shuffled(images: Tensor, context: EvasionContext) -> Tensor:
    """Pictures cut into 4 x 4 blocks, which the seed deals out again; sides have to be multiples of 4."""
    return _blocks(images, block_order(context.seed))


def unshuffled(images: Tensor, context: EvasionContext) -> Tensor:
    """The inverse of `shuffled`."""
    return _blocks(images, block_order(context.seed).argsort())


def cropped(images: Tensor) -> Tensor:
    """The middle of pictures, 60 % of each side, at their size: of a portrait the face without hair and shoulders."""
    side = images.shape[-1]
    edge = round(0.2 * side)
    return resized(images[:, :, edge : side - edge, edge : side - edge], side, side)


def beside_stranger(images: Tensor, context: EvasionContext) -> Tensor:
    """Pictures squeezed to half their width, each with one of another subject to the right of it.

    Raises:
        ValueError: there are no pictures of anybody else.
    """
    if not len(context.strangers):
        raise ValueError("side_by_side needs pictures of another subject")
    side = images.shape[-1]
    others = context.strangers[torch.arange(len(images)) % len(context.strangers)].to(images)
    return torch.cat([resized(images, side, side // 2), resized(others, side, side - side // 2)], dim=-1)


def left_half(images: Tensor) -> Tensor:
    """The left half of pictures, at their full width."""
    side = images.shape[-1]
    return resized(images[:, :, :, : side // 2], side, side)


EVASIONS = {
    "frame": Evasion(framed, lambda images, _: unframed(images)),
    "tiles": Evasion(lambda images, _: tiled(images), lambda images, _: tile(images)),
    "block_shuffle": Evasion(shuffled, unshuffled, exact=True),
    "crop": Evasion(lambda images, _: cropped(images), of_references=True),
    "side_by_side": Evasion(beside_stranger, lambda images, _: left_half(images), needs_stranger=True),
}
