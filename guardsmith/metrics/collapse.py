"""Collapse: which pictures of benign prompts a model destroys; a mean over all pictures would hide a few.

A hardened model draws the base's prompts from the base's noise again. A picture counts as collapsed where the two are further
apart than any two pictures are that the base itself draws of one prompt from different noise.
"""

from __future__ import annotations

from torch import Tensor


def collapsed(reference: Tensor, again: Tensor, other: Tensor) -> Tensor:
    """Which of the pictures have collapsed, bool (n,).

    Args:
        reference: features of the base's pictures, (n, d).
        again: of the base's pictures of the same prompts from other noise, (n, d).
        other: of the hardened model's from that noise, (n, d).
    """
    usual = (again - reference).norm(dim=1).max()
    distance = (other - again).norm(dim=1)
    collapsed: Tensor = ~(distance <= usual)  # what is not a number is no picture
    return collapsed
