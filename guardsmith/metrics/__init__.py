"""Judges of pictures: embedded encoders for the embedded base, transformers of the Hub or dlib for everything else.

Limits and verdicts are not here but in `gate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from guardsmith.metrics import face, fidelity, identity
from guardsmith.metrics.vision import DEFAULTS, load_prompt_fit, load_vision


class Judge(NamedTuple):
    """One way of judging.

    Attributes:
        similarity: (pictures, real pictures of a subject) -> one value per picture, `None` where it cannot be scored.
        features: pictures -> rows for KID.
        fidelity: (pictures, what each was asked for) -> share of it that each shows; `None` where nothing can tell.
        size: of the pictures that it reads; `None` for the size of the model that draws them.
        nobody: the similarity of a picture in which there is no face to compare, where the judge looks for one.
        prompt_fit: (pictures, prompts) -> CLIP-T of each, where it was asked for.
    """

    similarity: Callable[[Tensor, Tensor], list[float | None]]
    features: Callable[[Tensor], Tensor]
    fidelity: Callable[[Tensor, Sequence[Mapping[str, str]]], list[float | None]] | None = None
    size: int | None = None
    nobody: float | None = None
    prompt_fit: Callable[[Tensor, Sequence[str]], list[float | None]] | None = None


JUDGE_NAMES = ("avatar", *DEFAULTS, "face")


def load_judge(name: str, model: str | None = None, clip_t: str | None = None) -> Judge:
    """A judge by name, `avatar`, `dino`, `clip` or `face`.

    Args:
        name: one of `JUDGE_NAMES`.
        model: folder or Hub id of the encoder, where it is not the usual one; for `face`, the DINO that ordinary pictures are
            compared by.
        clip_t: folder or Hub id of a CLIP that says how well pictures fit their prompts.

    Raises:
        UserError: see `vision.VisionEncoder` and `face.FaceEncoder`.
        RunFailed: likewise.
    """
    if name == "avatar":
        judge = Judge(identity.similarity, fidelity.features, fidelity.fidelity, identity.SIZE)
    elif name == "face":
        face.load_faces()
        judge = Judge(face.similarity, load_vision("dino", model or DEFAULTS["dino"]).features, nobody=face.NOBODY)
    else:
        encoder = load_vision(name, model or DEFAULTS[name])
        judge = Judge(encoder.similarity, encoder.features)
    return judge if clip_t is None else judge._replace(prompt_fit=load_prompt_fit(clip_t))
