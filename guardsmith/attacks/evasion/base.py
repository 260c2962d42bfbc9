"""What a transformation of training pictures is, and what it may use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from guardsmith.models.checkpoint import DiffusionModel


@dataclass(frozen=True)
class EvasionContext:
    """What a transformation may use besides the pictures.

    Attributes:
        seed: of everything random; the same seed transforms and inverts alike.
        model: the model under attack, for transformations that are optimized against it; `None` where nothing needs it.
        strangers: pictures of another subject, float32 (m, 3, h, w) in [-1, 1] at the size of the pictures; may be empty.
    """

    seed: int = 0
    model: DiffusionModel | None = None
    strangers: Tensor = field(default_factory=lambda: torch.empty(0))


Transform = Callable[[Tensor, EvasionContext], Tensor]
"""Pictures float32 (n, 3, h, w) in [-1, 1] -> pictures of the same shape and range; h = w."""


class Evasion(NamedTuple):
    """One entry of the table.

    Attributes:
        apply: what the attacker does to the training pictures.
        invert: what undoes it on the pictures that the personalized model draws; `None`: they are judged as drawn.
        exact: whether `invert` gives back every pixel value, up to rounding to 8 bits.
        needs_model: whether `apply` needs `EvasionContext.model`.
        needs_stranger: whether `apply` needs `EvasionContext.strangers`.
        of_references: whether pictures, which nothing undoes, are compared with real ones after the same transformation: a judge
            of whole pictures does not know a part of one.
    """

    apply: Transform
    invert: Transform | None = None
    exact: bool = False
    needs_model: bool = False
    needs_stranger: bool = False
    of_references: bool = False
