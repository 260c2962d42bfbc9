"""Weights that the libraries do not read by themselves, put before them under the names that they do read.

A part may have its weights as a variant only (`.fp16.`, `.non_ema.`), or in shards without their index: then the libraries are
given a folder of links.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from guardsmith.models.contents import HALF, STEMS, Part, plain_names, used_weights, weight_names
from guardsmith.models.tensor_files import read_header


def kind_of(part: str) -> str:
    """Which library reads a network, by its folder."""
    return "diffusers" if part in ("unet", "transformer", "vae") else "transformers"


def used_files(place: Path) -> list[Path]:
    """The weight files of a network's folder, see `used_weights`; some may be missing."""
    names = {f"{place.name}/{file.name}": file for file in place.glob("*")}
    found = used_weights(Part(place.name, kind_of(place.name)), names, lambda name: names[name].read_bytes())
    return [place.parent / name for name in found]


def has_halves(place: Path) -> bool:
    """Whether a part has half-precision files beside others; where it has no others, they become those without a variant."""
    beside = sorted(place.glob(f"*.{HALF}[.-]*"))
    return bool(beside) and not set(used_files(place)) <= set(beside)


def index_of(files: Mapping[str, Path], stem: str) -> tuple[str, str]:
    """Name and text of an index of shards.

    Args:
        files: name of every shard -> where it can be read.
        stem: of the names.
    """
    where = {tensor: name for name, file in files.items() for tensor in read_header(file).tensors}
    return f"{stem}.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": where}, indent=2) + "\n"


@contextmanager
def readable_folder(place: Path) -> Iterator[Path]:
    """A folder that a library reads a network from: its own, or one of links to its files."""
    part = Part(place.name, kind_of(place.name))
    names = {f"{part.name}/{file.name}": file for file in place.glob("*")}
    used = [f"{part.name}/{file.name}" for file in used_files(place)]
    plain = weight_names(part, names, lambda name: names[name].read_bytes())
    if not used or used == [name for name in plain if name.endswith(".safetensors")]:
        yield place
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copyfile(place / "config.json", folder / "config.json")
        links = [folder / Path(name).name for name in plain_names(part, used)]
        for link, name in zip(links, used, strict=True):
            link.symlink_to(names[name].resolve())
        if len(links) > 1:
            name, text = index_of({link.name: link for link in links}, STEMS[part.kind])
            (folder / name).write_text(text, encoding="utf-8")
        yield folder


def renamed(part: Part, used: Sequence[str], plain: Sequence[str]) -> dict[str, str]:
    """Name of every weight file in use -> its name in a copy of the checkpoint; empty where the library reads it as it is."""
    if list(used) == [name for name in plain if name.endswith(".safetensors")]:
        return {}
    return dict(zip(used, plain_names(part, used), strict=True))
