"""The pictures of a registry: read from files, folders, globs and datasets, hashed, and compared with each other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from pydantic import ValidationError

from guardsmith.core.atomic_io import whole_file
from guardsmith.core.errors import UserError
from guardsmith.core.images import (
    FINGERPRINTED_AT,
    KINDS,
    fingerprint,
    is_whole_png,
    near_duplicates,
    open_image,
    read_bytes,
    sha256_file,
)
from guardsmith.core.picture_folders import is_picture, list_pictures, skipped_sentence
from guardsmith.core.yaml_text import KeyPath, Problem, line_of
from guardsmith.registry.types import SPLITS, Image, ImageEntry, Split


class Picture(NamedTuple):
    """A picture with its name and line, for messages, and its `fingerprint` where pictures are compared."""

    image: Image
    name: str
    line: int
    fingerprint: NDArray[Any] | None


def find_pictures(
    raw: Mapping[str, Any],
    where: KeyPath,
    label: str,
    folder: Path,
    lines: Mapping[KeyPath, int],
    check_images: bool,
    problems: list[Problem],
    warnings: list[Problem],
) -> list[Picture]:
    """The pictures of one subject.

    Args:
        raw: its entry.
        where: place of that in the file.
        label: see `label_of`.
        folder: of the registry file.
        lines: see `yaml_text.parse`.
        check_images: see `load_registry`.
        problems: is added to.
        warnings: is added to.
    """
    if not isinstance(raw.get("images"), list):
        return []
    pictures: list[Picture] = []
    missing: set[Split] = set(SPLITS if where[0] == "subjects" else ("attack", "reference"))
    readable = True
    for index, item in enumerate(raw["images"]):
        line = line_of(lines, (*where, "images", index))
        try:
            entry = ImageEntry.model_validate(item)
        except ValidationError:
            readable = False  # `explain` has a sentence about it
            continue
        missing.discard(entry.split)
        try:
            files = files_of(entry, folder)
        except UserError as error:
            problems.append(Problem(line, f"{label}: {error}"))
            continue
        for file, known_hash in files:
            try:
                pictures.append(_picture(entry, file, known_hash, line, check_images))
            except UserError as error:
                problems.append(Problem(line, f"{label}: {error}"))
        if entry.sha256 is None and entry.revision is None:
            source = entry.path or entry.dataset
            sentence = f"{label}: {source} is not pinned: its {len(files)} pictures may change without notice"
            if entry.path is not None and (skipped := _skipped(folder / entry.path)):
                sentence += f"; {skipped_sentence(entry.path, skipped)}"
            warnings.append(Problem(line, sentence))
    if readable and missing:
        names = " and ".join(split for split in SPLITS if split in missing)
        sentence = f"{label}: no image has split {names}: add pictures that no other split uses"
        problems.append(Problem(line_of(lines, (*where, "images")), sentence))
    return pictures


def files_of(entry: ImageEntry, folder: Path) -> list[tuple[Path, str | None]]:
    """The files an entry stands for, each with its SHA-256 where the entry or the dataset gives it.

    Args:
        entry: a file, a folder, a glob or a dataset.
        folder: relative paths begin there.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    if entry.path is None:
        return _dataset_files(entry, folder)
    path = folder / entry.path
    if path.is_dir():
        files, skipped = list_pictures(path)
        if not files:
            others = f"; {skipped_sentence(path, skipped)}" if skipped else ""
            raise UserError(f"the folder {path} holds no picture ({KINDS}){others}")
    elif not path.exists() and any(sign in entry.path for sign in "*?["):
        root = Path(path.anchor) if Path(entry.path).is_absolute() else folder
        pattern = str(Path(entry.path).relative_to(root)) if root is not folder else entry.path
        files = sorted(filter(is_picture, _glob(root, pattern)))
        if not files:
            raise UserError(f"no picture matches {entry.path}")
    elif entry.sha256 is None:
        what = f"add `sha256: {sha256_file(path)}`" if path.is_file() else "and the file does not exist"
        raise UserError(f"{path} has no sha256: {what}")
    else:
        return [(path, entry.sha256)]
    if entry.sha256 is not None:
        raise UserError(f"{entry.path} stands for {len(files)} pictures: a sha256 belongs to a single file")
    return [(file, None) for file in files]


def _skipped(path: Path) -> list[str]:
    return list_pictures(path).skipped if path.is_dir() else []


def _glob(root: Path, pattern: str) -> list[Path]:
    try:
        return list(root.glob(pattern))
    except (ValueError, NotImplementedError, IndexError) as error:  # `**x`, or nothing but dots
        raise UserError(f"{pattern} is no pattern for files ({error}): correct it") from None
    except OSError as error:
        raise UserError(f"{pattern} cannot be read ({error.strerror}): correct it") from None


