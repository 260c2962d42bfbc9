"""Rows of pictures on the page: real ones, and those that personalized models drew."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from guardsmith.core.images import open_image, square
from guardsmith.registry.loader import Subject
from guardsmith.reports.curves import SIDES
from guardsmith.reports.evidence import AttackRun

ROW = 4  # pictures of a row
PIXELS = 128


class Picture(NamedTuple):
    """One picture on the page.

    Attributes:
        data: the picture itself, a `data:` address.
        alt: what it is, in words.
        caption: beneath it.
    """

    data: str
    alt: str
    caption: str = ""


class Strip(NamedTuple):
    """A row of pictures.

    Attributes:
        title: what they have in common.
        pictures: empty where there are none, or where they are left out.
        missing: why it is empty.
    """

    title: str
    pictures: list[Picture]
    missing: str = ""


def embedded(image: Image.Image) -> str:
    """A picture as a `data:` address, small."""
    file = io.BytesIO()
    square(image, min(PIXELS, *image.size)).save(file, "WEBP", quality=85, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def strip_address(file: Path) -> str:
    """A PNG file as a `data:` address, as it is."""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def caption_of(score: float | None) -> str:
    """A similarity beneath a picture."""
    return "not scored" if score is None else f"{score:z.2f}"


def real_strip(subject: Subject) -> Strip:
    """What the judge compares with."""
    pictures = [
        Picture(embedded(open_image(image.path)), f"{subject.id}, real picture {number}")
        for number, image in enumerate(subject.images_of("reference")[:ROW], 1)
    ]
    return Strip("real pictures", pictures)


def drawn_strip(units: Sequence[AttackRun], title: str, point: float, count: int) -> Strip:
    """What personalized models drew: the first pictures of every unit in turn, not the best ones."""
    if not units:
        return Strip(title, [], "not run")
    pictures, share = [], -(-count // len(units))
    for unit in units:
        scores = unit.scores()
        if scores is None:
            continue
        for number, file in enumerate(unit.pictures(point)[:share]):
            caption = caption_of(scores[point][number])
            alt = f"{unit.subject} as drawn after {unit.label} {dict(SIDES)[unit.side]}, similarity {caption}"
            pictures.append(Picture(embedded(open_image(file)), alt, caption))
    return Strip(title, pictures[:count], "" if pictures else "no pictures: the attack did not run")
