"""Transformations that are undone before an uploaded picture is compared: what an attacker may have done to evade screening.

Each entry is the inverse of one transformation of `attacks.evasion`, or a likely part of a picture. Random colour matrices,
shuffled blocks and perspectives have too many inverses to try; they are not undone.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from torch import Tensor

from guardsmith.attacks.evasion.layout import left_half, tile, unframed

Undo = Callable[[Tensor], Tensor]
AS_UPLOADED = "as uploaded"


def _recoloured(order: str, negative: bool) -> Undo:
    channels = ["rgb".index(channel) for channel in order]
    sign = -1 if negative else 1
    return lambda images: sign * images[:, channels]


def _turned(quarters: int, mirrored: bool, negative: bool) -> Undo:
    sign = -1 if negative else 1

    def undo(images: Tensor) -> Tensor:
        result = images.rot90(quarters, dims=(-2, -1))
        return sign * (result.flip(-1) if mirrored else result)

    return undo


def _names() -> dict[str, Undo]:
    variants: dict[str, Undo] = {}
    for negative in (False, True):
        for order in ("rgb", "rbg", "grb", "gbr", "brg", "bgr"):
            name = "negative" if negative else "" if order == "rgb" else "channels"
            label = " ".join(part for part in (name, order if order != "rgb" else "") if part) or AS_UPLOADED
            variants[label] = _recoloured(order, negative)
        for quarters, mirrored in product(range(4), (False, True)):
            if quarters or mirrored:
                turn = " ".join(part for part in (f"turned {90 * quarters}" if quarters else "", "mirrored" if mirrored else "")
                                if part)  # fmt: skip
                variants[f"negative {turn}" if negative else turn] = _turned(quarters, mirrored, negative)
    return variants | {
        "inside a frame": unframed,
        "one of four tiles": tile,
        "left half": left_half,
        "right half": lambda images: left_half(images.roll(images.shape[-1] // 2, dims=-1)),
    }


VARIANTS: dict[str, Undo] = _names()
"""Name -> what turns pictures (n, 3, h, h) in [-1, 1] into that variant; the first one leaves them as they are."""

LEVELS: dict[str, tuple[str, ...]] = {"none": (AS_UPLOADED,), "usual": tuple(VARIANTS)}
"""How much is undone, by the name of the option."""
