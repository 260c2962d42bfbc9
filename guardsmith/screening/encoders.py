"""The judges' encoders, for comparing many pictures with many subjects: pictures become unit vectors once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from guardsmith.core.atomic_io import folder_digest
from guardsmith.core.errors import UserError
from guardsmith.core.images import sha256_file
from guardsmith.metrics import embedded, face, identity
from guardsmith.metrics.vision import DEFAULTS, load_vision

SIZE = 512  # pictures are opened at this side for encoders of photographs
JUDGES = ("avatar", *DEFAULTS, "face")


@dataclass(frozen=True)
class Encoder:
    """One judge's encoder.

    Attributes:
        embed: pictures (n, 3, h, w) in [-1, 1] -> unit vectors, float32 (n, width); a row of zeros where no face is found.
        size: side at which pictures are opened.
        name: of the judge.
        digest: of what decides the vectors.
    """

    embed: Callable[[Tensor], Tensor]
    size: int
    name: str
    digest: str


def _faces(images: Tensor) -> Tensor:
    embeddings = [face.load_faces().embed(image) for image in images]
    return torch.stack([torch.zeros(128) if one is None else one for one in embeddings])


def load_encoder(name: str, model: str | None = None) -> Encoder:
    """The encoder of a judge.

    Args:
        name: one of `JUDGES`.
        model: folder or Hub id of a vision transformer, where it is not the usual one.

    Raises:
        UserError: there is no such judge, or its weights are not there.
        RunFailed: the Hub cannot be reached.
    """
    if name == "avatar":
        weights = sha256_file(embedded.JUDGES / "identity.safetensors")
        return Encoder(identity.embed, identity.SIZE, name, folder_digest(name, weights))
    if name == "face":
        face.load_faces()
        return Encoder(_faces, SIZE, name, folder_digest(name))
    if name in DEFAULTS:
        vision = load_vision(name, model or DEFAULTS[name])
        return Encoder(vision.embed, SIZE, name, folder_digest(name, model or DEFAULTS[name]))
    raise UserError(f"there is no judge {name!r}; choose {', '.join(JUDGES)}")
