"""Which files a diffusers folder may hold: what `model_index.json` names and the libraries read, and nothing else.

Works on lists of names, so that a repository on the Hub can be judged without downloading it. Anything that is not on the list is
not released: it may hold the base's weights under another name (a single-file checkpoint, an EMA copy, a file for another
framework) or what was not meant to be published (`.git/config`, `.env`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from guardsmith.core.credentials import credential_in
from guardsmith.core.errors import UserError
from guardsmith.models.families import PIPELINES, Family

HALF = "fp16"  # what diffusers calls the half-precision files beside others
EVIDENCE = "guardsmith"  # folder of a published repository with records of how the model came about
INDEX = "model_index.json"
README = "README.md"
LICENCE = re.compile(r"(LICEN[CS]E([-_][\w-]+)?|COPYING|NOTICE)(\.md|\.txt)?", re.IGNORECASE)
TOKENIZER_FILES = frozenset(
    ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
     "spiece.model")
)  # fmt: skip
EVIDENCE_FILES = frozenset(("report.json", "report.html", "harden.json", "recipe.yaml", "bom.cdx.json", "grid.png",
                            "model.sig"))  # fmt: skip
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
EXTRA_NETWORKS = ("safety_checker", "image_encoder")  # what a pipeline may hold beside what is hardened and attacked

Read = Callable[[str], bytes]


class Part(NamedTuple):
    """One entry of `model_index.json`.

    Attributes:
        name: of its folder.
        kind: "diffusers" or "transformers" for networks, "tokenizer", "scheduler" or "processor".
        required: whether guardsmith itself reads it.
    """

    name: str
    kind: str
    required: bool = True


def parse_index(data: bytes, where: str) -> tuple[Family, dict[str, Any]]:
    """Family and entries of a `model_index.json`.

    Raises:
        UserError: it is not JSON, of no supported pipeline, or names a part that cannot be a folder beside it.
    """
    try:
        index = json.loads(data)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from error
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(kind, str) or kind not in PIPELINES:
        raise UserError(f"{where}: a {kind} is not supported.")
    for name, value in index.items():
        if isinstance(value, list) and not re.fullmatch(r"\w+", name, re.ASCII):
            raise UserError(f"{where}: it names a part {name!r}, which is no name of a folder; correct the file.")
    return PIPELINES[kind], index


def is_named(index: dict[str, Any], part: str) -> bool:
    """Whether the pipeline has this part: an entry of library and class, neither of them null."""
    entry = index.get(part)
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(each, str) for each in entry)


def parts_of(family: Family, index: dict[str, Any]) -> list[Part]:
    """The parts that this pipeline has and guardsmith knows; see `unknown_parts` for others."""
    parts = [Part(family.denoiser, "diffusers"), Part("vae", "diffusers"), Part("scheduler", "scheduler")]
    for encoder, tokenizer, *_ in family.text_parts():
        parts += [Part(encoder, "transformers"), Part(tokenizer, "tokenizer")]
    parts += [Part(name, "transformers", False) for name in EXTRA_NETWORKS]
    parts.append(Part("feature_extractor", "processor", False))
    return [part for part in parts if is_named(index, part.name)]


def unknown_parts(family: Family, index: dict[str, Any]) -> list[str]:
    """Parts that this kind of pipeline does not have, such as a second U-Net (`unet_ema`)."""
    names = {part.name for part in parts_of(family, index)}
    return [name for name in index if is_named(index, name) and name not in names]


def weight_names(part: Part, paths: Collection[str], reader: Read, variant: str | None = None) -> list[str]:
    """The weight files of a network that its library reads, the index of shards first; empty where there are none.

    Args:
        part: a network.
        paths: every file there is, relative to the checkpoint.
        reader: gives the bytes of one of them.
        variant: `fp16` for the half-precision files beside the others.

    Raises:
        UserError: an index of shards is broken or names files outside of its folder.
    """
    stem, dot = STEMS[part.kind], f".{variant}" if variant else ""
    single = f"{part.name}/{stem}{dot}.safetensors"
    index = f"{part.name}/{stem}.safetensors.index{dot}.json"
    first, second = (index, single) if part.kind == "diffusers" else (single, index)  # the order of either library
    name = first if first in paths else second
    if name not in paths:
        return []
    if name == single:
        return [single]
    try:
        shards = sorted(set(json.loads(reader(index))["weight_map"].values()))
        plain = all(re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard, re.ASCII) for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of weight files; the checkpoint is broken.") from error
    if not plain:
        raise UserError(f"{index} names files that are no safetensors files beside it; the checkpoint is broken.")
    return [index, *(f"{part.name}/{shard}" for shard in shards)]


def weight_variants(part: Part, paths: Collection[str]) -> dict[str, list[str]]:
    """Whole sets of weight files beside those that the library reads by itself, by variant (`fp16`, `non_ema`).

    The empty name is that of shards without an index. A set of shards counts only if none is missing.
    """
    name = re.compile(
        rf"{re.escape(part.name)}/{STEMS[part.kind]}(?:\.([\w-]+?))?(?:-(\d+)-of-(\d+))?(?:\.([\w-]+))?\.safetensors"
    )
    found: dict[str, dict[int, str]] = {}
    wanted: dict[str, int] = {}
    for path in sorted(paths):
        match = name.fullmatch(path)
        if match is None:
            continue
        before, number, count, behind = match.groups()
        variant = before or behind or ""
        if not variant and number is None:
            continue  # what the library reads by itself
        found.setdefault(variant, {})[int(number or 1)] = path
        wanted[variant] = int(count or 1)
    return {
        variant: [shards[number] for number in sorted(shards)]
        for variant, shards in found.items()
        if set(shards) == set(range(1, wanted[variant] + 1))
    }


def used_weights(part: Part, paths: Collection[str], read: Read) -> list[str]:
    """The safetensors files that a part is read from: those that its library reads, shards without an index, its only variant.

    Empty where there are none of these, or several variants and nothing says which is meant.

    Raises:
        UserError: see `weight_names`.
    """
    plain = [name for name in weight_names(part, paths, read) if name.endswith(".safetensors")]
    single = f"{part.name}/{STEMS[part.kind]}.safetensors"
    if plain and (all(name in paths for name in plain) or single not in paths):
        return plain
    if single in paths:  # beside an index whose shards are not there
        return [single]
    variants = weight_variants(part, paths)
    if "" in variants:
        return variants[""]
    return next(iter(variants.values())) if len(variants) == 1 else []


def plain_names(part: Part, used: Sequence[str]) -> list[str]:
    """What files of `used_weights` are called where the library is to read them by itself."""
    stem = f"{part.name}/{STEMS[part.kind]}"
    if len(used) == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number + 1:05}-of-{len(used):05}.safetensors" for number in range(len(used))]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a network is read from (`used_weights`); all of its folder where there are none of these."""
    names = {f"{folder.name}/{file.name}": file for file in folder.glob("*") if file.is_file()}
    for kind in STEMS:
        weights = used_weights(Part(folder.name, kind), names, lambda name: names[name].read_bytes())
        if weights:
            return [names[name] for name in weights if name in names]
    return sorted(folder.glob("*.safetensors"), key=lambda file: file.name.count("."))


