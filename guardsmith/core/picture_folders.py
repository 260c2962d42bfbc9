"""Folders of pictures: which files count, and which are left out, by name and number.

A folder stands for the pictures directly in it. Files of other kinds and sub-folders with pictures are left out, and named; files
that the system hides (`.DS_Store`, and `._IMG.jpg`, which macOS writes beside IMG.jpg on foreign disks) are not mentioned.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from guardsmith.core.errors import UserError
from guardsmith.core.images import SUFFIXES, open_image

NAMED = 3
"""As many names stand in a sentence about files that were left out."""


class Listing(NamedTuple):
    """What is in a folder.

    Attributes:
        pictures: by name.
        skipped: names of other files, and of sub-folders with pictures (ending in a slash), by name.
    """

    pictures: list[Path]
    skipped: list[str]


def is_picture(file: Path) -> bool:
    """Whether a file counts as a picture when its folder is listed."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def list_pictures(folder: Path, *, but: Iterable[str] = ()) -> Listing:
    """The pictures of a folder.

    Args:
        folder: it.
        but: sub-folders that are read on their own, and not left out.

    Raises:
        UserError: it cannot be read.
    """
    try:
        inside = sorted(place for place in folder.iterdir() if not place.name.startswith(".") and place.name not in but)
        pictures = [place for place in inside if is_picture(place)]
        skipped = [
            f"{place.name}/" if place.is_dir() else place.name
            for place in inside
            if (_holds_pictures(place) if place.is_dir() else not is_picture(place))
        ]
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): check its permissions") from None
    return Listing(pictures, skipped)


def _holds_pictures(folder: Path) -> bool:
    return any(is_picture(Path(inside, name)) for inside, _, names in os.walk(folder) for name in names)


def skipped_sentence(folder: Path | str, skipped: list[str]) -> str:
    """A sentence about what was left out of a folder: how many, the first few names, and what to do."""
    names = ", ".join(skipped[:NAMED]) + (", ..." if len(skipped) > NAMED else "")
    places = "; name sub-folders on their own" if any(name.endswith("/") for name in skipped) else ""
    return f"{len(skipped)} other entries of {folder} were left out ({names}){places}"


class Selection(NamedTuple):
    """Pictures that were named, on their own or by their folders.

    Attributes:
        files: those that can be used, in the order of the names, sorted within a folder.
        left_out: a sentence about everything else in the folders.
        entries: number of entries that were left out.
    """

    files: list[Path]
    left_out: list[str]
    entries: int


def select_pictures(places: Iterable[Path]) -> Selection:
    """The pictures that are named, and those of folders that are named, as far as they can be used.

    A damaged picture of a folder is left out, so that one does not stop the work on all others; one that is named on its own is
    an error.

    Args:
        places: files and folders.

    Raises:
        UserError: named pictures cannot be used (a sentence a line for each), or a folder has none that can.
    """
    files: list[Path] = []
    left_out: list[str] = []
    errors: list[str] = []
    count = 0
    for place in places:
        if not place.is_dir():
            files += usable([place], errors)
            continue
        inside, skipped = list_pictures(place)
        sentences = [skipped_sentence(place, skipped)] if skipped else []
        good = usable(inside, sentences)
        if not good:
            raise UserError("\n".join([*sentences, f"there is no picture in {place} that can be used; name others"]))
        files += good
        left_out += sentences
        count += len(skipped) + len(inside) - len(good)
    if errors:
        raise UserError("\n".join(errors))
    return Selection(files, left_out, count)


def opened(files: Iterable[Path], problems: list[str]) -> Iterator[tuple[Path, Image.Image]]:
    """The pictures that can be opened, one after the other, with their files.

    Args:
        files: pictures.
        problems: gets a sentence for each of the others (see `open_image`).
    """
    for file in files:
        try:
            image = open_image(file)
        except UserError as error:
            problems.append(str(error))
        else:
            yield file, image


def usable(files: Iterable[Path], problems: list[str]) -> list[Path]:
    """The files of `opened`."""
    return [file for file, _ in opened(files, problems)]