def _picture(entry: ImageEntry, file: Path, known_hash: str | None, line: int, check_images: bool) -> Picture:
    looks_like = None
    if check_images or known_hash is None:
        data = read_bytes(file)
        sha256 = hashlib.sha256(data).hexdigest()
        if entry.sha256 not in (None, sha256):
            raise UserError(
                f"{file} is not the picture that was registered: its sha256 is {sha256}; "
                "restore the file or register this one"
            )
        if check_images:
            looks_like = fingerprint(open_image(file, data, at_least=FINGERPRINTED_AT))
        known_hash = known_hash or sha256
    return Picture(Image(path=file.absolute(), sha256=known_hash, split=entry.split), str(file), line, looks_like)


def check_duplicates(groups: Sequence[tuple[str, Sequence[Picture]]]) -> list[Problem]:
    """Problems with pictures that occur twice, or nearly so, in a registry.

    Args:
        groups: (label, pictures) of every subject and control, in the order of the file; see `label_of`.
    """
    everything = [(label, picture) for label, pictures in groups for picture in pictures]
    problems = []
    by_hash: dict[str, tuple[str, Picture]] = {}
    for label, picture in everything:
        if picture.image.sha256 not in by_hash:
            by_hash[picture.image.sha256] = label, picture
            continue
        owner, first = by_hash[picture.image.sha256]
        if owner != label:
            sentence = f"{picture.name} is also a picture of {owner} (line {first.line}): remove one"
        elif first.image.split != picture.image.split:
            splits = f"split {picture.image.split} and in split {first.image.split}"
            sentence = f"{picture.name} is in {splits} (line {first.line}): keep it in one of them"
        else:
            sentence = f"{picture.name} is listed twice (line {first.line}): remove one"
        problems.append(Problem(picture.line, f"{label}: {sentence}"))

    prints = [(label, picture, picture.fingerprint) for label, picture in everything if picture.fingerprint is not None]
    for i, j, distance in near_duplicates([each for *_, each in prints]):
        (owner, first, _), (label, second, _) = prints[i], prints[j]
        same_split = owner == label and first.image.split == second.image.split
        if same_split or first.image.sha256 == second.image.sha256:
            continue
        whose = f"split {first.image.split}" if owner == label else owner
        remedy = "remove one or put both in one split" if owner == label else "remove one"
        sentence = (
            f"{second.name} (split {second.image.split}) shows nearly the same as {first.name} ({whose}, line {first.line}; "
            f"distance {distance:.2f}): {remedy}"
        )
        problems.append(Problem(second.line, f"{label}: {sentence}"))
    return problems


def _dataset_files(entry: ImageEntry, folder: Path) -> list[tuple[Path, str | None]]:
    """The pictures of a dataset as PNG files in the cache, each with the SHA-256 of its decoded RGB bytes."""
    import datasets

    name = str(entry.dataset)
    source: dict[str, Any] = {"path": name, "revision": entry.revision}
    if name.startswith("imagefolder:"):
        images = folder / name.removeprefix("imagefolder:")
        if not images.is_dir():
            raise UserError(f"the folder {images} of dataset {name} does not exist: correct the path")
        source = {"path": "imagefolder", "data_dir": str(images)}
    elif name.startswith("parquet:"):
        table_file = folder / name.removeprefix("parquet:")
        if not table_file.is_file():
            raise UserError(f"the file {table_file} of dataset {name} does not exist: correct the path")
        source = {"path": "parquet", "data_files": str(table_file)}
    try:
        table = datasets.load_dataset(**source, split=entry.dataset_split)
    except Exception as error:  # the Hub, the network, pyarrow and file formats raise what they like
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"dataset {name} (split {entry.dataset_split}) cannot be loaded ({type(error).__name__}: {reason}): "
            "check its name, split and revision and the connection to the Hub, or name a folder of pictures"
        ) from error
    columns = [column for column, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise UserError(f"dataset {name} has no image column: choose a dataset of pictures")

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "guardsmith" / "images"
    cache.mkdir(parents=True, exist_ok=True)
    files: list[tuple[Path, str | None]] = []
    for index, row in enumerate(table.cast_column(columns[0], datasets.Image(decode=False))):
        stored = row[columns[0]]
        picture = open_image(f"{name} row {index}", stored["bytes"] or read_bytes(stored["path"]))
        digest = hashlib.sha256(picture.tobytes()).hexdigest()
        file = cache / f"{digest}.png"
        if not is_whole_png(file):
            with whole_file(file) as partial:
                picture.save(partial, format="PNG")
        files.append((file, digest))
    if not files:
        raise UserError(f"split {entry.dataset_split} of dataset {name} is empty: choose another split")
    return files
