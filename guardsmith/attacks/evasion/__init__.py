"""Transformations by which attackers evade recognition, one file per family.

Photos are transformed, the model is trained on them, and the pictures that it draws are transformed back before anyone judges
them. Training attacks and ways of drawing are one level up.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from guardsmith.attacks.evasion import adversarial, colours, detail, layout, perspective, style, swirl, turns
from guardsmith.attacks.evasion.base import Evasion, EvasionContext
from guardsmith.core.errors import entry_of

EVASIONS: dict[str, Evasion] = {
    name: entry
    for family in (colours, turns, layout, perspective, swirl, detail, style, adversarial)
    for name, entry in family.EVASIONS.items()
}


def find_evasion(name: str) -> Evasion:
    """An entry of the table.

    Raises:
        UserError: there is no such transformation.
    """
    return entry_of(EVASIONS, name, "evasion")


def transformed(images: Tensor, names: Sequence[str], context: EvasionContext) -> Tensor:
    """Pictures after the named transformations, in this order.

    Args:
        images: float32 (n, 3, h, h) in [-1, 1].
        names: keys of `EVASIONS`.
        context: what they may use.

    Returns:
        The same shape and range.

    Raises:
        UserError: there is no such transformation.
        ValueError: one of them lacks what it needs in the context.
    """
    for name in names:
        images = find_evasion(name).apply(images, context)
    return images


def inverted(images: Tensor, names: Sequence[str], context: EvasionContext) -> Tensor:
    """Pictures that a model drew, transformed back: the inverses in reverse order, where there is one.

    Args:
        images: float32 (n, 3, h, h) in [-1, 1].
        names: what `transformed` was called with.
        context: the same as then.

    Returns:
        The same shape and range.

    Raises:
        UserError: there is no such transformation.
    """
    for name in reversed(names):
        inverse = find_evasion(name).invert
        if inverse is not None:
            images = inverse(images, context)
    return images


__all__ = ["EVASIONS", "Evasion", "EvasionContext", "find_evasion", "inverted", "transformed"]
