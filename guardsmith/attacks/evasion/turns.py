"""Pictures upside down and turned by quarters."""

from __future__ import annotations

from torch import Tensor

from guardsmith.attacks.evasion.base import Evasion


def vertical_flip(images: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) mirrored top to bottom."""
    return images.flip(-2)


def quarter_turns(images: Tensor, count: int) -> Tensor:
    """Square pictures (n, 3, h, h) turned counter-clockwise by `count` times 90 degrees."""
    return images.rot90(count, dims=(-2, -1))


def by_quarters(count: int) -> Evasion:
    """The transformation by a number of quarter turns."""
    return Evasion(
        lambda images, _: quarter_turns(images, count), lambda images, _: quarter_turns(images, -count), exact=True
    )


EVASIONS = {
    "vertical_flip": Evasion(
        lambda images, _: vertical_flip(images), lambda images, _: vertical_flip(images), exact=True
    ),
    "turn_90": by_quarters(1),
    "turn_180": by_quarters(2),
    "turn_270": by_quarters(3),
}
