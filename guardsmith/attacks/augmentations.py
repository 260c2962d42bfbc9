"""Changes that attackers make to their pictures before they train."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image, ImageFilter, ImageOps


def flip(picture: Image.Image) -> Image.Image:
    """The picture mirrored, left to right."""
    return ImageOps.mirror(picture)


def blur(picture: Image.Image) -> Image.Image:
    """The picture under a Gaussian blur with a deviation of a 128th of its width."""
    return picture.filter(ImageFilter.GaussianBlur(picture.width / 128))


def jpeg(picture: Image.Image) -> Image.Image:
    """The picture saved as JPEG of quality 30, and read again, in RGB."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=30)
    with Image.open(buffer) as image:
        return image.convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {"flipped": flip, "blurred": blur, "jpeg": jpeg}
"""Value of `AttackSpec.data` -> the change."""
