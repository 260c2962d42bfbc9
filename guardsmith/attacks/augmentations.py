"""What attackers do to their pictures before they train."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image, ImageFilter, ImageOps


def flipped(picture: Image.Image) -> Image.Image:
    """Mirrored."""
    return ImageOps.mirror(picture)


def blurred(picture: Image.Image) -> Image.Image:
    """Gaussian, deviation a 128th of the width."""
    return picture.filter(ImageFilter.GaussianBlur(picture.width / 128))


def jpeg(picture: Image.Image) -> Image.Image:
    """Saved as JPEG of quality 30, and read again."""
    kept = io.BytesIO()
    picture.save(kept, "JPEG", quality=30)
    with Image.open(kept) as again:
        return again.convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {"flipped": flipped, "blurred": blurred, "jpeg": jpeg}
