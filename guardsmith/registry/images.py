"""The pictures of a registry: found in files, folders, globs and datasets, hashed, and compared with each other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from pydantic import ValidationError

from guardsmith.core.errors import UserError
from guardsmith.core.images import SUFFIXES, fingerprint, near_duplicates, open_image, read_bytes, sha256_file
from guardsmith.registry.types import SPLITS, Image, ImageEntry, Split
from guardsmith.registry.yaml_lines import KeyPath, Problem, line_of


class Picture(NamedTuple):
    """A picture with what is needed to talk about it: its name, the line that lists it, and how it looks."""

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
    """The pictures of one subject; adds to `problems` and `warnings`."""
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
            readable = False  # already told
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
            warnings.append(Problem(line, sentence))
    if readable and missing:
        names = " and ".join(split for split in SPLITS if split in missing)
        sentence = f"{label}: no image has split {names}: add pictures that no other split uses"
        problems.append(Problem(line_of(lines, (*where, "images")), sentence))
    return pictures


def files_of(entry: ImageEntry, folder: Path) -> list[tuple[Path, str | None]]:
    """The files an entry stands for, each with its hash where the entry or the dataset gives it.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    if entry.path is None:
        return _dataset_files(entry, folder)
    path = folder / entry.path
    if path.is_dir():
        files = pictures_in(path)
        if not files:
            raise UserError(f"the folder {path} holds no picture ({', '.join(sorted(SUFFIXES))})")
    elif not path.exists() and any(sign in entry.path for sign in "*?["):
        root = Path(path.anchor) if Path(entry.path).is_absolute() else folder
        pattern = str(Path(entry.path).relative_to(root)) if root is not folder else entry.path
        files = sorted(file for file in root.glob(pattern) if file.is_file() and file.suffix.lower() in SUFFIXES)
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


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, by name."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in SUFFIXES)


def _picture(entry: ImageEntry, file: Path, known_hash: str | None, line: int, check_images: bool) -> Picture:
    look = None
    if check_images or known_hash is None:
        data = read_bytes(file)
        found = hashlib.sha256(data).hexdigest()
        if entry.sha256 not in (None, found):
            raise UserError(
                f"{file} is not the picture that was registered: its sha256 is {found}; "
                "restore the file or register this one"
            )
        if check_images:
            look = fingerprint(open_image(file, data))
        known_hash = known_hash or found
    return Picture(Image(path=file.absolute(), sha256=known_hash, split=entry.split), str(file), line, look)


def check_duplicates(pictures: list[Picture], label: str, known: dict[str, tuple[str, Picture]]) -> list[Problem]:
    """Problems with pictures that occur twice or nearly so; `known` (subject and picture of each hash) is updated."""
    problems = []
    for picture in pictures:
        if picture.image.sha256 not in known:
            known[picture.image.sha256] = label, picture
            continue
        owner, first = known[picture.image.sha256]
        if owner != label:
            sentence = f"{picture.name} is also a picture of {owner} (line {first.line}): remove one"
        elif first.image.split != picture.image.split:
            splits = f"split {picture.image.split} and in split {first.image.split}"
            sentence = f"{picture.name} is in {splits} (line {first.line}): keep it in one of them"
        else:
            sentence = f"{picture.name} is listed twice (line {first.line}): remove one"
        problems.append(Problem(picture.line, f"{label}: {sentence}"))

    looks = [(picture, picture.fingerprint) for picture in pictures if picture.fingerprint is not None]
    for i, j, distance in near_duplicates([look for _, look in looks]):
        first, second = looks[i][0], looks[j][0]
        if first.image.split == second.image.split or first.image.sha256 == second.image.sha256:
            continue
        sentence = (
            f"{second.name} (split {second.image.split}) shows nearly the same as {first.name} (split "
            f"{first.image.split}, line {first.line}; distance {distance:.2f}): remove one or put both in one split"
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
        if not file.exists():
            partial = file.with_suffix(f".{os.getpid()}.tmp")
            picture.save(partial, format="PNG")
            partial.replace(file)
        files.append((file, digest))
    if not files:
        raise UserError(f"split {entry.dataset_split} of dataset {name} is empty: choose another split")
    return files
