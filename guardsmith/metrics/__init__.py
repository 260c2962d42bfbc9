"""Judges of pictures: embedded encoders for the embedded base, transformers of the Hub or dlib for everything else.

Adding one: a file with what it measures, and a `JudgeEntry` in `JUDGES`. One of your own, without changing guardsmith, is a
`JudgeEntry` in any module, which a policy or `--judge` names as `module:NAME`. Limits and verdicts are not here but in `gate`.

The networks are imported when a judge is loaded: recipes, policies and reports need the names only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from guardsmith.core.plugins import find_entry

if TYPE_CHECKING:
    from torch import Tensor


class Judge(NamedTuple):
    """One way of judging. Pictures are float32 (n, 3, h, w) in [-1, 1].

    Attributes:
        similarity: (pictures, real pictures of a subject) -> one value per picture, `None` where it cannot be scored.
        features: pictures -> rows for KID, float32 (n, width).
        fidelity: (pictures, traits in each one's prompt) -> share of them that each shows; `None` where nothing can tell.
        size: of the pictures that it reads, in pixels; `None` for the size of the model that draws them.
        no_face: the similarity of a picture in which there is no face to compare, where the judge looks for one.
        prompt_fit: (pictures, prompts) -> CLIP-T of each, where a CLIP was given.
    """

    similarity: Callable[[Tensor, Tensor], list[float | None]]
    features: Callable[[Tensor], Tensor]
    fidelity: Callable[[Tensor, Sequence[Mapping[str, str]]], list[float | None]] | None = None
    size: int | None = None
    no_face: float | None = None
    prompt_fit: Callable[[Tensor, Sequence[str]], list[float | None]] | None = None


class JudgeEntry(NamedTuple):
    """One entry of the table.

    Attributes:
        load: (folder or Hub id of the encoder, or `None` for the usual one) -> the judge.
        paper: where it comes from.
    """

    load: Callable[[str | None], Judge]
    paper: str


def _avatar(_: str | None) -> Judge:
    from guardsmith.metrics import fidelity, identity

    return Judge(identity.similarity, fidelity.features, fidelity.fidelity, identity.SIZE)


def _face(model: str | None) -> Judge:
    from guardsmith.metrics import face
    from guardsmith.metrics.vision import DEFAULTS, load_vision

    face.load_faces()
    return Judge(face.similarity, load_vision("dino", model or DEFAULTS["dino"]).features, no_face=face.NO_FACE)


def _vision(name: str) -> Callable[[str | None], Judge]:
    def load(model: str | None) -> Judge:
        from guardsmith.metrics.vision import DEFAULTS, load_vision

        encoder = load_vision(name, model or DEFAULTS[name])
        return Judge(encoder.similarity, encoder.features)

    return load


JUDGES: dict[str, JudgeEntry] = {
    "avatar": JudgeEntry(_avatar, "guardsmith, docs/explanation/gate.md"),
    "dino": JudgeEntry(_vision("dino"), "hf.co/papers/2304.07193"),
    "clip": JudgeEntry(_vision("clip"), "hf.co/papers/2103.00020"),
    "face": JudgeEntry(_face, "dlib.net"),
}


def find_judge(name: str) -> JudgeEntry:
    """An entry of `JUDGES`, or a `JudgeEntry` in any module that Python can import, `module:NAME`.

    Raises:
        UserError: there is no such judge.
    """
    return find_entry(JUDGES, name, JudgeEntry, "a judge")


def load_judge(name: str, model: str | None = None, clip_t: str | None = None) -> Judge:
    """A judge by name.

    Args:
        name: see `find_judge`.
        model: folder or Hub id of the encoder, if not the usual one; for `face`, of the DINO that compares pictures of benign
            prompts.
        clip_t: folder or Hub id of a CLIP that says how well pictures fit their prompts.

    Raises:
        UserError: there is no such judge; also see `vision.VisionEncoder` and `face.FaceEncoder`.
        RunFailed: likewise.
    """
    judge = find_judge(name).load(model)
    if clip_t is None:
        return judge
    from guardsmith.metrics.vision import load_prompt_fit

    return judge._replace(prompt_fit=load_prompt_fit(clip_t))
