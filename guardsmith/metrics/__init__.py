"""Who judges pictures: the embedded encoders for the embedded world, vision transformers of the Hub for everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from guardsmith.metrics import fidelity, identity
from guardsmith.metrics.vision import DEFAULTS, load_vision


class Judge(NamedTuple):
    """One way of judging.

    Attributes:
        similarity: (pictures, real pictures of a subject) -> one value per picture, `None` where it cannot be scored.
        features: pictures -> rows for KID.
        fidelity: (pictures, what each was asked for) -> share of it that each shows; `None` where nothing can tell.
        size: of the pictures that it reads; `None` for the size of the model that draws them.
    """

    similarity: Callable[[Tensor, Tensor], list[float | None]]
    features: Callable[[Tensor], Tensor]
    fidelity: Callable[[Tensor, Sequence[Mapping[str, str]]], list[float | None]] | None = None
    size: int | None = None


JUDGE_NAMES = ("avatar", *DEFAULTS)


def load_judge(name: str, model: str | None = None) -> Judge:
    """A judge by name, `avatar`, `dino` or `clip`.

    Args:
        name: one of `JUDGE_NAMES`.
        model: folder or Hub id of the encoder, where it is not the usual one.

    Raises:
        UserError: see `vision.VisionEncoder`.
        RunFailed: likewise.
    """
    if name == "avatar":
        return Judge(identity.similarity, fidelity.features, fidelity.fidelity, identity.SIZE)
    encoder = load_vision(name, model or DEFAULTS[name])
    return Judge(encoder.similarity, encoder.features)
