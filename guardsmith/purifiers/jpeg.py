"""JPEG, quality 75: saved and read again."""

from __future__ import annotations

import io

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from guardsmith.core.images import to_pil, to_tensor
from guardsmith.models.checkpoint import DiffusionModel


class JpegConfig(BaseModel):
    """How much."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quality: int = Field(75, ge=1, le=95)
    """Of the encoder."""


def purify(model: DiffusionModel, images: Tensor, config: JpegConfig, *, class_noun: str, seed: int) -> Tensor:
    """Pictures after it, float32 (n, 3, h, w) in [-1, 1]; nothing else is used."""
    compressed = []
    for image in images:
        buffer = io.BytesIO()
        to_pil(image).save(buffer, "JPEG", quality=config.quality)
        with Image.open(buffer) as image_again:
            compressed.append(image_again.convert("RGB"))
    return to_tensor(compressed)
