"""Another style: a pencil sketch, and a painting of flat areas with dark outlines. Neither can be inverted."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from guardsmith.attacks.evasion.base import Evasion
from guardsmith.core.images import to_pil, to_tensor


def _sketched(picture: Image.Image) -> Image.Image:
    grey = ImageOps.grayscale(picture)
    smooth = ImageOps.invert(grey).filter(ImageFilter.GaussianBlur(picture.width / 40))
    # Colour dodge: what differs from its surroundings becomes a line, everything else paper.
    values = np.asarray(grey, dtype=np.float32) * 255 / np.maximum(255 - np.asarray(smooth, dtype=np.float32), 1)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")


def _painted(picture: Image.Image) -> Image.Image:
    size = max(3, round(picture.width / 20) | 1)
    flat = ImageOps.posterize(picture.filter(ImageFilter.MedianFilter(size)), 3)
    lines = ImageOps.invert(ImageOps.grayscale(picture).filter(ImageFilter.FIND_EDGES)).point(
        lambda v: 0 if v < 200 else 255
    )
    return Image.composite(flat, Image.new("RGB", picture.size, "black"), lines)


def sketched(images: Tensor) -> Tensor:
    """Pencil sketches of pictures (n, 3, h, w)."""
    return torch.stack([to_tensor(_sketched(to_pil(image))) for image in images]).to(images)


def painted(images: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) with flat colours and black outlines."""
    return torch.stack([to_tensor(_painted(to_pil(image))) for image in images]).to(images)


EVASIONS = {
    "sketch": Evasion(lambda images, _: sketched(images)),
    "paint": Evasion(lambda images, _: painted(images), of_references=True),
}