def part_names(part: Part, paths: Collection[str], reader: Read) -> list[str]:
    """The files of a part that its library reads, without variants; of a network `config.json` comes first.

    Raises:
        UserError: see `weight_names`.
    """
    if part.kind in STEMS:
        names = [f"{part.name}/config.json", *weight_names(part, paths, reader)]
    elif part.kind == "tokenizer":
        names = [f"{part.name}/{name}" for name in sorted(TOKENIZER_FILES)]
    else:
        config = {"scheduler": "scheduler_config.json", "processor": "preprocessor_config.json"}[part.kind]
        names = [f"{part.name}/{config}"]
    return [name for name in names if name in paths]


def expected_files(paths: Collection[str], reader: Read, *, published: bool = False) -> set[str]:
    """Those of a checkpoint's files that belong into a released one; whatever else there is does not.

    Args:
        paths: every file there is, relative to the checkpoint.
        reader: gives the bytes of one of them.
        published: whether it is (a copy of) a published repository, with evidence and the Hub's own file.

    Raises:
        UserError: see `parse_index` and `weight_names`.
    """
    if INDEX not in paths:
        raise UserError(f"there is no {INDEX}: this is no diffusers folder.")
    family, index = parse_index(reader(INDEX), INDEX)
    names = {INDEX, README, *(path for path in paths if LICENCE.fullmatch(path))}
    for part in parts_of(family, index):
        names.update(part_names(part, paths, reader))
        if part.kind in STEMS:
            names.update(weight_names(part, paths, reader, HALF))
    if published:
        names |= {".gitattributes", *(f"{EVIDENCE}/{name}" for name in EVIDENCE_FILES)}
    return names & set(paths)


def list_files(folder: Path) -> dict[str, Path]:
    """Every file below a folder by its name relative to it: dot-files, links (not followed into folders) and all."""
    result = {}
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in (*files, *links):
            file = Path(place) / name
            result[file.relative_to(folder).as_posix()] = file
    return dict(sorted(result.items()))


def lies_within(folder: Path, file: Path) -> bool:
    """Whether a file is a regular one whose content lies in the folder, not behind a link that leads out of it.

    A snapshot in the Hub client's cache consists of links to `../../blobs`, which is as much part of it as the names are; every
    other link out of the folder is not followed. Nor is one to a hidden file inside of it (a README that is `.git/config`).
    """
    try:
        home, real = folder.resolve(), file.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return False
    if not real.is_file():
        return False
    if real.is_relative_to(home):
        return not any(part.startswith(".") for part in real.relative_to(home).parts)
    snapshot = next((place.parent for place in (home, *home.parents) if place.parent.name == "snapshots"), None)
    return snapshot is not None and real.parent == (snapshot.parent / "blobs").resolve()


def summary(paths: Iterable[str], others: Collection[str]) -> list[str]:
    """Names of files, a folder of which nothing is kept as one name with a slash at its end."""
    above = {parent.as_posix() for path in others for parent in Path(path).parents}
    names: dict[str, None] = {}
    for path in sorted(paths):
        folder = next((p for p in reversed(Path(path).parents) if p.as_posix() not in {".", *above}), None)
        names[path if folder is None else f"{folder.as_posix()}/"] = None
    return list(names)


def releasable_metadata(metadata: Mapping[str, str], *, single_file: bool = False) -> dict[str, str]:
    """What of a safetensors file's metadata may be released: no prompts, tags of training pictures, paths or credentials.

    Args:
        metadata: key -> text, as the file has it.
        single_file: whether it is a checkpoint for A1111 and ComfyUI, whose `modelspec.*` says what the model is. A thumbnail
            may show anybody, and hashes are those of the weights before.
    """
    result = {}
    for key, text in metadata.items():
        describes = (
            single_file and key.startswith("modelspec.") and not key.startswith(("modelspec.thumb", "modelspec.hash"))
        )
        if (key == "format" or describes) and credential_in(f"{key}={text}") is None:
            result[key] = text
    return result
